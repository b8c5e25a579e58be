"""What a weights file is: a table in JSON beside each `.pth`, so that nobody has to remember its sizes.

    out/full_sft_512.pth     the tensors
    out/full_sft_512.json    {"format": "minimind weights 1", "fingerprint": ..., "config": {"dim": 512, ...}, ...}

A record tells what tensors cannot: how many heads share a width, the rotary base, the experts that a token visits, and
where the weights come from. It is believed only beside the very file that it was written for. Where there is none, as
beside MiniMind's own files, sizes follow from the tensors' shapes, and the rest is assumed and told (sizes.py).
"""

import datetime
import json
import math
import platform
import subprocess
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers

from common.files import crc32, is_special, whole_file
from common.tensor_files import UNREADABLE, is_state_dict, map_torch_file

from .layouts import recognise, to_ours
from .LMConfig import LMConfig, config_fields
from .loading import REPO_ROOT
from .sizes import Given, Shapes, agreed, assume_config, misfits

FORMAT = "minimind weights 1"
AN_ADAPTER = (
    "it is a LoRA adapter, no model: eval_model.py takes it with --lora_name, and "
    "scripts/convert_model.py merges it, with --lora, into the weights that it was trained on"
)


def record_path(weights: str | Path) -> Path:
    """Where the record of a weights file lies: out/full_sft_512.pth -> out/full_sft_512.json."""
    weights = Path(weights)
    return weights.with_name(weights.name.removesuffix(".pth") + ".json")


def fingerprint(weights: str | Path) -> str:
    """Identifies the content of weights, wherever they lie: 8 hexadecimal digits.

    Of a `.pth` file it takes milliseconds: torch.save writes a zip archive, whose index at the end lists every tensor
    with its checksum. The first part of an entry's name is the name that the file once had, and does not count. Of a
    folder config.json and the files of weights are read whole, and so are a GGUF file and what peft wrote.

    Raises:
        OSError, ValueError and the like (UNREADABLE): it is not there, or no file of torch.save.
    """
    weights = Path(weights)
    if is_special(weights):
        raise ValueError(f"{weights} is a pipe or a device, no file")
    if weights.is_dir():
        config = weights / ("adapter_config.json" if is_peft(weights) else "config.json")
        files = [config, *weights.glob("*.safetensors"), *weights.glob("*.bin")]
        entries = sorted((file.name, crc32(file)) for file in files)
    elif weights.suffix == ".gguf":
        return f"{crc32(weights):08x}"
    else:
        with zipfile.ZipFile(weights) as archive:
            entries = sorted((entry.filename.partition("/")[2], entry.CRC) for entry in archive.infolist())
    return f"{zlib.crc32(repr(entries).encode()):08x}"


def is_peft(path: Path) -> bool:
    """True for a directory of peft, which holds an adapter and no model."""
    return (path / "adapter_config.json").is_file() and not (path / "config.json").is_file()


# Writing


def write_record(weights: str | Path, config: LMConfig, **facts) -> None:
    """Write the record of a weights file that was just written, all or nothing.

    Args:
        facts: what else is known about it, in the order in which it is to be read: stage, step, data, ...
    """
    record = {
        "format": FORMAT,
        "weights": Path(weights).name,
        "fingerprint": fingerprint(weights),
        **facts,
        "written": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "config": config_fields(config),
    }
    text = json.dumps(_finite(record), indent=2, ensure_ascii=False) + "\n"
    with whole_file(record_path(weights)) as file:
        file.write(text.encode())


def describe_file(weights: str | Path) -> dict[str, str]:
    """Weights that others are made from: where they lay, and their fingerprint."""
    return {"weights": Path(weights).as_posix(), "fingerprint": fingerprint(weights)}


def describe_program() -> dict[str, object]:
    """Which program writes weights: versions, and git commit (None outside of a checkout)."""
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of this checkout, with "-dirty" behind it when files were changed since."""
    if not (REPO_ROOT / ".git").exists():  # a copy inside another project's checkout would get that project's commit
        return None
    command = ["git", "-C", str(REPO_ROOT), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git here, or a checkout that it does not trust
        return None


def _finite(value: object) -> object:
    """A copy without NaN and infinity, which JSON does not have: None stands for them."""
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# Reading


def read_record(weights: str | Path) -> tuple[dict | None, str]:
    """The record beside a weights file, its "config" an LMConfig; or None, with the reason ("" if there is none)."""
    path = record_path(weights)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError, RecursionError) as error:
        return None, f"{path} is not used: it cannot be read ({error})"
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else None
        return None, f"{path} is not used: its format is {found!r}, this version knows {FORMAT!r}"
    try:
        is_this = record.get("fingerprint") == fingerprint(weights)
    except UNREADABLE:
        return None, ""  # whoever loads these weights will say what is wrong with them
    if not is_this:
        return None, f"{path} is not used: it was written for other weights than those in {weights}"
    fields = record.get("config")
    expected = config_fields(LMConfig())
    try:
        if not isinstance(fields, dict) or fields.keys() != expected.keys():
            raise ValueError("its config has not the fields of LMConfig")
        return {**record, "config": LMConfig(**fields)}, ""
    except (ValueError, TypeError) as error:
        return None, f"{path} is not used: {error}"


def of_training(record: Mapping[str, object]) -> Mapping[str, object]:
    """What a record says of the training; that of converted weights keeps it of those that they were made of."""
    before = record.get("before")
    return before if isinstance(before, Mapping) else record


def tokenizer_remark(weights: str | Path, tokenizer: str) -> str:
    """What to tell if weights were trained with another tokenizer than this, by ChatFormat.fingerprint(); or ""."""
    record, _ = read_record(weights)
    if record is None or record.get("tokenizer") in (None, "", tokenizer):
        return ""
    return (
        f"{weights} was trained with another tokenizer or chat template than the one here, so its answers may make no "
        "sense: leave --tokenizer_path out, or pass that one"
    )


def adapter_remark(adapter: str | Path, base: str | Path) -> str:
    """What to tell if an adapter was trained on other weights than those in `base`; "" if not, or if nobody knows."""
    record, _ = read_record(adapter)
    trained_on = record and record.get("started_from")
    if not isinstance(trained_on, dict) or trained_on.get("fingerprint") == fingerprint(base):
        return ""
    return f"{adapter} was trained on other weights than {base}: on {trained_on.get('weights')} as it was then"


def read_shapes(weights: str | Path) -> tuple[Shapes, str] | None:
    """The shape that every tensor of a `.pth` file has in our layout, in milliseconds, and the file's own layout.

    None if it cannot be read. Raises ValueError for names of no layout, or those of an adapter.
    """
    try:
        tensors = map_torch_file(weights)
        if not is_state_dict(tensors):
            return None
        without_data = {name: torch.empty(tensor.shape, device="meta") for name, tensor in tensors.items()}
    except UNREADABLE:
        return None
    if any(".lora." in name for name in tensors):
        raise ValueError(AN_ADAPTER)
    layout = recognise(without_data)
    # Which rows of q and k change places depends on the size of a head, but not how many there are.
    converted = to_ours(without_data, layout, head_dim=2)
    return {name: tuple(tensor.shape) for name, tensor in converted.items()}, layout.name


def config_for(weights: str | Path, given: Mapping[str, Given]) -> tuple[LMConfig, list[str]]:
    """The configuration of the model in a weights file, and remarks for the user on how it is known.

    Args:
        given: fields that the user gave; see `agreed`.

    Raises:
        ValueError: with every contradiction between the file and what is given, both values and both sources.
    """
    record, remark = read_record(weights)
    try:
        found = read_shapes(weights)
        if record and found and (differing := misfits(record["config"], found[0])):
            record, remark = None, f"{record_path(weights)} is not used: it says {differing}"
        remarks = [remark] if remark else []
        if record:
            config, how = record["config"], "its record says"
        elif found is None:  # whoever loads it will say what is wrong
            return LMConfig(**{name: value for name, (value, _) in given.items()}), remarks
        else:
            (config, assumed), how = assume_config(*found, given), "its tensors show"
            if assumed:
                path = record_path(weights)
                lacks = "no usable record" if path.exists() else f"no {path.name} beside it"
                remarks.append(
                    f"{weights} has {lacks}: sizes as its tensors show; assumed: {assumed}, and that "
                    "its tokens are those of model/minimind_tokenizer (MiniMind's own files need theirs, by "
                    "--tokenizer_path)"
                )
    except ValueError as error:
        raise ValueError(f"{weights}: {error}") from error
    return agreed(config, given, f"{weights} (as {how})"), remarks
