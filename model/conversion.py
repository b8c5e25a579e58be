"""Conversion between a .pth file, a folder of transformers and a GGUF file; what was written is loaded and compared.

A conversion that does not compute the same leaves nothing behind: it is written under another name, checked there, and
gets its own name last.
"""

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from .architectures import ARCHITECTURES, native_architecture
from .chat_format import ChatFormat
from .folders import new_files, new_folder, write_folder
from .gguf_file import modelfile, read_gguf_tensors, write_gguf
from .LMConfig import config_fields
from .loading import save_weights
from .model import MiniMindForCausalLM
from .opening import Source, describe, read_tensors
from .record import describe_file, describe_program, record_path, write_record
from .vocabulary import keep_tokenizer

STORED_TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
CLOSE = 1e-5  # largest difference of two logits, as a share of the largest logit: rounding of float32
SAMPLE = (
    "水在零摄氏度结冰，在一百摄氏度沸腾。春天来了，院子里的桃花开了，孩子们在树下做游戏。"
    "The quick answer: 12 + 30 = 42.\nfor i in range(3):\n    print(i, '你好')  # 😀\n"
)


def convert_to_pth(source: Source, path: Path) -> str:
    """Write a .pth file with its record; returns what was found to be equal. Raises FileExistsError, ValueError."""
    facts = {"stage": "convert_model", "started_from": describe_file(source.path), **describe_program()}
    with new_files(path, record_path(path)) as (weights, _):
        model, fingerprint = source.model(), ChatFormat(source.tokenizer).fingerprint()
        save_weights(model.state_dict(), weights)
        write_record(weights, source.config, **facts, tokenizer=fingerprint)
        config, _ = describe(weights, {})
        tensors, _ = read_tensors(weights, config)
        same = all(torch.equal(tensors[name], tensor) for name, tensor in model.state_dict().items())
        if not same or config_fields(config) != config_fields(source.config):
            raise ValueError(f"{path} is not what was written: the disk is not to be trusted. Nothing is left of it")
        keep_tokenizer(source.tokenizer, path.parent)
    return f"all {len(tensors)} tensors are equal"


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


def _refuse_overflow(model: MiniMindForCausalLM, stored: str) -> None:
    """Raises ValueError if a weight is to be stored as float16 and is beyond what that holds."""
    if stored != "f16":
        return
    largest = max(float(parameter.detach().abs().max()) for parameter in model.parameters())
    if largest > (limit := torch.finfo(torch.float16).max):
        raise ValueError(f"f16 ends at {limit:g}, and these weights go up to {largest:g}: pass --dtype bf16")
