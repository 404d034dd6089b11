"""The page cache of a file, emptied, filled and asked."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import time
from pathlib import Path

FEW_PASSES = 10
LONGEST_WAIT_S = 5.0


class PageCacheError(RuntimeError):
    """The page cache has more or less of a file than what is measured needs, and does not let that be changed."""


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
    """Returns what could not be dropped. The kernel skips pages that are busy, which one that is short of memory keeps
    so for a while; but where a few passes drop nothing, the file system keeps all pages.
    """
    left, passes, end = 1.0, 0, time.monotonic() + LONGEST_WAIT_S
    with path.open("rb") as file:
        while left > 0 and (passes < FEW_PASSES or (left < 1 and time.monotonic() < end)):
            if passes >= FEW_PASSES:
                time.sleep(0.001)
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            left = resident_fraction(path)
            passes += 1
    return left


def make_cold(path: Path) -> None:
    """Raises PageCacheError if more than a hundredth of the file stays in the page cache."""
    if (left := drop_from_page_cache(path)) > 0.01:
        raise PageCacheError(f"{left:.0%} of {path} stayed in the page cache")


def make_warm(path: Path) -> None:
    """Raises PageCacheError if more than a hundredth of the file is not in the page cache in the end. A kernel that is
    short of memory takes pages out of it all the time, so that the file is read again and again.
    """
    if resident_fraction(path) == 1:
        return
    warm(path)  # It may take longer than the wait, which begins after it.
    end = time.monotonic() + LONGEST_WAIT_S
    while (there := resident_fraction(path)) < 0.99:
        if time.monotonic() > end:
            raise PageCacheError(f"only {there:.0%} of {path} is in the page cache")
        warm(path)


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
