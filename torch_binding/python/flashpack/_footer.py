"""The footer of a file: its tensors, metadata and checksums. Needs no torch."""

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
from ._native import FlashPackError

StrPath = str | os.PathLike[str]
Verify = Literal["auto", "always", "never"]
"""Which bytes of a load are verified by the checksums of the file.

"auto": all stripes of 1 MiB that are read whole, if the file has checksums; of a load of a whole file, these are all.
"always": all bytes, and a file without checksums is an error. "never": none.
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
    """Its index among all tensors of the file."""

    @property
    def elems(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class Footer:
    """A checked footer and the file it came from.

    It may be passed on as the path of its file: functions then read from the file that is open already.
    """

    path: str
    native: _native.Metadata
    """Has the file's identity and checksums, unless another process has read the footer."""
    file: FileIO | None
    """Open for the payload, because another file may be at the path by now; None if another process has read it."""

    def __fspath__(self) -> str:
        return self.path

    def __str__(self) -> str:
        return self.path

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """As get_flashpack_file_metadata returns it. It is made only if it is asked for, because it is large."""
        self.check_is_flashpack()
        return self.native.to_dict()

    def fileno(self) -> int:
        """Raises ValueError once the file is closed."""
        assert self.file is not None
        return self.file.fileno()

    def entries(self) -> list[Entry]:
        """Returns the tensors in file order."""
        return self.native.entries(Entry)

    def macroblocks(self) -> list[Entry]:
        """Returns each macroblock as if it were one tensor of one dim."""
        self.check_is_flashpack()
        return self.native.macroblocks.entries(Entry)

    def check_is_flashpack(self) -> None:
        """Raises FlashPackError for a file of another format."""
        if self.native.format != "flashpack":
            raise FlashPackError(
                f"{self.path} is a {self.native.format} file, which has no flashpack footer and no macroblocks: "
                f"load_file, open_file and assign_from_file take it"
            )


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
    """Opens a file for reading. Programs that are started do not inherit it. Raises OSError."""
    return FileIO(os.fspath(path), opener=open_descriptor)


def open_descriptor(path: StrPath, flags: int) -> int:
    """Does os.open(), but waits only for the holder of a write lease, never for a FIFO's writer. Raises OSError."""
    try:
        return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)
    except BlockingIOError:  # Another process has a write lease. Without O_NONBLOCK, open() waits until it is given up.
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
    """Returns the footer of an open file, which the caller has to close. Raises as open_footer does."""
    native = _native.read_footer(file.fileno(), path)
    for warning in native.warnings:
        logger.warning("%s: %s", path, warning)
    return Footer(path, native, file)


def get_flashpack_file_metadata(path: StrPath) -> dict[str, Any]:
    """Returns the checked footer of a flashpack file; other checkpoints have none.

    Keys are normalised, whatever else the file has: `format`, `align_bytes`, `total_elems`, `index`, and `target_dtype`
    for one dtype or `macroblocks` and `total_payload_bytes` for several. Records of `index` count `offset` and `length`
    in elements. `metadata`: the text that pack_to_file was given under that name, if any.

    Raises FlashPackError (a ValueError) naming the broken rule, OSError when the file cannot be read.
    """
    with open_footer(path) as footer:
        return footer.metadata


def is_flashpack_file(path: StrPath) -> bool:
    """Whether `path` can be read and has a valid flashpack footer. The payload is not read."""
    try:
        with open_for_reading(path) as file:
            return _native.read_footer(file.fileno(), path).format == "flashpack"
    except (ValueError, OSError):
        return False
