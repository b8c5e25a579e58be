"""The README.md of an exported folder: what the model is, how to run it, and what its record knows of its training.

The table between the first two lines `---` is what huggingface.co and modelscope.cn read; the licence in it is the
user's to choose. A figure that no record holds is not there.
"""

from collections.abc import Mapping
from pathlib import PurePath

from transformers import PreTrainedTokenizerBase

from .LMConfig import LMConfig

LABELS = {
    "stage": "stage",
    "data": "data",
    "started_from": "started from",
    "adapter": "LoRA adapter merged in",
    "step": "optimizer steps",
    "tokens": "tokens",
    "heldout": "on held-out data",
}
"""What is told of a record, in this order; each is there or not."""


def model_card(
    name: str,
    config: LMConfig,
    parameters: int,
    architecture: str,
    stored: str,
    record: Mapping[str, object],
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    """The text of a README.md, in Chinese and English.

    Args:
        name: of the folder.
        architecture: the class in config.json.
        stored: "f32", "f16" or "bf16".
        record: of the weights (record.py); may be empty.
    """
    is_own = architecture == "MiniMindForCausalLM"
    kind = "mixture of experts" if config.use_moe else "dense"
    experts = f", {config.num_experts_per_tok} of {config.n_routed_experts} experts" if config.use_moe else ""
    shape = f"{config.n_layers} layers, width {config.dim}, {config.n_heads}/{config.n_kv_heads} heads{experts}"
    front = ["library_name: transformers", "language:", "- zh", "- en", "pipeline_tag: text-generation", "tags:"]
    front += ["- minimind", "- conversational", *(["- custom_code"] if is_own else [])]
    front += ["# license: yours to choose; the hub shows it from here, e.g. apache-2.0"]
    rows = [
        ("参数 parameters", f"{parameters:,} ({kind})"),
        ("结构 architecture", f"`{architecture}`: {shape}"),
        ("词表 vocabulary", f"{config.vocab_size:,}"),
        ("上下文 context", f"{config.max_seq_len:,} tokens"),
        ("存储 stored as", stored),
    ]
    parts = [
        "\n".join(["---", *front, "---"]),
        f"# {name}",
        "一个很小的中英文语言模型，用 MiniMind 训练。\n\nA very small Chinese and English language model, trained with "
        "MiniMind.",
        _table(("", ""), rows),
        f"## 运行 How to run it\n\n{_how_to_run(name, is_own)}",
    ]
    if tokenizer.chat_template:
        parts.append(f"## 对话格式 Chat format\n\n```text\n{_example(tokenizer)}\n```")
    if told := _told(record):
        parts.append(f"## 训练 Training\n\n{_table(('', '训练记录 from the record of the run'), told)}")
    parts.append(
        "## 局限 Limits\n\n"
        "模型很小：它会流利地说错话，也没有做过安全训练。重要的事请自行核实。\n\n"
        "It is small: it says wrong things fluently, and nobody has trained it to be safe. Check what matters."
    )
    return "\n\n".join(parts) + "\n"


def _how_to_run(name: str, is_own: bool) -> str:
    trust = ", trust_remote_code=True" if is_own else ""
    python = f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})
model = AutoModelForCausalLM.from_pretrained("{name}"{trust})
messages = [{{"role": "user", "content": "你好"}}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**prompt, max_new_tokens=256)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1]:], skip_special_tokens=True))
```"""
    if is_own:
        return (
            f"{python}\n\n它带着自己的代码（model.py 等），需要 transformers 5；vLLM、llama.cpp 和 Ollama 用不了。\n\n"
            "It brings its own code (model.py and others) and needs transformers 5; vLLM, llama.cpp and Ollama do not "
            "run it."
        )
    return f"""{python}

```bash
vllm serve {name}
python scripts/convert_model.py {name} {name}-f16.gguf  # MiniMind's script: for llama.cpp and Ollama
llama-cli -m {name}-f16.gguf
ollama create {name.lower()} -f {name}-f16.Modelfile
```"""


def _example(tokenizer: PreTrainedTokenizerBase) -> str:
    """A short dialogue as the model sees it."""
    messages = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]
    return tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n")


def _told(record: Mapping[str, object]) -> list[tuple[str, str]]:
    """What a record says of the training, as rows. Of files only their names: where they lay is nobody's business."""
    rows = []
    for field, label in LABELS.items():
        value = record.get(field)
        if field == "data" and isinstance(value, Mapping):
            held_out = f", {value['rows_held_out']:,} held out" if value.get("rows_held_out") else ""
            value = f"{_file(value.get('path'))}, {value.get('rows_trained_on', 0):,} rows{held_out}"
        elif field in ("started_from", "adapter") and isinstance(value, Mapping):
            value = _file(value.get("weights"))
        elif field == "heldout" and isinstance(value, Mapping):
            value = ", ".join(f"{name} {number:g}" for name, number in value.items() if number is not None)
        elif isinstance(value, int):
            value = f"{value:,}"
        if value:
            rows.append((label, str(value)))
    return rows


def _file(path: object) -> str:
    return f"`{PurePath(str(path)).name}`"


def _table(heading: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [f"| {heading[0]} | {heading[1]} |", "|---|---|", *(f"| {label} | {value} |" for label, value in rows)]
    return "\n".join(lines)
