"""Memory that the engine fills, on the host or a device, and the tensors that own it."""

from __future__ import annotations

import errno
import gc
import math
import mmap
import os
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, zip_longest
from typing import Any, NamedTuple, Protocol, get_args

import torch

from . import _native
from ._checkpoint import Checkpoint, Entry, File, Verify
from ._device import CPU, DeviceLike, Side, side_of, torch_device
from ._logging import logger
from ._native import FlashPackError
from ._progress import Show, progress_bar
from ._under_way import AT_ONCE, UnderWay
from .utils import string_to_dtype

_HUGE_PAGE_BYTES = 2 << 20
_SEGMENT_BYTES = _native.MAX_SEGMENT_BYTES
# Reads are cut into transfers of at least this size, so that blocks can be used as they arrive. With smaller ones their
# costs would add up, with larger ones the first block would come later.
_BATCH_BYTES = 64 << 20
# Only a transfer that reads a whole stripe can verify it.
STRIPE_BYTES = _native.STRIPE_BYTES
# Batches end at multiples of this in the file, where chunks of the engine up to that size end as well. A batch that
# ended within a chunk would cost one more operation.
_BATCH_BORDER_BYTES = 16 * STRIPE_BYTES
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
# Python has a name for this from 3.13 on; before, the number of x86, Arm and RISC-V stands in.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


class Block(Protocol):
    """Memory for bytes of a file, which is freed when the block and its last tensor are gone."""

    @property
    def address(self) -> int: ...

    @property
    def memory(self) -> torch.Tensor:
        """The whole block, as bytes."""
        ...

    @property
    def owner(self) -> object:
        """The object that the block and its tensors keep alive. The memory is freed with it."""
        ...

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...], offset_bytes: int) -> torch.Tensor:
        """Returns a tensor, which is not empty, over bytes of the block. It has a version counter of its own."""
        ...


class HostBlock:
    """Memory of the host. Each tensor has a storage of its own."""

    def __init__(self, buffer: _native.HostMemory | mmap.mmap, size_bytes: int) -> None:
        self._buffer = buffer
        self.size_bytes = size_bytes

    @property
    def address(self) -> int:
        return self.memory.data_ptr()

    @property
    def memory(self) -> torch.Tensor:
        return self.tensor(torch.uint8, (self.size_bytes,), 0)

    @property
    def owner(self) -> object:
        return self._buffer

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...], offset_bytes: int) -> torch.Tensor:
        buffer: Any = self._buffer  # The types of Python 3.11 cannot say that HostMemory has the buffer protocol.
        flat = torch.frombuffer(buffer, dtype=dtype, count=math.prod(shape), offset=offset_bytes)
        return flat if len(shape) == 1 else flat.view(shape).detach()


class MappedFile(HostBlock):
    """A mapping of a whole file. Tensors that the file has at no multiple of their element size are copies."""

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...], offset_bytes: int) -> torch.Tensor:
        mapped = super().tensor(dtype, shape, offset_bytes)
        return mapped.clone() if offset_bytes % dtype.itemsize else mapped


class DeviceBlock:
    """Memory of torch's allocator. All tensors share its storage."""

    def __init__(self, memory: torch.Tensor, without_elements: dict[torch.dtype, torch.Tensor]) -> None:
        """`without_elements`: where tensors of the device by dtype are kept, which blocks made together share."""
        self.memory = memory
        self._storage = memory.untyped_storage()
        self._without_elements = without_elements

    @property
    def address(self) -> int:
        return self.memory.data_ptr()

    @property
    def owner(self) -> object:
        return self._storage

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...], offset_bytes: int) -> torch.Tensor:
        empty: Any = self._without_elements.get(dtype)  # torch's stubs know set_ with strides alone.
        if empty is None:
            with torch.inference_mode(False):  # Others share it, and what is made of it.
                empty = self._without_elements[dtype] = torch.empty(0, dtype=dtype, device=self.memory.device)
        # `data` has a version counter of its own, which a view lacks, and takes less time than torch.empty.
        tensor: torch.Tensor = empty.data.set_(self._storage, offset_bytes // dtype.itemsize, shape)
        return tensor


def allocate_block(phase_bytes: int, size_bytes: int, device: torch.device = CPU) -> Block:
    """Allocates memory; on the host its address is `phase_bytes` modulo the page. Its contents are unspecified."""
    if device.type == "cpu":
        return _allocate_host(phase_bytes, size_bytes)
    return DeviceBlock(torch.empty(size_bytes, dtype=torch.uint8, device=device), {})


def allocate(plan: _native.SegmentPlan, device: torch.device, home: torch.device, usual_bytes: int = 0) -> list[Block]:
    """Allocates the blocks of a plan for `device` on `home`, which is the CPU if the engine cannot use the device.

    On the host, blocks of more than half of `usual_bytes`, up to that, get memory of one size.
    """
    if device.type == "cpu":
        return [_allocate_host(phase_bytes, size_bytes, usual_bytes) for size_bytes, phase_bytes in plan.blocks]
    shared: dict[torch.dtype, torch.Tensor] = {}
    sizes = (size_bytes for size_bytes, _ in plan.blocks)
    return [DeviceBlock(torch.empty(size_bytes, dtype=torch.uint8, device=home), shared) for size_bytes in sizes]


def _allocate_host(phase_bytes: int, size_bytes: int, usual_bytes: int = 0) -> HostBlock:
    """Allocates memory whose address is `phase_bytes` modulo a page, or a huge page if it has the size of one.

    The engine can read whole pages in place if that is the offset in the file.
    """
    room_bytes = size_bytes
    if usual_bytes // 2 < size_bytes <= usual_bytes:  # What is not used of it is never touched, and takes no pages.
        room_bytes = usual_bytes + _HUGE_PAGE_BYTES - phase_bytes % _HUGE_PAGE_BYTES
    return HostBlock(_native.HostMemory(room_bytes, phase_bytes), size_bytes)


def aligned_phase(offset_bytes: int, dtype: torch.dtype) -> int:
    """Returns the phase of memory for elements at `offset_bytes` of a file: that of the file, or 0 to align them."""
    return 0 if offset_bytes % dtype.itemsize else offset_bytes


def allocate_tensor(dtype: str, shape: Sequence[int], offset_bytes: int, device: torch.device) -> torch.Tensor:
    """Allocates a tensor of its own memory for bytes at `offset_bytes` of a file. Its values are unspecified."""
    torch_dtype = string_to_dtype(dtype)
    size_bytes = math.prod(shape) * torch_dtype.itemsize
    if size_bytes < _HUGE_PAGE_BYTES:  # The number of mappings of a process is limited.
        return torch.empty(tuple(shape), dtype=torch_dtype, device=device)
    phase_bytes = aligned_phase(offset_bytes, torch_dtype)
    return allocate_block(phase_bytes, size_bytes, device).tensor(torch_dtype, tuple(shape), 0)


def extent_bytes(tensor: torch.Tensor) -> int:
    """Returns the size of the memory from the first element to the end of the last one; 0 if there are none."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(last + 1) * tensor.element_size() if tensor.numel() else 0


def end_bytes(tensor: torch.Tensor) -> int:
    """Returns the place in the storage where the last element ends, which may be past its end; 0 if there are none."""
    return tensor.storage_offset() * tensor.element_size() + extent_bytes(tensor) if tensor.numel() else 0


def map_file(file: File) -> MappedFile:
    """Maps a whole file, privately and writable. If others truncate the file, touching the mapping is SIGBUS.

    The file may be larger than memory, because only pages that are written to take any of their own. Raises OSError
    with the file's name, also where the process has no descriptor left for the one that the mapping keeps.
    """
    if not file.is_unchanged():
        raise OSError(errno.ESTALE, "the file was changed", os.fspath(file.path))
    size_bytes = file.identity[2]
    # Otherwise the kernel would ask for room for a copy of every page.
    flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
    try:
        buffer = mmap.mmap(file.fd, size_bytes, flags, mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError as error:
        error.filename = os.fspath(file.path)
        raise
    return MappedFile(buffer, size_bytes)


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
        parts = batches_of(reads)
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


def batches_of(reads: Sequence[Read]) -> list[list[Read]]:
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


Arrivals = Generator[list[list[int]], None, None]
"""Yields, for each side, the numbers of the blocks that are whole now."""


def fill(
    checkpoint: Checkpoint,
    fillings: Sequence[Filling],
    options: ReadOptions,
    as_stream: bool = False,
    meanwhile: Callable[[], None] = lambda: None,
) -> Arrivals:
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


def add_stats(stats: dict[str, Any], more: dict[str, Any]) -> None:
    """Adds the statistics of a transfer to those of transfers that were started at the same time."""
    for name, value in more.items():
        if name == "seconds":
            value = max(value, stats.get(name, 0.0))
        elif type(value) is int:
            value += stats.get(name, 0)
        elif name == "fallback_reason" and (before := stats.get(name)):
            value = before if value in before else f"{before}; {value}"
        stats[name] = value or stats.get(name, value)


class Filled(NamedTuple):
    """Blocks with bytes of a file."""

    blocks: list[Block]
    places: tuple[list[int], list[int]]
    """For each wanted tensor the index of its block, and its offset there in bytes; without meaning for empty ones."""
    device: torch.device
    """The device that has the blocks."""
    stats: dict[str, Any] | None
    """Figures of this process's reads, if it read anything."""


def read_blocks(wanted: Wanted, device: torch.device, options: ReadOptions) -> Filled:
    """Reads `wanted` to `device`, or to the CPU if the engine cannot use it. A mapped file is one block for all."""
    if options.mmap:
        blocks: list[Block] = [map_file(file) for file in wanted.checkpoint.files()]
        places = [entry.file for entry in wanted.entries], [entry.offset_bytes for entry in wanted.entries]
        return Filled(blocks, places, CPU, None)
    filling = make_room(wanted, device, options)
    for _ in fill(wanted.checkpoint, [filling], options):
        pass
    return filled_of(filling)


def filled_of(filling: Filling) -> Filled:
    return Filled(filling.blocks, filling.plan.places, filling.side.device, filling.stats)


def make_room(wanted: Wanted, device: torch.device, options: ReadOptions, usual_bytes: int = 0) -> Filling:
    side = side_of(device, wanted.checkpoint.files()[0])
    plan = wanted.plan(device, options.verify)
    return Filling(plan, allocate(plan, device, side.device, usual_bytes), side)


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
                tensors.update(tensors_of(entries, filled_of(filling)))

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
    with collector_paused():
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
        number: blocks[number].memory.numpy().data
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
            view = blocks[-1].memory.numpy().data
        view[at : at + size_bytes] = sources[number][offsets[index] : offsets[index] + size_bytes]
        numbers[index], offsets[index] = len(blocks) - 1, at
        at += -(-size_bytes // _LINE_BYTES) * _LINE_BYTES
    return filled._replace(blocks=blocks, places=(numbers, offsets))


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pauses Python's cyclic garbage collector, which would look again and again at a million objects that are made."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def describe(stats: dict[str, Any]) -> str:
    rate = stats["requested_bytes"] / max(stats["seconds"], 1e-9) / 1e9
    text = (
        f"{stats['requested_bytes']} bytes in {stats['seconds']:.3f} s ({rate:.2f} GB/s), "
        f"{stats['direct_bytes']} direct, {stats['buffered_bytes']} through the page cache, "
        f"{stats['verified_bytes']} verified, backend {stats['backend']}"
    )
    if stats["profile"]:
        text += f", profile {stats['profile']}"
    return f"{text}; {stats['fallback_reason']}" if stats["fallback_reason"] else text
