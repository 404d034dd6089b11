"""Checkpoints: the files, and the tensors in them. Needs no torch."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from . import _native
from ._logging import logger
from ._paths import StrPath, path_of, paths_of

Verify = Literal["auto", "always", "never"]
"""The bytes of a load that are verified by the checksums of the file.

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
    """Its index among all tensors of the checkpoint."""
    file: int
    """The index of its file."""

    @property
    def elems(self) -> int:
        return math.prod(self.shape)


class File(NamedTuple):
    """One file of a checkpoint."""

    path: Path
    fd: int
    identity: tuple[int, int, int, int]
    """Device, inode, size in bytes, mtime in nanoseconds."""
    format: str
    """"flashpack" or "safetensors"."""
    has_checksums: bool
    payload_begin: int
    """The place in the file that offsets in its footer or header are counted from, in bytes."""

    def is_unchanged(self) -> bool:
        """Whether the file still has the identity that it had when its metadata was read."""
        return _native.identity_of(self.fd, os.fspath(self.path)) == self.identity


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The tensors of one or several files, whose metadata has been checked.

    It may be passed on as the path that it was opened by: functions then read from the files that are open already.
    """

    path: str
    native: _native.Checkpoint
    """Has the open files, unless another process has opened them."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Names that tensors get in place of those in the files, by the latter."""

    def __fspath__(self) -> str:
        return self.path

    def __str__(self) -> str:
        return self.path

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """As get_flashpack_file_metadata returns it. It is made only if it is asked for, because it is large."""
        return self.native.to_dict()

    def files(self) -> list[File]:
        return [File(*each) for each in self.native.files]

    def entries(self) -> list[Entry]:
        """Returns the tensors, file by file, and in file order."""
        entries = self.native.entries(Entry)
        if not self.names:
            return entries
        return [entry._replace(name=self.names.get(entry.name, entry.name)) for entry in entries]

    def renamed(self, names: Mapping[str, str]) -> Checkpoint:
        """Returns this checkpoint, with other names for its tensors. It is closed with this one."""
        return replace(self, names=names)

    def macroblocks(self) -> Checkpoint:
        """Returns this checkpoint, which is one flashpack file, with a tensor of one dim for each macroblock."""
        return Checkpoint(self.path, self.native.macroblocks)


@contextmanager
def open_checkpoint(path: StrPath | Sequence[StrPath]) -> Iterator[Checkpoint]:
    """Opens a checkpoint until the end of the block.

    `path`: a flashpack or safetensors file, an index of several of them, a directory, or a list of files.

    Raises FlashPackError for files that are not valid, OSError for the system's failures.
    """
    if isinstance(path, Checkpoint):
        yield path  # Whoever opened it closes it.
        return
    checkpoint = opened_checkpoint(path)
    try:
        yield checkpoint
    finally:
        checkpoint.native.close()


def opened_checkpoint(path: StrPath | Sequence[StrPath]) -> Checkpoint:
    """Returns a checkpoint that the caller has to close. Raises as open_checkpoint does."""
    paths = paths_of(path)
    text = path_of(path) if paths is None else ", ".join(paths)
    checkpoint = Checkpoint(text, _native.open_checkpoint(text) if paths is None else _native.open_files(paths))
    for file, warning in checkpoint.native.warnings:
        logger.warning("%s: %s", file, warning)
    return checkpoint


def get_flashpack_file_metadata(path: StrPath) -> dict[str, Any]:
    """Returns the checked footer of a flashpack file; other checkpoints have none.

    Keys are normalised, whatever else the file has: `format`, `align_bytes`, `total_elems`, `index`, and `target_dtype`
    for one dtype or `macroblocks` and `total_payload_bytes` for several. Records of `index` count `offset` and `length`
    in elements. `metadata`: the text that pack_to_file was given under that name, if any.

    Raises FlashPackError (a ValueError) naming the broken rule, OSError when the file cannot be read.
    """
    with open_checkpoint(path) as checkpoint:
        return checkpoint.metadata


def is_flashpack_file(path: StrPath) -> bool:
    """Whether `path` can be read and has a valid flashpack footer. The payload is not read."""
    try:
        with open_checkpoint(path) as checkpoint:
            return [(file.path, file.format) for file in checkpoint.files()] == [(Path(path_of(path)), "flashpack")]
    except (ValueError, OSError):
        return False
