"""The payload of a file as it is in the file: one flat tensor per macroblock, and views of these."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ._checkpoint import Checkpoint
from ._listing import human_bytes
from ._native import FlashPackError
from ._options import Filters
from ._tensors import ReadBlocks, read_blocks, tensors_of
from ._transfers import ReadOptions, Wanted
from .constants import FILE_FORMAT_V3


@dataclass(repr=False)
class FlashTensorStorage:
    """The payload of a file: one flat tensor per macroblock."""

    blocks: list[torch.Tensor]
    backing_arrays: list[Any] | None = None
    """None, because blocks own their memory."""
    stats: dict[str, Any] | None = None
    """Figures of the reads: bytes by route, operations, seconds, backend and, if that is a slower one, the reason."""

    def __repr__(self) -> str:
        size = human_bytes(sum(block.nbytes for block in self.blocks))
        return f"FlashTensorStorage({len(self)} {'block' if len(self) == 1 else 'blocks'}, {size}, on {self.device})"

    def block(self, idx: int) -> torch.Tensor:
        return self.blocks[idx]

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        return self.blocks[0].device if self.blocks else torch.device("cpu")


def iterate_from_flash_tensor(
    flash_tensor: FlashTensorStorage | torch.Tensor,
    metadata: dict[str, Any],
    ignore_names: Collection[str] | None = None,
    ignore_prefixes: Collection[str] | None = None,
    ignore_suffixes: Collection[str] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, view of its block) for every tensor of `metadata` that is not ignored, in file order.

    Nothing in `metadata` is trusted. Raises FlashPackError naming the record that does not fit its block.
    """
    storage = flash_tensor if isinstance(flash_tensor, FlashTensorStorage) else FlashTensorStorage([flash_tensor])
    index = _index_of(metadata)
    _check_alignment(storage, index, metadata.get("align_bytes", 0))
    filters = Filters.of(ignore_names, ignore_prefixes, ignore_suffixes)
    for record in index:
        if not filters.ignore(record["name"]):
            yield record["name"], view(storage, record)


def accepted(metadata: dict[str, Any] | None, checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns `metadata`, checked against the file, or else the file's footer, with a macroblock for every record."""
    if metadata is not None and not _describes(metadata, checkpoint):
        raise FlashPackError(f"{checkpoint}: the metadata given is not that of this file")
    result = checkpoint.metadata if metadata is None else metadata
    for record in _index_of(result):
        record.setdefault("macroblock", 0)
    return result


def read_storage(
    checkpoint: Checkpoint, device: torch.device, options: ReadOptions, read: ReadBlocks = read_blocks
) -> FlashTensorStorage:
    blocks_apart = checkpoint.macroblocks()
    macroblocks = blocks_apart.entries()
    with torch.inference_mode(False), torch.no_grad():
        filled = read(Wanted(blocks_apart, macroblocks), device, options)
        blocks = [block.to(device) for block in tensors_of(macroblocks, filled).values()]
    return FlashTensorStorage(blocks, stats=filled.stats)


def _describes(metadata: dict[str, Any], checkpoint: Checkpoint) -> bool:
    ours = [(each.dtype, each.offset_bytes, each.elems) for each in checkpoint.macroblocks().entries()]
    try:
        if metadata.get("format") == FILE_FORMAT_V3:
            return [(metadata["target_dtype"], 0, metadata["total_elems"])] == ours
        blocks = metadata["macroblocks"]
        return [(block["dtype"], block["offset_bytes"], block["length_elems"]) for block in blocks] == ours
    except (KeyError, TypeError, ValueError, AttributeError):
        return False


def _index_of(metadata: Any) -> list[dict[str, Any]]:
    """Returns the records of `metadata`. Raises FlashPackError unless each is an object with a name."""
    index = metadata.get("index") if isinstance(metadata, dict) else None
    if not isinstance(index, list):
        raise FlashPackError("the metadata has no list 'index'")
    for record in index:
        if not isinstance(record, dict) or not isinstance(record.get("name"), str):
            raise FlashPackError(f"Could not get tensor for record {record!r}: it is no object with a name")
    return index


def _block_of(storage: FlashTensorStorage, record: dict[str, Any]) -> torch.Tensor:
    which = record.get("macroblock")
    which = 0 if which is None else which
    if type(which) is not int or not 0 <= which < len(storage):
        raise FlashPackError(f"Index entry references macroblock {which}, but only {len(storage)} blocks exist.")
    return storage.block(which)


def _is_count(number: Any) -> bool:
    return type(number) is int and number >= 0


def _check_alignment(storage: FlashTensorStorage, index: list[dict[str, Any]], align_bytes: int) -> None:
    if not _is_count(align_bytes):
        raise FlashPackError(f"align_bytes must be >= 0, got {align_bytes!r}")
    misaligned = []
    for record in index if align_bytes else ():
        align_elems = align_bytes // math.gcd(align_bytes, _block_of(storage, record).element_size())
        offset: Any = record.get("offset")
        if not _is_count(offset) or offset % align_elems:
            misaligned.append(repr(record["name"]))
    if misaligned:
        raise FlashPackError(f"{len(misaligned)} index entries are misaligned (e.g., {', '.join(misaligned[:3])}).")


def view(storage: FlashTensorStorage, record: dict[str, Any]) -> torch.Tensor:
    block = _block_of(storage, record)
    fields: tuple[Any, Any, Any] = (record.get("offset"), record.get("length"), record.get("shape"))
    offset, length, shape = fields
    if (
        not isinstance(shape, (list, tuple))
        or not all(map(_is_count, (offset, length, *shape)))
        or math.prod(shape) != length
        or offset + length > block.numel()
    ):
        raise FlashPackError(f"Could not get tensor for record {record}: it does not fit {block.numel()} elements")
    return block.narrow(0, offset, length).view(tuple(shape))
