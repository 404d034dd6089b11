"""The page cache of a file, emptied, filled and asked."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from pathlib import Path


def resident_pages(path: Path) -> bytes:
    """For each page of the file, 1 if it is in the page cache, by mincore(2), else 0."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapping:
        pages = (ctypes.c_ubyte * math.ceil(len(mapping) / mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(mapping)
        status = libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(mapping)), pages)
        del start
    if status != 0:
        raise OSError(ctypes.get_errno(), "mincore", str(path))
    return bytes(pages)  # The kernel sets the lowest bit of each, and no other.


def resident_fraction(path: Path) -> float:
    """The part of the file that is in the page cache."""
    pages = resident_pages(path)
    return sum(pages) / len(pages)


def drop_from_page_cache(path: Path) -> float:
    """Returns what could not be dropped."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return resident_fraction(path)


def make_cold(path: Path) -> None:
    """Raises RuntimeError if more than a hundredth of the file stays in the page cache."""
    if (left := drop_from_page_cache(path)) > 0.01:
        raise RuntimeError(f"{left:.0%} of {path} stayed in the page cache")


def make_warm(path: Path) -> None:
    """Raises RuntimeError if more than a hundredth of the file is not in the page cache in the end. A kernel that is
    short of memory takes pages out of it all the time, so that the file is read a few times.
    """
    for _ in range(5):
        if resident_fraction(path) < 1:
            warm(path)
        if (there := resident_fraction(path)) >= 0.99:
            return
    raise RuntimeError(f"only {there:.0%} of {path} is in the page cache")


def warm_first_half(path: Path) -> None:
    """Reads the first half of the file, without what the kernel would read ahead of it."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        left = path.stat().st_size // 2
        while left > 0 and (got := len(file.read(min(left, 64 << 20)))) > 0:
            left -= got


def warm(path: Path) -> None:
    with path.open("rb") as file:
        while file.read(64 << 20):
            pass
