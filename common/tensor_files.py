"""Files of tensors: written all or nothing, read without running code, and every byte checked."""

import contextlib
import hashlib
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from .files import is_special, whole_file

# What zipfile and torch.load raise on files that are cut off, damaged, foreign, or that try to run code.
UNREADABLE = (
    *(OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, OverflowError, MemoryError),
    *(struct.error, zipfile.BadZipFile, pickle.UnpicklingError),
)


def atomic_save(value: object, path: str | Path) -> None:
    """`torch.save`, all or nothing: a crash or a full disk leaves the old file as it was.

    Raises:
        OSError: the disk is full or not writable; the temporary file is removed.
    """
    with whole_file(path) as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:  # a failed check of PyTorch's, which hides what the disk said
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


class UnreadableFile(ValueError):
    """Why a file of `torch.save` cannot be used, as a predicate: "is cut off or damaged (...)"."""


def read_torch_file(path: str | Path) -> object:
    """What `atomic_save` or `torch.save` wrote, on the CPU. Runs no code, and checks every byte.

    torch.save has written zip archives since 1.6, with a checksum of each tensor; torch.load does not look at these.

    Raises:
        OSError: it cannot be opened.
        UnreadableFile: it is no such archive, or cut off, or damaged, or holds more than tensors and plain values.
    """
    _check_beginning(path)
    with open(path, "rb") as file, _reasons():
        check_checksums(file)
        file.seek(0)
        value = torch.load(file, map_location="cpu", weights_only=True)
    for name, tensor in named_tensors(value):
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            kind = "quantised" if tensor.is_quantized else "empty (meta)" if tensor.is_meta else "sparse"
            raise UnreadableFile(f"holds {kind} tensors, first {name}, where plain ones are needed")
    return value


def map_torch_file(path: str | Path) -> object:
    """The same in milliseconds, for names and shapes: no tensor is read before it is used, and no checksum is checked.

    Raises: what `read_torch_file` raises.
    """
    _check_beginning(path)
    with _reasons():
        zipfile.ZipFile(path).close()  # what is cut off has no table of contents, which stands at the end
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def _check_beginning(path: str | Path) -> None:
    """Raises UnreadableFile unless it is a file that begins as a zip archive does."""
    if is_special(path):
        raise UnreadableFile("is a pipe or a device, no file")
    with open(path, "rb") as file:
        beginning = file.read(4)
    if not beginning:
        raise UnreadableFile("is empty: damaged by a full disk or a broken download")
    if beginning.startswith(b"\x80"):
        raise UnreadableFile(
            "is a bare pickle, as torch.save wrote it before PyTorch 1.6, and was not opened: save the model again "
            "with today's torch.save, or as safetensors"
        )
    if beginning != b"PK\x03\x04":
        raise UnreadableFile("is not a PyTorch file, or its beginning is damaged")


@contextlib.contextmanager
def _reasons() -> Iterator[None]:
    """Raises UnreadableFile for whatever torch.load raises, which at code advises to let it run."""
    try:
        yield
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({refused[1]})" if refused else ""
        reason = "holds more than tensors and was not opened, it could run code of its author"
        raise UnreadableFile(reason + what) from error
    except UNREADABLE as error:
        raise UnreadableFile(f"is cut off or damaged ({type(error).__name__}: {first_line(error)})") from error


def check_checksums(file: BinaryIO | Path) -> None:
    """Raises one of UNREADABLE unless every part of a file of torch.save has the checksum that was stored with it."""
    with zipfile.ZipFile(file) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("torch.save compresses nothing, but this is compressed")
        if damaged := archive.testzip():
            raise ValueError(f"the checksum of {damaged} is wrong")


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def one_line(error: Exception) -> str:
    """The whole message: some name the field in their first line, and what is wrong with it in the next."""
    return " ".join(str(error).split())


def digest(tensors: dict[str, torch.Tensor], described: str = "") -> str:
    """sha256 of names and values, and of a description: equal only for the same weights of the same model."""
    result = hashlib.sha256(described.encode())
    for name, tensor in tensors.items():
        result.update(name.encode())
        result.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return result.hexdigest()


def is_state_dict(value: object) -> bool:
    """True for a table from names to tensors."""
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in value.items()
    )


def named_tensors(value: object, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a nested state with where it stands, e.g. ("optimizer.state.0.exp_avg", ...)."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from named_tensors(item, f"{name}.{key}" if name else str(key))


def nonfinite(value: object) -> str | None:
    """Which tensors of a nested state hold NaN or infinity, as a predicate; None if none does."""
    # A sum is five times faster than a look at each number; a sum that overflows is no proof.
    suspects = [(name, tensor) for name, tensor in named_tensors(value) if not tensor.sum().isfinite()]
    bad = [name for name, tensor in suspects if not tensor.isfinite().all()]
    return f"holds NaN or infinity in {len(bad)} tensors, first {bad[0]}" if bad else None
