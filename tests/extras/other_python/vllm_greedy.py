"""Greedy answers of a model folder with vLLM on a CPU: FOLDER DTYPE PROMPTS NEW_TOKENS."""

import json
import os
import sys

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from vllm import LLM, SamplingParams  # noqa: E402

if __name__ == "__main__":  # vLLM starts its engine in a process that imports this file again
    folder, dtype, prompts, new_tokens = sys.argv[1:]
    llm = LLM(model=folder, dtype=dtype, enforce_eager=True, max_model_len=256)
    sampling = SamplingParams(temperature=0, max_tokens=int(new_tokens), ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in json.loads(prompts)], sampling)
    print("\n" + json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
