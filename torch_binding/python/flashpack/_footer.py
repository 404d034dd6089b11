"""What a file says about itself. Needs no torch."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from . import _native
from .constants import FILE_FORMAT_V3

StrPath = str | os.PathLike[str]
Verify = Literal["auto", "always", "never"]
"""Whether a load is held against the checksums of its file.

"auto": what is read in whole pieces of 1 MiB, which is all of a file and most of a part of it, if the file has
checksums. "always": all of it, and a file without checksums is an error. "never": nothing is.
"""
logger = logging.getLogger("flashpack")


class Block(NamedTuple):
    """A macroblock: a run of elements of one dtype."""

    dtype: str
    offset_bytes: int
    length_bytes: int
    length_elems: int


class Entry(NamedTuple):
    """One tensor of a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    """In the file."""
    length_elems: int
    size_bytes: int
    macroblock: int
    offset_elems: int
    """In its macroblock."""


class Footer(NamedTuple):
    """A checked footer and the file it came from."""

    path: str
    metadata: dict[str, Any]
    native: _native.Metadata | None
    """The same for the engine, with the file's identity and checksums; None for one that another process has read."""

    def blocks(self) -> list[Block]:
        return blocks_of(self.metadata)

    def payload_bytes(self) -> int:
        return max((block.offset_bytes + block.length_bytes for block in self.blocks()), default=0)

    def entries(self) -> Iterator[Entry]:
        """In file order."""
        blocks = self.blocks()
        widths = [_native.element_bytes(block.dtype) for block in blocks]
        for record in self.metadata["index"]:
            which = record.get("macroblock", 0)
            block, width = blocks[which], widths[which]
            yield Entry(
                name=record["name"],
                dtype=block.dtype,
                shape=tuple(record["shape"]),
                offset_bytes=block.offset_bytes + record["offset"] * width,
                length_elems=record["length"],
                size_bytes=record["length"] * width,
                macroblock=which,
                offset_elems=record["offset"],
            )


def blocks_of(metadata: dict[str, Any]) -> list[Block]:
    """The macroblocks of a footer; a file of one dtype has one, which is all of its payload."""
    if metadata.get("format") == FILE_FORMAT_V3:
        dtype, elems = metadata["target_dtype"], metadata["total_elems"]
        return [Block(dtype, 0, elems * _native.element_bytes(dtype), elems)]
    return [Block(**{key: block.get(key) for key in Block._fields}) for block in metadata.get("macroblocks") or ()]


def read_footer(path: StrPath) -> Footer:
    """Reads and checks the footer. Raises FlashPackError for a file that is not valid, OSError for the system's."""
    native = _native.read_footer(path)
    for warning in native.warnings:
        logger.warning("%s: %s", path, warning)
    return Footer(os.fspath(path), native.to_dict(), native)


def get_flashpack_file_metadata(path: StrPath) -> dict[str, Any]:
    """The footer of a flashpack file, checked.

    Keys are normalised, whatever else the file has: `format`, `align_bytes`, `total_elems`, `index`, and `target_dtype`
    for one dtype or `macroblocks` and `total_payload_bytes` for several. Records of `index` count `offset` and `length`
    in elements. `metadata`: what was given to pack_to_file under that name, if anything was.

    Raises FlashPackError (a ValueError) naming the broken rule, OSError when the file cannot be read.
    """
    return read_footer(path).metadata


def is_flashpack_file(path: StrPath) -> bool:
    """Whether `path` can be read and has a valid footer. The payload is not looked at."""
    try:
        _native.read_footer(path)
    except (ValueError, OSError):
        return False
    return True
