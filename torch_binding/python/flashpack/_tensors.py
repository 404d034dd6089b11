"""Tensors of a checkpoint, read together into memory of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ._checkpoint import Checkpoint, Entry
from ._device import CPU
from ._memory import Block, HostBlock, allocate_block, map_file
from ._native import CollectorPause
from ._transfers import Filled, ReadOptions, Wanted, fill, make_room
from ._under_way import add_stats
from .utils import string_to_dtype

# Tensors that are smaller are moved out of their block. Larger ones keep little memory beside their own, for their
# size, and take longer to copy.
_SMALL_BYTES = 64 << 10
# Tensors stay in blocks that are smaller, because such a block is not much more than the memory that they would share.
_LARGE_BLOCK_BYTES = 4 << 20
# The tensors that are moved share blocks of this size: one of them keeps no more. Smaller blocks would be too many.
_SHARED_BYTES = 1 << 20
# The small tensors stay in a block of which they have more than an eighth, because the copy would take that part again
# of the time that a read from the page cache takes.
_FEW = 8
# Each small tensor begins on a line of the CPU's cache, so that threads that write to neighbours share none.
_LINE_BYTES = 64


def read_blocks(wanted: Wanted, device: torch.device, options: ReadOptions) -> Filled:
    """Reads `wanted` to `device`, or to the CPU if the engine cannot use it. A mapped file is one block for all."""
    if options.mmap:
        blocks: list[Block] = [map_file(file) for file in wanted.checkpoint.files()]
        places = [entry.file for entry in wanted.entries], [entry.offset_bytes for entry in wanted.entries]
        return Filled(blocks, places, CPU, None)
    filling = make_room(wanted, device, options)
    for _ in fill(wanted.checkpoint, [filling], options):
        pass
    return filling.filled()


ReadBlocks = Callable[[Wanted, torch.device, ReadOptions], Filled]
"""read_blocks, or a function that does the same in another way."""


def read_tensors(wanted: Wanted, device: torch.device, options: ReadOptions) -> dict[str, torch.Tensor]:
    """Reads `wanted` to `device`, or to the CPU if the engine cannot use the device."""
    return read_to_devices(wanted.checkpoint, {device: wanted.entries}, options)[0]


def read_to_devices(
    checkpoint: Checkpoint, wanted: Mapping[torch.device, Sequence[Entry]], options: ReadOptions
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Reads to all devices at the same time what is wanted there, or to the CPU if the engine cannot use a device.

    Returns the tensors by name and figures of the reads, which are empty if files are mapped.
    """
    tensors: dict[str, torch.Tensor] = {}
    stats: dict[str, Any] = {}
    if options.mmap:
        everything = Wanted(checkpoint, [entry for entries in wanted.values() for entry in entries])
        return tensors_of(everything.entries, read_blocks(everything, CPU, options)), stats
    fillings = [make_room(Wanted(checkpoint, entries), device, options) for device, entries in wanted.items()]

    def make_tensors(on_host: bool) -> None:
        for entries, filling in zip(wanted.values(), fillings, strict=True):
            if (filling.side.device == CPU) == on_host:
                tensors.update(tensors_of(entries, filling.filled()))

    # To make many tensors takes as long as to read them. On the host, small ones are copied, and so have to be there.
    for _ in fill(checkpoint, fillings, options, meanwhile=partial(make_tensors, on_host=False)):
        pass
    make_tensors(on_host=True)
    for filling in fillings:
        add_stats(stats, filling.stats)
    return tensors, stats


def tensors_of(entries: Sequence[Entry], filled: Filled) -> dict[str, torch.Tensor]:
    """Returns the tensors of `entries`, which are those that were wanted. No two share bytes."""
    tensors: dict[str, torch.Tensor] = {}
    filled = small_ones_apart(entries, filled)
    make = [block.tensor for block in filled.blocks]
    dtypes = {name: string_to_dtype(name) for name in {entry.dtype for entry in entries}}
    with CollectorPause():
        for (name, dtype, shape, _, size_bytes, _, _), block, at in zip(entries, *filled.places, strict=True):
            if size_bytes:
                tensors[name] = make[block](dtypes[dtype], shape, at)
            else:
                tensors[name] = torch.empty(shape, dtype=dtypes[dtype], device=filled.device)
    return tensors


def small_ones_apart(entries: Sequence[Entry], filled: Filled) -> Filled:
    """Moves small tensors out of the large blocks of the host, so that one that outlives the rest keeps little memory.

    Their blocks come after those that there were. Where more than a few bytes of a block belong to small tensors, they
    stay, because the copy would take its time.
    """
    small_bytes = {
        number: 0
        for number, block in enumerate(filled.blocks)
        if type(block) is HostBlock and block.size_bytes >= _LARGE_BLOCK_BYTES
    }
    for entry, number in zip(entries, filled.places[0], strict=True):
        if entry.size_bytes < _SMALL_BYTES and number in small_bytes:
            small_bytes[number] += -(-entry.size_bytes // _LINE_BYTES) * _LINE_BYTES
    blocks, numbers, offsets = list(filled.blocks), *map(list, filled.places)
    sources = {
        number: memoryview(blocks[number].owner)  # type: ignore[arg-type]
        for number, count in small_bytes.items()
        if 0 < count * _FEW <= blocks[number].memory.numel()
    }
    if not sources:
        return filled
    shared_bytes = min(_SHARED_BYTES, sum(small_bytes[number] for number in sources))
    at = end = 0
    for index, (entry, number) in enumerate(zip(entries, filled.places[0], strict=True)):
        size_bytes = entry.size_bytes
        if not 0 < size_bytes < _SMALL_BYTES or number not in sources:
            continue
        if at + size_bytes > end:
            at, end = 0, shared_bytes
            blocks.append(allocate_block(0, end))
            view = memoryview(blocks[-1].owner)  # type: ignore[arg-type]
        view[at : at + size_bytes] = sources[number][offsets[index] : offsets[index] + size_bytes]
        numbers[index], offsets[index] = len(blocks) - 1, at
        at += -(-size_bytes // _LINE_BYTES) * _LINE_BYTES
    return filled._replace(blocks=blocks, places=(numbers, offsets))
