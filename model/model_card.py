"""The README.md of an exported folder: what the model is, how to run it, and what its record knows of its training.

The table between the first two lines `---` is what huggingface.co and modelscope.cn read; the licence in it is the
user's to choose. A figure that no record holds is not there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath

from transformers import PreTrainedTokenizerBase

from .LMConfig import LMConfig
from .record import of_training

LABELS = {
    "stage": "阶段 stage",
    "data": "数据 data",
    "started_from": "起点 started from",
    "adapter": "并入的 LoRA adapter merged in",
    "step": "优化器步数 optimizer steps",
    "tokens": "token 数 tokens",
    "heldout": "留出数据上 on held-out data",
}
"""What is told of a record, in this order; each is there or not."""


@dataclass(frozen=True)
class Address:
    """Where a model is to be found, and under which license.

    Attributes:
        name: what from_pretrained takes: a folder, or OWNER/NAME on huggingface.co.
        download: the command that fetches the repository OWNER/NAME into the folder NAME; "" for a local folder.
        license: its identifier on the hub; None if nobody has chosen one.
    """

    name: str
    download: str = ""
    license: str | None = None

    @property
    def folder(self) -> str:
        """The folder on the reader's machine."""
        return PurePath(self.name).name if self.download else self.name


def local_name(path: Path) -> str:
    """A folder as seen from the working directory; outside of it only its name: the card may be published."""
    path, here = path.absolute(), Path.cwd()
    return path.relative_to(here).as_posix() if path.is_relative_to(here) else path.name


def model_card(
    address: Address,
    config: LMConfig,
    parameters: int,
    architecture: str,
    stored: str,
    record: Mapping[str, object],
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    """The text of a README.md, in Chinese and English.

    Args:
        address: where it is to be found.
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
    if address.license:
        front += [f"license: {address.license}"]
    else:
        front += ["# license: yours to choose; the hub shows it from here, e.g. apache-2.0"]
    rows = [
        ("参数 parameters", f"{parameters:,} ({kind})"),
        ("结构 architecture", f"`{architecture}`: {shape}"),
        ("词表 vocabulary", f"{config.vocab_size:,}"),
        ("上下文 context", _context(config, record)),
        ("存储 stored as", stored),
    ]
    parts = [
        "\n".join(["---", *front, "---"]),
        f"# {PurePath(address.name).name}",
        "一个很小的中英文语言模型，用 MiniMind 训练。\n\nA very small Chinese and English language model, trained with "
        "MiniMind.",
        _table(("", ""), rows),
        f"## 运行 How to run it\n\n{_how_to_run(address, is_own)}",
    ]
    if tokenizer.chat_template:
        parts.append(f"## 对话格式 Chat format\n\n```text\n{_example(tokenizer)}\n```")
    if told := _told(record):
        parts.append(f"## 训练 Training\n\n{_table(('', '训练记录 from the record of the run'), told)}")
        if of_training(record).get("heldout"):
            parts.append(
                "留出数据是从同一份数据里随机留出的，同样的事可能换个说法训练过：损失接近零不说明学会了新知识，"
                "与用别的数据得到的数字也不能相比。\n\n"
                "Held-out rows were left out of the same data at random, which may hold the same facts in other words: "
                "a loss near zero shows no knowledge of anything new, and figures on other data are not comparable."
            )
    parts.append(
        "## 局限 Limits\n\n"
        "模型很小：它会流利地说错话，也没有做过安全训练。重要的事请自行核实。\n\n"
        "It is small: it says wrong things fluently, and nobody has trained it to be safe. Check what matters."
    )
    return "\n\n".join(parts) + "\n"


def _how_to_run(address: Address, is_own: bool) -> str:
    trust = ", trust_remote_code=True" if is_own else ""
    name, folder = address.name, address.folder
    python = f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})
model = AutoModelForCausalLM.from_pretrained("{name}"{trust})
messages = [{{"role": "user", "content": "你好"}}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**prompt, max_new_tokens=256)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1]:], skip_special_tokens=True))
```"""
    download = [address.download] if address.download else []
    if download and name == folder:  # transformers does not find it on its hub
        python = f"```bash\n{address.download}\n```\n\n{python}"
        download = []
    if is_own:
        return (
            f"{python}\n\n它带着自己的代码（model.py 等），需要 transformers 5；vLLM、llama.cpp 和 Ollama 用不了。\n\n"
            "It brings its own code (model.py and others) and needs transformers 5; vLLM, llama.cpp and Ollama do not "
            "run it."
        )
    gguf = f"{PurePath(folder).name}-f16"
    commands = [
        f"vllm serve {name}",
        *download,
        f"python scripts/convert_model.py {folder} {gguf}.gguf  # MiniMind's script: for llama.cpp and Ollama",
        f"llama-cli -m {gguf}.gguf",
        f"ollama create {PurePath(folder).name.lower()} -f {gguf}.Modelfile",
    ]
    return "\n".join([f"{python}\n", "```bash", *commands, "```"])


def _context(config: LMConfig, record: Mapping[str, object]) -> str:
    """How long a text may be; a model is good only at lengths that it was trained on, where these are known."""
    limit = f"{config.max_seq_len:,} tokens，位置上限 the limit of positions"
    data = of_training(record).get("data")
    trained = data.get("max_seq_len") if isinstance(data, Mapping) else None
    if trained is None:
        return limit
    return f"{limit}；训练时每条至多 trained on sequences of at most {trained:,}"


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
    if (before := of_training(record)) is not record:
        rows += [(f"转换之前 before: {label}", value) for label, value in _told(before)]
    return rows


def _file(path: object) -> str:
    return f"`{PurePath(str(path)).name}`"


def _table(heading: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [f"| {heading[0]} | {heading[1]} |", "|---|---|", *(f"| {label} | {value} |" for label, value in rows)]
    return "\n".join(lines)
