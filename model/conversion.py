"""Conversion between a .pth file, a folder of transformers and a GGUF file; what was written is loaded and compared.

A conversion that does not compute the same leaves nothing behind: it is written under another name, checked there, and
gets its own name last.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from .architectures import ARCHITECTURES, native_architecture
from .folders import new_files, new_folder, read_folder, write_folder
from .gguf_file import modelfile, read_gguf_tensors, write_gguf
from .layouts import recognise, to_ours
from .LMConfig import LMConfig, config_fields
from .loading import check_vocabulary, fill, load_tokenizer, read_state_dict, save_weights
from .model import MiniMindForCausalLM
from .record import config_for, describe_file, describe_program, record_path, write_record
from .sizes import Given, contradictions

STORED_TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
CLOSE = 1e-5  # largest difference of two logits, as a share of the largest logit: rounding of float32
SAMPLE = (
    "水在零摄氏度结冰，在一百摄氏度沸腾。春天来了，院子里的桃花开了，孩子们在树下做游戏。"
    "The quick answer: 12 + 30 = 42.\nfor i in range(3):\n    print(i, '你好')  # 😀\n"
)


@dataclass(frozen=True)
class Source:
    """A model that was read: its configuration, its tensors in our layout, and what the user is to know of it."""

    path: Path
    config: LMConfig
    tensors: dict[str, Tensor]
    tokenizer: PreTrainedTokenizerBase
    remarks: list[str]

    def model(self) -> MiniMindForCausalLM:
        """The model in float32, in evaluation mode; ValueError if the tensors do not fit it."""
        model = MiniMindForCausalLM(self.config).eval()
        fill(model, self.tensors, self.path, make_with=None)
        return model


def read_source(path: Path, given: Mapping[str, Given]) -> Source:
    """A .pth file of MiniMind of any age, or a folder (see `read_folder`).

    Args:
        given: what the user says about it; see `config_for`.

    Raises:
        FileNotFoundError: it is not there. ValueError: it is damaged, no MiniMind, or not what is given.
    """
    if path.is_dir():
        config, tensors = read_folder(path)
        if found := contradictions(config, given, f"{path} (as its config.json says)"):
            raise ValueError("; ".join(found))
        tokenizer = load_tokenizer(path)
        check_vocabulary(path, tokenizer, config.vocab_size)
        return Source(path, config, tensors, tokenizer, [f"{path}: {_describe(config)}"])
    if path.suffix == ".gguf":
        raise ValueError(f"{path}: GGUF is only written here; convert the .pth or folder that it was made from")
    state_dict = read_state_dict(path, make_with=None)
    if any(".lora." in name for name in state_dict):
        raise ValueError(f"{path} is a LoRA adapter: merge it with scripts/convert_lora.py, then convert the result")
    config, remarks = config_for(path, given)
    layout = recognise(state_dict)
    remarks = [f"{path}: {_describe(config)}, layout {layout.name}", *remarks]
    tokenizer = load_tokenizer()
    check_vocabulary(path, tokenizer, config.vocab_size)
    try:
        return Source(path, config, to_ours(state_dict, layout, config.head_dim), tokenizer, remarks)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def convert_to_pth(source: Source, path: Path) -> str:
    """Write a .pth file with its record; returns what was found to be equal. Raises FileExistsError, ValueError."""
    facts = {"stage": "convert_model", "started_from": describe_file(source.path), **describe_program()}
    with new_files(path, record_path(path)) as (weights, _):
        model = source.model()
        save_weights(model.state_dict(), weights)
        write_record(weights, source.config, **facts)
        read = read_source(weights, {})
        same = all(torch.equal(read.tensors[name], tensor) for name, tensor in model.state_dict().items())
        if not same or config_fields(read.config) != config_fields(source.config):
            raise ValueError(f"{path} is not what was written: the disk is not to be trusted. Nothing is left of it")
    return f"all {len(read.tensors)} tensors are equal"


def convert_to_folder(source: Source, path: Path, model_type: str | None, stored: str) -> str:
    """Write a folder of transformers; returns how far its logits are from ours.

    Args:
        model_type: the architecture (architectures.py); None takes the native one.
        stored: "f32", "f16" or "bf16".

    Raises:
        FileExistsError: there is something of that name. ValueError: no such architecture, or other logits.
    """
    model_type = model_type or native_architecture(source.config)
    model = source.model()
    with new_folder(path) as temporary:
        write_folder(temporary, source.config, model.state_dict(), source.tokenizer, model_type, STORED_TYPES[stored])
        other, found = AutoModelForCausalLM.from_pretrained(
            temporary, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        if any(found.values()):
            raise ValueError(f"transformers reads {path} otherwise than it was written: {found}")
        _refuse_overflow(model, stored)
        rounded = MiniMindForCausalLM(source.config).eval()
        rounded.load_state_dict({name: _rounded(t, stored) for name, t in model.state_dict().items()})
        difference = compare(rounded, other.eval(), source.tokenizer)
        if not difference <= CLOSE:  # NaN is not close either
            raise ValueError(
                f"{ARCHITECTURES[model_type]} computes other logits, {difference:.1e} apart: nothing is written"
            )
    from_ours = "" if stored == "f32" else f"; {compare(model, other, source.tokenizer):.1e} from those in float32"
    return f"{ARCHITECTURES[model_type]}, its logits are {difference:.1e} from ours, relative to the largest{from_ours}"


def convert_to_gguf(source: Source, path: Path, quantisation: str) -> str:
    """Write a GGUF file and, beside it, Ollama's Modelfile; returns how far its logits are from ours.

    Raises:
        FileExistsError: there is something of these names. ValueError: llama.cpp has no such architecture.
    """
    with new_files(path, path.with_name(f"{path.stem}.Modelfile")) as (weights, beside):
        model = source.model()
        _refuse_overflow(model, quantisation)
        write_gguf(weights, source.config, model.state_dict(), source.tokenizer, quantisation, name=path.stem)
        read = MiniMindForCausalLM(source.config).eval()
        read.load_state_dict(read_gguf_tensors(weights, source.config))
        difference = compare(model, read, source.tokenizer)
        if not difference <= (CLOSE if quantisation == "f32" else float("inf")):  # NaN is neither
            raise ValueError(f"{path} would hold other numbers than its source: nothing is left of it")
        beside.write_text(modelfile(path.name, source.config.max_seq_len), encoding="utf-8")
    return f"{quantisation}: logits of what it holds are {difference:.1e} from ours, relative to the largest"


@torch.no_grad()
def compare(model: torch.nn.Module, other: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> float:
    """The largest difference of two models' logits on a piece of text, as a share of the largest logit."""
    ids = torch.tensor([tokenizer.encode(SAMPLE, add_special_tokens=False)])
    ids = ids[:, : model.config.max_position_embeddings]
    logits, others = model(ids).logits, other(ids).logits
    return float((logits - others).abs().max() / logits.abs().max())


def _rounded(tensor: Tensor, stored: str) -> Tensor:
    return tensor.to(STORED_TYPES[stored]).float()


def _describe(config: LMConfig) -> str:
    kind = "mixture of experts" if config.use_moe else "dense"
    return f"{kind}, dim {config.dim}, {config.n_layers} layers, {config.n_heads}/{config.n_kv_heads} heads"


def _refuse_overflow(model: MiniMindForCausalLM, stored: str) -> None:
    """Raises ValueError if a weight is to be stored as float16 and is beyond what that holds."""
    if stored != "f16":
        return
    largest = max(float(parameter.detach().abs().max()) for parameter in model.parameters())
    if largest > (limit := torch.finfo(torch.float16).max):
        raise ValueError(f"f16 ends at {limit:g}, and these weights go up to {largest:g}: pass --dtype bf16")
