"""Conversion of a .pth file or a folder into each other, GGUF or ONNX; what was written is loaded and compared.

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
from .gguf_file import check_rounding, modelfile, write_gguf
from .gguf_reader import check_gguf, gguf_config, gguf_tensors
from .LMConfig import LMConfig, config_fields
from .loading import count_parameters, save_weights
from .model import MiniMindForCausalLM
from .model_card import Address, local_name, model_card
from .onnx_file import onnx_logits, write_onnx
from .opening import Source, describe, read_tensors
from .own_code import logits_elsewhere
from .record import describe_file, describe_program, of_training, read_record, write_record
from .vocabulary import keep_tokenizer

STORED_TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
BESIDE = {".pth": ".json", ".gguf": ".Modelfile", ".onnx": ".tokenizer.json"}  # what comes with a file
BEFORE = ("stage", "started_from", "data", "step", "tokens", "heldout")  # what is kept of the record of a source
CLOSE = 1e-5  # largest difference of two logits, as a share of the largest logit: rounding of float32
SAMPLE = (
    "水在零摄氏度结冰，在一百摄氏度沸腾。春天来了，院子里的桃花开了，孩子们在树下做游戏。"
    "The quick answer: 12 + 30 = 42.\nfor i in range(3):\n    print(i, '你好')  # 😀\n"
)


def facts_of(source: Source) -> dict[str, object]:
    """Where weights that are made from a source come from, for their record."""
    origin = {"stage": "convert_model", "started_from": describe_file(source.path)}
    record = read_record(source.path)[0] if source.path.is_file() else None
    if record is not None:  # what is known of the training, also after the second conversion
        trained = of_training(record)
        origin["before"] = {name: trained[name] for name in BEFORE if name in trained}
    if source.adapter:
        origin["adapter"] = describe_file(source.adapter)
    return {**origin, **describe_program()}


def files_of(path: Path) -> list[Path]:
    """A file and the one that is written beside it: x.gguf and x.Modelfile."""
    return [path, path.with_name(path.stem + BESIDE[path.suffix])]


def convert_to_pth(source: Source, path: Path) -> str:
    """Write a .pth file with its record; returns what was found to be equal. Raises FileExistsError, ValueError."""
    with new_files(*files_of(path)) as (weights, _):
        model, fingerprint = source.model(), ChatFormat(source.tokenizer).fingerprint()
        save_weights(model.state_dict(), weights)
        write_record(weights, source.config, **facts_of(source), tokenizer=fingerprint)
        config, _ = describe(weights, {})
        tensors, _ = read_tensors(weights, config)
        same = all(torch.equal(tensors[name], tensor) for name, tensor in model.state_dict().items())
        if not same or config_fields(config) != config_fields(source.config):
            raise ValueError(f"{path} is not what was written: the disk is not to be trusted. Nothing is left of it")
        keep_tokenizer(source.tokenizer, path.parent)
    return f"all {len(tensors)} tensors are equal"


def choose_architecture(config: LMConfig) -> str:
    """The model_type that computes what this configuration says; ValueError, with the way out, if there is none."""
    try:
        return native_architecture(config)
    except ValueError as error:
        raise ValueError(f"{error}; --architecture minimind writes a folder with our own class and its code") from error


def convert_to_folder(
    source: Source, path: Path, model_type: str | None, stored: str, address: Address | None = None
) -> str:
    """Write a folder of transformers; returns how far its logits are from ours.

    Args:
        model_type: the architecture (architectures.py), or "minimind" for our own class with its code; None takes the
            native one.
        stored: "f32", "f16" or "bf16".
        address: for the model card; by default the folder's.

    Raises:
        FileExistsError: there is something of that name. ValueError: no such architecture, or other logits.
    """
    model_type = model_type or choose_architecture(source.config)
    is_own = model_type == LMConfig.model_type
    architecture = MiniMindForCausalLM.__name__ if is_own else ARCHITECTURES[model_type]
    model = source.model()
    _refuse_overflow(model, stored)
    with new_folder(path) as temporary:
        write_folder(temporary, source.config, model.state_dict(), source.tokenizer, model_type, STORED_TYPES[stored])
        record = read_record(source.path)[0] if source.path.is_file() else None
        if source.adapter:
            record = facts_of(source)
        address = address or Address(local_name(path))
        card = model_card(
            address, source.config, count_parameters(model), architecture, stored, record or {}, source.tokenizer
        )
        (temporary / "README.md").write_text(card, encoding="utf-8")

        # Weights that are stored rounded are compared with the model of the same rounded weights.
        rounded = MiniMindForCausalLM(source.config).eval()
        rounded.load_state_dict({name: _rounded(t, stored) for name, t in model.state_dict().items()})
        others = _folder_logits(temporary, path, sample_ids(model, source.tokenizer), is_own)
        difference = compare(rounded, others, source.tokenizer)
        if not difference <= CLOSE:  # NaN is not close either
            raise ValueError(f"{architecture} computes other logits, {difference:.1e} apart: nothing is written")
    from_ours = "" if stored == "f32" else f"; {compare(model, others, source.tokenizer):.1e} from those in float32"
    loaded = ", loaded with its own code in a process without this one" if is_own else ""
    return f"{architecture}, its logits are {difference:.1e} from ours, relative to the largest{from_ours}{loaded}"


def _folder_logits(folder: Path, name: Path, ids: Tensor, is_own: bool) -> Tensor:
    """What transformers computes with a folder that was just written; ValueError if it reads it otherwise."""
    if is_own:
        return logits_elsewhere(folder, ids)
    model, found = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    if any(found.values()):
        raise ValueError(f"transformers reads {name} otherwise than it was written: {found}")
    with torch.no_grad():
        return model.eval()(ids).logits


def convert_to_onnx(source: Source, path: Path) -> str:
    """Write an ONNX file and, beside it, the tokenizer's; returns how far onnxruntime's logits are from ours.

    Raises:
        FileExistsError: there is something of these names. ValueError: other logits.
    """
    model = source.model()
    with new_files(*files_of(path)) as (weights, beside):
        write_onnx(weights, source.config, model.state_dict())
        beside.write_text(source.tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
        logits, ids = onnx_logits(weights), sample_ids(model, source.tokenizer)
        # Other sizes of batch and length than those it was made with, and two of them.
        halves = ids[:, : ids.shape[1] // 2 * 2].view(2, -1)
        difference = max(compare(model, logits(ids), source.tokenizer), _relative(model, halves, logits(halves)))
        if not difference <= CLOSE:  # NaN is not close either
            raise ValueError(f"onnxruntime computes other logits, {difference:.1e} apart: nothing is written")
    return f"onnxruntime's logits are {difference:.1e} from ours, relative to the largest"


def convert_to_gguf(source: Source, path: Path, quantisation: str) -> str:
    """Write a GGUF file and, beside it, Ollama's Modelfile; returns how far its logits are from ours.

    Raises:
        FileExistsError: there is something of these names.
        ValueError: llama.cpp has no such architecture, or the file, read on its own, is another model or tokenizer.
    """
    with new_files(*files_of(path)) as (weights, beside):
        model = source.model()
        _refuse_overflow(model, quantisation)
        write_gguf(weights, source.config, model.state_dict(), source.tokenizer, quantisation, name=path.stem)
        check_gguf(weights, source.config, source.tokenizer, SAMPLE)
        tensors = gguf_tensors(weights)
        check_rounding(tensors, model.state_dict(), quantisation)
        read = MiniMindForCausalLM(gguf_config(weights)).eval()
        read.load_state_dict(tensors)
        difference = compare(model, read, source.tokenizer)
        if quantisation == "f32" and not difference <= CLOSE:  # NaN is not close either
            raise ValueError(f"{path} would compute other logits, {difference:.1e} apart: nothing is left of it")
        tokens = source.tokenizer.bos_token, source.tokenizer.eos_token
        beside.write_text(modelfile(path.name, source.config.max_seq_len, *tokens), encoding="utf-8")
    rounded = "" if quantisation == "f32" else f"every number is as {quantisation} rounds it, which moves logits; "
    return f"{quantisation}: {rounded}logits of what it holds are {difference:.1e} from ours, relative to the largest"


def sample_ids(model: MiniMindForCausalLM, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The tokens (1, T) of a piece of text, as many as the model's context holds."""
    ids = torch.tensor([tokenizer.encode(SAMPLE, add_special_tokens=False)])
    return ids[:, : model.config.max_seq_len]


def compare(model: MiniMindForCausalLM, other: torch.nn.Module | Tensor, tokenizer: PreTrainedTokenizerBase) -> float:
    """The largest difference of two models' logits on a piece of text, as a share of the largest logit.

    `other` may also be the logits themselves, (1, T, V) of `sample_ids`.
    """
    ids = sample_ids(model, tokenizer)
    with torch.no_grad():
        return _relative(model, ids, other if isinstance(other, Tensor) else other(ids).logits)


@torch.no_grad()
def _relative(model: MiniMindForCausalLM, ids: Tensor, others: Tensor) -> float:
    logits = model(ids).logits
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
