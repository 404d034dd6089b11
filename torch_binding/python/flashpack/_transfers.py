"""Filling blocks of memory with bytes of a checkpoint: what is read, and by which transfers."""

from __future__ import annotations

import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from typing import Any, NamedTuple, get_args

import torch

from . import _native
from ._checkpoint import Checkpoint, Entry, Verify
from ._device import DeviceLike, Side, side_of, torch_device
from ._logging import logger
from ._memory import Block, allocate
from ._native import FlashPackError
from ._progress import Show, progress_bar
from ._under_way import AT_ONCE, UnderWay, add_stats, describe

_SEGMENT_BYTES = _native.MAX_SEGMENT_BYTES
# Reads are cut into transfers of at least this size, so that blocks can be used as they arrive. With smaller ones their
# costs would add up, with larger ones the first block would come later.
_BATCH_BYTES = 64 << 20
# Batches end at multiples of this in the file, where chunks of the engine up to that size end as well. A batch that
# ended within a chunk would cost one more operation.
_BATCH_BORDER_BYTES = 16 * _native.STRIPE_BYTES


class ReadOptions(NamedTuple):
    """Options for reading a file."""

    mmap: bool = False
    verify: Verify = "auto"
    show: Show = False


def supported_device(device: DeviceLike, options: ReadOptions) -> torch.device:
    """Returns torch's device. Raises FlashPackError if `options` are not valid or cannot read to that device."""
    if options.verify not in get_args(Verify):
        raise FlashPackError(f"verify must be auto, always or never, got {options.verify!r}")
    target = torch_device(device, f"Unsupported device: {device!r}")
    if options.mmap and options.verify == "always":
        raise FlashPackError("with mmap=True nothing is read, so there is nothing to verify")
    if target.type not in (("cpu",) if options.mmap else ("cpu", "cuda")):
        raise FlashPackError(f"Unsupported device: {target}{' with mmap=True' if options.mmap else ''}")
    return target


class Wanted(NamedTuple):
    """The tensors to read from a checkpoint, some of those that it has."""

    checkpoint: Checkpoint
    entries: Sequence[Entry]

    def plan(self, device: torch.device, verify: Verify) -> _native.SegmentPlan:
        indices = [entry.number for entry in self.entries]
        return self.checkpoint.native.plan(indices, device.type != "cpu", verify, _SEGMENT_BYTES)


Read = tuple[int, int, int, int]
"""Index of the file, offset in it, size in bytes, address in memory."""


class _Batch(NamedTuple):
    """The reads of one transfer of a stream."""

    reads: list[Read]
    whole: list[int]
    """The numbers of the blocks that have all their bytes when this transfer is done."""


class Filled(NamedTuple):
    """Blocks with bytes of a file."""

    blocks: list[Block]
    places: tuple[list[int], list[int]]
    """For each wanted tensor the index of its block, and its offset there in bytes; without meaning for empty ones."""
    device: torch.device
    """The device that has the blocks."""
    stats: dict[str, Any] | None
    """Figures of this process's reads, if it read anything."""


@dataclass
class Filling:
    """Blocks of one side that are to be filled with bytes of a file."""

    plan: _native.SegmentPlan
    blocks: list[Block]
    side: Side
    stats: dict[str, Any] = field(default_factory=dict)
    """Figures of the reads, when all of them are done."""

    def batches(self, as_stream: bool) -> list[_Batch]:
        """Returns one batch for all, or several for a stream."""
        addresses = [block.address for block in self.blocks]
        reads = self.plan.reads(addresses)
        if not as_stream:
            return [_Batch(reads, list(range(len(addresses))))]
        parts = _batches_of(reads)
        by_address = sorted(range(len(addresses)), key=addresses.__getitem__)
        starts = [addresses[number] for number in by_address]
        last = {
            by_address[bisect_right(starts, address) - 1]: part
            for part, reads in enumerate(parts)
            for *_, address in reads
        }
        batches = [_Batch(reads, []) for reads in parts]
        for number, part in last.items():
            batches[part].whole.append(number)
        return batches

    def filled(self) -> Filled:
        """Returns the blocks when all reads are done."""
        return Filled(self.blocks, self.plan.places, self.side.device, self.stats)


def make_room(wanted: Wanted, device: torch.device, options: ReadOptions, usual_bytes: int = 0) -> Filling:
    side = side_of(device, wanted.checkpoint.files()[0])
    plan = wanted.plan(device, options.verify)
    return Filling(plan, allocate(plan, device, side.device, usual_bytes), side)


def _batches_of(reads: Sequence[Read]) -> list[list[Read]]:
    """Cuts reads, which ascend in each file, into lists for one transfer each.

    A transfer has at least _BATCH_BYTES, if there are so many left, and ends where chunks begin in every file. Else a
    stripe could be read half by one transfer and half by the next, and neither could verify it.
    """
    batches: list[list[Read]] = [[]]
    size_bytes, border, last_file = 0, sys.maxsize, 0
    for file, offset, size, address in reads:
        head = min(size, max(0, border - offset)) if file == last_file else 0 if border < sys.maxsize else size
        if head:
            batches[-1].append((file, offset, head, address))
        size_bytes += head
        if head < size:
            batches.append([(file, offset + head, size - head, address + head)])
            size_bytes, border = size - head, sys.maxsize
        if size_bytes >= _BATCH_BYTES and border == sys.maxsize:
            border = offset + size + -(offset + size) % _BATCH_BORDER_BYTES
        last_file = file
    return batches


_Arrivals = Generator[list[list[int]], None, None]
"""Yields, for each side, the numbers of the blocks that are whole now."""


def fill(
    checkpoint: Checkpoint,
    fillings: Sequence[Filling],
    options: ReadOptions,
    as_stream: bool = False,
    meanwhile: Callable[[], None] = lambda: None,
) -> _Arrivals:
    """Reads the blocks of all sides at the same time, and yields their numbers as they arrive.

    By default they arrive together, because one transfer for each side costs least. `as_stream` reads in batches. Only
    a few of them are under way at a time, because each takes descriptors and a copy of the checksums. `meanwhile` is
    called once, while the first of them are under way.

    When a step raises, be it OSError or KeyboardInterrupt, or the iterator is closed, nothing is in flight any more.
    """
    rows = list(zip_longest(*(filling.batches(as_stream) for filling in fillings), fillvalue=_Batch([], [])))
    total_bytes = sum(size_bytes for row in rows for batch in row for _, _, size_bytes, _ in batch.reads)
    to_start = iter(rows)
    begin = time.monotonic()
    with progress_bar("Loading", total_bytes, options.show) as progress, UnderWay[tuple[_Batch, ...]]() as under_way:
        for row_number in range(len(rows)):
            for row in islice(to_start, AT_ONCE - len(under_way)):
                loads = (start(checkpoint, *each, options) for each in zip(row, fillings, strict=True))
                under_way.start(row, loads)
            if row_number == 0:
                meanwhile()
            row, stats = under_way.finish(progress)
            for filling, each_stats in zip(fillings, stats, strict=True):
                add_stats(filling.stats, each_stats)
                if as_stream:
                    filling.stats["seconds"] = time.monotonic() - begin
            yield [batch.whole for batch in row]
    for filling in fillings:
        logger.info("%s: %s", checkpoint, describe(filling.stats))


def start(checkpoint: Checkpoint, batch: _Batch, filling: Filling, options: ReadOptions) -> _native.Load:
    side = filling.side
    return side.engine.start_load(checkpoint.native, batch.reads, filling.blocks, options.verify, stream=side.stream)
