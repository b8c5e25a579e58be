"""The memory of this machine and of this process, and what libraries keep of it.

All sizes are in bytes. The memory of the machine means what this process may use: also of the container that it
runs in, if that is less.
"""

import contextlib
import ctypes
import os
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from malloc.h
KERNELS = 512  # compiled matrix products that are kept


def machine_memory() -> int | None:
    """Memory of the machine, or of the container if that is less; None where the system does not tell (Windows)."""
    if not hasattr(os, "sysconf"):
        return None
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([physical, *container_limits()])


def container_limits(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Every memory limit that Linux' control groups, version 1 or 2, set for this process.

    ``groups`` has a line ``number:controllers:/path`` for each hierarchy. A limit of any parent counts too; inside a
    container the path may be the host's, then the limit stands at the root.
    """
    limits = []
    for line in groups.read_text().splitlines() if groups.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            top, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        own = top / path.strip("/")
        for folder in {top, own, *own.parents}:
            with contextlib.suppress(OSError):
                text = (folder / name).read_text().strip()
                limits += [int(text)] if text.isdigit() else []  # version 2 writes "max" for no limit
    return limits


def resident_memory(process: int | str = "self") -> int:
    """Physical memory of a process; where only this process' most so far is known (macOS), that; 0 on Windows."""
    if pages := _statm(process):
        return pages[1] * os.sysconf("SC_PAGE_SIZE")
    if os.name != "posix":
        return 0
    import resource  # missing on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def heap_memory() -> int:
    """Physical memory of this process without what it shares with files (libraries, the token cache); 0 off Linux."""
    pages = _statm()
    return (pages[1] - pages[2]) * os.sysconf("SC_PAGE_SIZE") if pages else 0


def _statm(process: int | str = "self") -> list[int]:
    """Linux' counts of a process' pages: size, resident, shared with files, ...; nothing elsewhere."""
    path = Path(f"/proc/{process}/statm")
    return [int(count) for count in path.read_text().split()] if path.exists() else []


def keep_freed_memory() -> None:
    """Let the C library hand freed blocks out again, whatever their size.

    glibc returns a block above 32 MB to the system as soon as it is freed, and gets the next one page by page, each
    filled with zeros first. On a CPU, logits and activations are such blocks. KeptMemory bounds what is kept.
    """
    if library := c_library("mallopt"):
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)):
            library.mallopt(parameter, value)


def keep_fewer_kernels() -> None:
    """Let oneDNN and PyTorch keep 512 compiled matrix products instead of 1,024. Before the first of them.

    oneDNN compiles a matrix product in bfloat16 for each shape, and PyTorch keeps a description of each; a run with
    batches of many shapes fills both in a thousand steps, with 0.9 GB. What the user has set stays.
    """
    for variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(variable, str(KERNELS))


def give_back_free_memory() -> None:
    """Return every free page of the C library's heap to the system; tens of milliseconds a gigabyte."""
    if library := c_library("malloc_trim"):
        library.malloc_trim(0)


def c_library(function: str) -> ctypes.CDLL | None:
    """The C library of this process if it has this function: glibc's are missing in musl, macOS and Windows."""
    library = ctypes.CDLL(None) if os.name == "posix" else None
    return library if hasattr(library, function) else None
