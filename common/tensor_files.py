"""Files of tensors: written all or nothing, read without running code, and every byte checked."""

import hashlib
import pickle
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from .files import whole_file

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
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise UnreadableFile("is not a PyTorch file, or its beginning is damaged")
        try:
            check_checksums(file)
            file.seek(0)
            value = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            reason = "holds more than tensors and was not opened, it could run code of its author"
            raise UnreadableFile(f"{reason} ({first_line(error)})") from error
        except UNREADABLE as error:
            raise UnreadableFile(f"is cut off or damaged ({type(error).__name__}: {first_line(error)})") from error
    for name, tensor in named_tensors(value):
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            kind = "quantised" if tensor.is_quantized else "empty (meta)" if tensor.is_meta else "sparse"
            raise UnreadableFile(f"holds {kind} tensors, first {name}, where plain ones are needed")
    return value


def check_checksums(file: BinaryIO | Path) -> None:
    """Raises one of UNREADABLE unless every part of a file of torch.save has the checksum that was stored with it."""
    with zipfile.ZipFile(file) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("torch.save compresses nothing, but this is compressed")
        if damaged := archive.testzip():
            raise ValueError(f"the checksum of {damaged} is wrong")


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


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
