"""Greedy answers of a model folder with whatever transformers this Python has: FOLDER DTYPE PROMPTS NEW_TOKENS."""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

folder, dtype, prompts, new_tokens = sys.argv[1:]
model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), output_loading_info=True)
assert not any(found.values()), found
tokenizer = AutoTokenizer.from_pretrained(folder)
model.generation_config = GenerationConfig(max_new_tokens=int(new_tokens))  # the most probable token, and no end
answers = []
for prompt in json.loads(prompts):
    assert tokenizer.encode(tokenizer.decode(prompt), add_special_tokens=False) == prompt
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids))
    answers.append(out[0, len(prompt) :].tolist())
print(json.dumps(answers))
