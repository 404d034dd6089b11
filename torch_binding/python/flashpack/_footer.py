"""What a file says about itself. Needs no torch."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from typing import Any, Literal, NamedTuple

from . import _native
from ._logging import logger

StrPath = str | os.PathLike[str]
Verify = Literal["auto", "always", "never"]
"""Whether a load is held against the checksums of its file.

"auto": what is read in whole stripes of 1 MiB, which is all of a file and most of a part of it, if the file has
checksums. "always": all of it, and a file without checksums is an error. "never": nothing is.
"""


class Entry(NamedTuple):
    """One tensor of a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    """In the file."""
    size_bytes: int
    number: int
    """Its index among all of the file."""

    @property
    def elems(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class Footer:
    """A checked footer and the file it came from.

    May be passed on as the path of its file: what takes a path then reads from the file that is open already.
    """

    path: str
    native: _native.Metadata
    """With the file's identity and checksums, unless another process has read it."""
    file: FileIO | None
    """What it was read from, and what serves the payload: another file may have taken over the path."""

    def __fspath__(self) -> str:
        return self.path

    def __str__(self) -> str:
        return self.path

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """As get_flashpack_file_metadata returns it. Made for callers: several objects for each tensor."""
        return self.native.to_dict()

    def fileno(self) -> int:
        """Raises ValueError once the file is closed."""
        assert self.file is not None
        return self.file.fileno()

    def entries(self) -> list[Entry]:
        """In file order."""
        return self.native.entries(Entry)

    def macroblocks(self) -> list[Entry]:
        """Each as if it were one tensor of one dim."""
        return self.native.macroblocks.entries(Entry)


@contextmanager
def open_footer(path: StrPath) -> Iterator[Footer]:
    """Reads and checks the footer, and keeps the file open until the end of the block, for its payload.

    Raises FlashPackError for a file that is not valid, OSError for the system's failures.
    """
    if isinstance(path, Footer):
        yield path  # Whoever opened it closes it.
        return
    with open_for_reading(path) as file:
        yield footer_of(file, os.fspath(path))


def open_for_reading(path: StrPath) -> FileIO:
    """For reading, by descriptor; not inherited by programs that are started. Raises OSError."""
    return FileIO(os.fspath(path), opener=open_descriptor)


def open_descriptor(path: StrPath, flags: int) -> int:
    """os.open() that never waits for a FIFO's writer, but for the holder of a write lease. Raises OSError."""
    try:
        return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)
    except BlockingIOError:  # Somebody has a write lease on it. Without O_NONBLOCK a regular file is waited for.
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            if stat.S_ISREG(os.fstat(place).st_mode):
                return os.open(f"/proc/self/fd/{place}", flags)
        except OSError as error:
            error.filename = os.fspath(path)
            raise
        finally:
            os.close(place)
        raise


def footer_of(file: FileIO, path: str) -> Footer:
    """The footer of an open file, which stays the caller's to close. Raises as open_footer does."""
    native = _native.read_footer(file.fileno(), path)
    for warning in native.warnings:
        logger.warning("%s: %s", path, warning)
    return Footer(path, native, file)


def get_flashpack_file_metadata(path: StrPath) -> dict[str, Any]:
    """The footer of a flashpack file, checked.

    Keys are normalised, whatever else the file has: `format`, `align_bytes`, `total_elems`, `index`, and `target_dtype`
    for one dtype or `macroblocks` and `total_payload_bytes` for several. Records of `index` count `offset` and `length`
    in elements. `metadata`: what was given to pack_to_file under that name, if anything was.

    Raises FlashPackError (a ValueError) naming the broken rule, OSError when the file cannot be read.
    """
    with open_footer(path) as footer:
        return footer.metadata


def is_flashpack_file(path: StrPath) -> bool:
    """Whether `path` can be read and has a valid footer. The payload is not looked at."""
    try:
        with open_for_reading(path) as file:
            _native.read_footer(file.fileno(), path)
    except (ValueError, OSError):
        return False
    return True
