"""Conversion of LoRA adapters: MiniMind's .pth <-> a directory of peft; and merging one into a model."""

import copy
import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from common.flags import is_installed

from .adapters import peft_base, peft_layout, read_lora, read_peft_settings, write_peft
from .architectures import MIXTURES
from .conversion import CLOSE, choose_architecture, compare
from .folders import new_files, new_folder, read_folder, write_folder
from .LMConfig import LMConfig, config_fields
from .loading import load_tokenizer, new_model, read_state_dict, save_weights
from .model_lora import Adapter, load_lora, merge_lora
from .opening import Source
from .record import adapter_remark, describe_file, describe_program, is_peft, read_record, record_path, write_record
from .sizes import Given, contradictions

NOT_KEPT = ("format", "weights", "fingerprint", "written", "config", "versions", "commit")  # of the record of a copy


@dataclasses.dataclass(frozen=True)
class AdapterSource:
    """An adapter that was read, for the model of which configuration it is, and whether that is known or assumed."""

    path: Path
    adapter: Adapter
    config: LMConfig
    is_known: bool
    model_type: str | None  # the architecture that a directory of peft was trained on, if it says so
    facts: dict[str, object]  # what its record says of its training
    remarks: list[str]


def is_adapter(path: Path) -> bool:
    """True for a directory of peft, and for a .pth file with the matrices of LoRA. Raises ValueError: it is damaged."""
    if path.is_dir():
        return is_peft(path)
    return path.suffix == ".pth" and path.is_file() and any(".lora." in n for n in read_state_dict(path, None))


def read_adapter(path: Path, given: Mapping[str, Given], model_type: str | None = None) -> AdapterSource:
    """An adapter by itself; see `read_lora`.

    Args:
        given: what the user says of the model that it is for. Its record, or the folder of its base model, says more;
            else sizes follow from its matrices, and the number of heads is assumed and told.
        model_type: the architecture that a directory of peft was trained on, where it does not say so.

    Raises:
        FileNotFoundError, ValueError: as `read_lora`, or it contradicts what is given.
    """
    config, facts, folder = None, {}, None
    if path.is_dir():
        found, folder = peft_base(read_peft_settings(path))
        model_type = model_type or found
        if folder is not None:
            peft_layout(found)  # refuses what is no MiniMind before its weights are read
            config, _ = read_folder(folder)
    else:
        record, _ = read_record(path)
        if record is not None:
            config = record["config"]
            facts = {name: value for name, value in record.items() if name not in NOT_KEPT}
    if config is not None:
        whose = f"{path} (as {folder or 'its record'} says)"
        if found := contradictions(config, given, whose):
            raise ValueError("; ".join(found))
        return AdapterSource(path, read_lora(path, config, model_type), config, True, model_type, facts, [])
    fields = {name: value for name, (value, _) in given.items()}
    # Heads of any size will do to see the shapes; the heads of this model then decide the order of rows.
    shapes = _shapes(read_lora(path, LMConfig(dim=2, n_heads=1, n_kv_heads=1), model_type))
    known = {"use_moe": True} if model_type in MIXTURES else {}
    config = LMConfig(**{**known, **fields, **_sizes(shapes, fields)})
    if found := contradictions(config, given, f"{path} (as its matrices show)"):
        raise ValueError("; ".join(found))
    heads = f"{config.n_heads} heads" + ("" if "n_heads" in fields else ", which is assumed")
    remark = f"{path}: nothing says which model it is for; its matrices fit dim {config.dim}, {heads}"
    return AdapterSource(path, read_lora(path, config, model_type), config, False, model_type, facts, [remark])


def convert_adapter_to_pth(source: AdapterSource, path: Path) -> str:
    """Write MiniMind's file, with a record where the model is known; returns what was compared.

    Raises:
        FileExistsError: there is something of that name. ValueError: peft computes something else.
    """
    files = [path, record_path(path)] if source.is_known else [path]
    with new_files(*files) as (weights, *_):
        save_weights(source.adapter, weights)
        if source.is_known:
            origin = {"converted_from": describe_file(source.path)}
            facts = source.facts or {"stage": "convert_model"}
            write_record(weights, source.config, **facts, **origin, **describe_program())
        _check_equal(source, read_lora(weights, source.config), path)
        compared = ""
        if source.path.is_dir():
            compared = _compare_with_peft(source, source.path, source.model_type or "llama", weights.parent / "base")
    return f"all {len(source.adapter)} matrices are equal{compared}"


def convert_adapter_to_peft(
    source: AdapterSource, path: Path, model_type: str | None, base_model: str | None = None
) -> str:
    """Write a directory that peft puts on the exported model; returns what was compared.

    Args:
        model_type: the architecture of the export that it is for; None takes the native one.
        base_model: the export, noted in the directory.

    Raises:
        FileExistsError: there is something of that name. ValueError: peft has no place for such an adapter.
    """
    model_type = model_type or choose_architecture(source.config)
    with new_folder(path) as temporary:
        write_peft(source.adapter, temporary, source.config, model_type, base_model)
        _check_equal(source, read_lora(temporary, source.config, model_type), path)
        compared = _compare_with_peft(source, temporary, model_type, temporary / "base")
    return f"for {model_type}: all {len(source.adapter)} matrices are equal{compared}"


def merge_adapter(source: Source, path: Path, model_type: str | None = None) -> Source:
    """The model with an adapter added to its weights, W + alpha / rank * B A.

    Raises:
        FileNotFoundError, ValueError: as `read_lora`; or the adapter is of another model, or the sum is rounded away.
    """
    adapter = read_lora(path, source.config, model_type)
    both, merged = source.model(), source.model()
    try:
        load_lora(both, adapter)
        load_lora(merged, adapter)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    merge_lora(merged)
    difference = compare(both, merged, source.tokenizer)
    if not difference <= CLOSE:  # NaN is not close either
        raise ValueError(f"{path}: merged weights compute other logits, {difference:.1e} apart: nothing is written")
    effect = compare(source.model(), merged, source.tokenizer)
    remarks = [
        *source.remarks,
        f"{path}: merged, {difference:.1e} from base and adapter; moves logits {effect:.1e}",
    ]
    if source.path.is_file() and (remark := adapter_remark(path, source.path)):
        remarks.append(remark)
    return dataclasses.replace(source, tensors=merged.state_dict(), adapter=path, remarks=remarks)


def _shapes(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """target -> (..., out, in), the shape of the weight that an adapter is for."""
    shapes = {}
    for name, A in adapter.items():
        target, is_A, _ = name.partition(".lora.A.")
        if is_A:
            shapes[target] = (*A.shape[:-2], adapter[f"{target}.lora.B.weight"].shape[-2], A.shape[-1])
    return shapes


def _sizes(shapes: Mapping[str, tuple[int, ...]], given: Mapping[str, object]) -> dict[str, object]:
    """The fields of LMConfig that the shapes of adapted weights show."""
    usual, sizes = LMConfig(), {}
    for target, shape in shapes.items():
        projection = target.rpartition(".")[2]
        sizes["dim"] = shape[-2] if projection == "down_proj" else shape[-1]
        sizes["n_layers"] = max(sizes.get("n_layers", 0), int(target.split(".")[2]) + 1)
        if projection in ("gate_proj", "up_proj", "down_proj"):
            sizes["hidden_dim"] = shape[-1] if projection == "down_proj" else shape[-2]
        if len(shape) == 3:
            sizes |= {"use_moe": True, "n_routed_experts": shape[0]}
        if projection in ("k_proj", "v_proj"):
            sizes["n_kv_heads"] = max(1, shape[-2] * given.get("n_heads", usual.n_heads) // sizes["dim"])
    return sizes


def _check_equal(source: AdapterSource, read: Adapter, path: Path) -> None:
    same = read.keys() == source.adapter.keys()
    if not same or not all(torch.equal(read[name], tensor) for name, tensor in source.adapter.items()):
        raise ValueError(f"{path} is not what was written: the disk is not to be trusted. Nothing is left of it")


def _compare_with_peft(source: AdapterSource, directory: Path, model_type: str, place: Path) -> str:
    """Put a directory's adapter on a base model with peft, and ours with our code; the base has random weights.

    Args:
        place: where the base model may be written, and is removed.
    """
    if not is_installed("peft"):
        return "; peft is not installed here, so it was not compared with what peft makes of it"
    from peft import PeftModel

    tokenizer = load_tokenizer()
    fields = {**config_fields(source.config), "vocab_size": len(tokenizer)}
    base = new_model(LMConfig(**fields)).eval()
    place.mkdir()
    write_folder(place, base.config, base.state_dict(), tokenizer, model_type)
    if model_type == LMConfig.model_type:
        other = copy.deepcopy(base)
    else:
        other = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, local_files_only=True)
    shutil.rmtree(place)
    theirs = PeftModel.from_pretrained(other, str(directory)).eval()
    load_lora(base, source.adapter)
    difference = compare(base, theirs, tokenizer)
    if not difference <= CLOSE:
        raise ValueError(f"peft computes other logits with {directory}, {difference:.1e} apart: nothing is written")
    return f"; on a base of random weights peft's logits are {difference:.1e} from ours, relative to the largest"
