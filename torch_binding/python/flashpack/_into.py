"""Reading into the memory of tensors, and casting while reading.

Bytes that a tensor's memory can take as they are go straight there. All others go through a few windows, which are used
again and again, so that no load holds a second copy of what it reads.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from typing import Any, NamedTuple

import torch

from . import _native
from ._checkpoint import Checkpoint, Entry
from ._device import CPU, Side, side_of
from ._logging import logger
from ._memory import Block, allocate_block
from ._native import CollectorPause
from ._progress import progress_bar
from ._tensors import tensors_of
from ._transfers import Read, ReadOptions, Wanted, make_room
from ._under_way import UnderWay, add_stats, describe
from .utils import string_to_dtype

# Two windows are read while the third is emptied. There are fewer than a stream has loads, because a window is emptied
# at once, while those of a stream wait for their consumer.
_WINDOWS = 3
# A transfer ends at the first border behind so many bytes of its window. All windows together and the engine's staging
# are the memory that a load takes beside its tensors; with smaller windows the disk would wait between transfers.
_FULL_BYTES = 12 << 20
# Borders are multiples of this in the file. They are closer than those of batches, because each window has room for all
# that may come before the next one.
_STEP_BORDER_BYTES = 4 * _native.STRIPE_BYTES
# Parts of a window of this size lie in memory as they do in pages of the file, so that the engine can read them in
# place, which it does if they are large or nothing near them is wanted. The gaps that this makes in the window are less
# than a sixteenth of these parts. They would be more of smaller parts, and less in place if only larger ones lay so.
_PAGES_BYTES = 64 << 10
_PAGE_BYTES = 4096
# Smaller parts have the phase of the file modulo this, so that elements stay aligned: no dtype has larger ones.
_ELEMENT_BYTES = 16
# Tensors that keep their dtype are read straight into new memory from this size on, and copied below.
_LARGE_BYTES = 2 << 20
# Smaller memory comes from torch's allocator, because huge pages would be filled in part only.
_BLOCK_BYTES = 32 << 20


class Target(NamedTuple):
    """The place that the values of an entry go to, and the dtype that they get there."""

    entry: Entry
    device: torch.device
    dtype: torch.dtype
    memory: torch.Tensor | None = None
    """The tensor that gets the values; it is on `device` and has `dtype`. Without it, a new one is made."""

    def address(self, device: torch.device) -> int | None:
        """Returns where the engine of `device` can put the bytes of the entry as they are, if there is such memory."""
        memory = self.memory
        if memory is None or self.device != device or self.dtype != string_to_dtype(self.entry.dtype):
            return None
        return memory.data_ptr() if memory.is_contiguous() and not (memory.is_conj() or memory.is_neg()) else None


class _Piece(NamedTuple):
    """Bytes of a file that lie one after the other in memory."""

    file: int
    offset_bytes: int
    size_bytes: int
    address: int | None = None
    """The memory that they go to; without it they go to a window."""


@dataclass
class _Step:
    """The reads of one transfer."""

    straight: list[Read] = field(default_factory=list)
    windowed: list[Read] = field(default_factory=list)
    """With a place in the window instead of an address."""
    window_bytes: int = 0
    cell: tuple[int, int] = (-1, -1)
    """The file, and the number of borders before the last byte that is read."""

    def reads(self, window_address: int) -> list[Read]:
        moved = [(file, offset, size, window_address + at) for file, offset, size, at in self.windowed]
        return sorted(self.straight + moved) if self.straight and moved else self.straight or moved

    def add(self, piece: _Piece, begin: int, end: int) -> None:
        """Adds the bytes from `begin` to `end` of a piece."""
        file, offset, size_bytes = piece.file, piece.offset_bytes + begin, end - begin
        self.cell = (file, (offset + size_bytes - 1) // _STEP_BORDER_BYTES)
        if piece.address is not None:
            self.straight.append((file, offset, size_bytes, piece.address + begin))
            return
        last = self.windowed[-1] if self.windowed else None
        if last is not None and (file, offset) == (last[0], last[1] + last[2]):
            self.windowed[-1] = (file, last[1], last[2] + size_bytes, last[3])
        else:
            phase = _PAGE_BYTES if last is None or size_bytes >= _PAGES_BYTES else _ELEMENT_BYTES
            self.window_bytes += (offset - self.window_bytes) % phase
            self.windowed.append((file, offset, size_bytes, self.window_bytes))
        self.window_bytes += size_bytes


def _steps_of(pieces: Iterable[_Piece]) -> Iterator[_Step]:
    step = _Step()
    for piece in pieces:
        begin = 0
        while begin < piece.size_bytes:
            offset = piece.offset_bytes + begin
            is_full = step.window_bytes >= _FULL_BYTES
            if is_full and step.cell != (piece.file, offset // _STEP_BORDER_BYTES):
                yield step
                step, is_full = _Step(), False
            end = piece.size_bytes
            if piece.address is None or is_full:
                end = min(end, begin + _STEP_BORDER_BYTES - offset % _STEP_BORDER_BYTES)
            step.add(piece, begin, end)
            begin = end
    if step.straight or step.windowed:
        yield step


class _Run:
    """The transfers to one device."""

    def __init__(self, checkpoint: Checkpoint, targets: Sequence[Target], side: Side, options: ReadOptions) -> None:
        self.side = side
        self._checkpoint = checkpoint
        self._verify = options.verify
        targets = sorted(targets, key=lambda target: (target.entry.file, target.entry.offset_bytes))
        self._targets = targets
        self._straight: list[Read] = []
        self._waiting: deque[Target] = deque()
        """Targets whose last bytes have not come out of a window."""
        for target in targets:
            entry, address = target.entry, target.address(side.device)
            if address is None:
                self._waiting.append(target)
            else:
                self._straight.append((entry.file, entry.offset_bytes, entry.size_bytes, address))
        plan = Wanted(checkpoint, [target.entry for target in targets]).plan(CPU, options.verify)
        self._ranges = plan.reads([0] * len(plan.blocks))
        self.total_bytes = sum(size_bytes for _, _, size_bytes, _ in self._ranges)
        self._windows: list[Block | None] = [None] * _WINDOWS
        self._remainder = torch.empty(0, dtype=torch.uint8, device=side.device)
        """The first bytes of an element whose last ones are read by the next transfer."""

    def steps(self) -> Iterator[_Step]:
        return _steps_of(self._pieces())

    def _pieces(self) -> Iterator[_Piece]:
        """Yields all that is read, in the order of files."""
        straight = deque(self._straight)
        # Tensors of an earlier load are neighbours in memory, too, and one read for many costs less. On a device,
        # neighbours may be allocations of their own, over which no copy may go.
        joins = self.side.device == CPU
        for file, at, size_bytes, _ in self._ranges:
            end = at + size_bytes
            while straight and straight[0][0] == file and straight[0][1] < end:
                _, begin, size_bytes, address = straight.popleft()
                if at < begin:
                    yield _Piece(file, at, begin - at)
                at, shift = begin + size_bytes, address - begin
                while joins and straight and at < end:
                    if straight[0][:2] != (file, at) or straight[0][3] != at + shift:
                        break
                    at += straight.popleft()[2]
                yield _Piece(file, begin, at - begin, address)
            if at < end:
                yield _Piece(file, at, end - at)

    def start(self, step: _Step, number: int) -> _native.Load:
        """Starts a transfer that uses the window of that number."""
        window = self._windows[number]
        if step.windowed and (window is None or window.memory.numel() < step.window_bytes):
            size_bytes = max(step.window_bytes, min(self.total_bytes, _FULL_BYTES + _STEP_BORDER_BYTES))
            window = self._windows[number] = allocate_block(0, size_bytes, self.side.device)
        with CollectorPause():
            reads = step.reads(0 if window is None else window.address)
        engine, stream = self.side.engine, self.side.stream
        return engine.start_load(self._checkpoint.native, reads, (window, self._targets), self._verify, stream=stream)

    def empty_window(self, step: _Step, number: int, tensors: dict[str, torch.Tensor]) -> None:
        """Brings what a transfer has put into its window to where it belongs. New tensors are added to `tensors`.

        Transfers have to come in their order.
        """
        window, waiting = self._windows[number], self._waiting
        if window is None:
            return
        for file, offset, size_bytes, at in step.windowed:
            end = offset + size_bytes
            while waiting:
                entry, device, dtype, memory = waiting[0]
                name, own_name, shape, begin, entry_bytes, _, file_of_entry = entry
                if file_of_entry != file or begin >= end:
                    break
                own = string_to_dtype(own_name)
                stop = min(end, begin + entry_bytes)
                if memory is None and begin >= offset and begin + entry_bytes <= end and begin % own.itemsize == 0:
                    tensors[name] = window.tensor(own, shape, begin + at - offset).to(device, dtype, copy=True)
                else:
                    here = max(begin, offset)
                    found = window.tensor(torch.uint8, (stop - here,), here + at - offset)
                    self._bring(waiting[0], here - begin, found, tensors)
                if stop < begin + entry_bytes:
                    break
                waiting.popleft()

    def _bring(self, target: Target, begin: int, found: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        """Brings those bytes of an entry to their place that are `found` in a window; the first of them is `begin`."""
        entry, _, _, memory = target
        own = string_to_dtype(entry.dtype)
        if entry.offset_bytes % own.itemsize:
            # In the window they are at no multiple of their size, and an element may be in two windows.
            begin -= self._remainder.numel()
            found = torch.cat([self._remainder, found])
            whole_bytes = found.numel() - found.numel() % own.itemsize
            self._remainder = found[whole_bytes:].clone()
            found = found[:whole_bytes]
        if memory is None:
            memory = tensors[entry.name] if begin else tensors.setdefault(entry.name, _new_memory(target))
        _copy(memory, begin // own.itemsize, found.view(own))


def _new_memory(target: Target) -> torch.Tensor:
    size_bytes = target.entry.elems * target.dtype.itemsize
    if size_bytes < _BLOCK_BYTES or target.device.type != "cpu":
        return torch.empty(target.entry.shape, dtype=target.dtype, device=target.device)
    return allocate_block(0, size_bytes).tensor(target.dtype, target.entry.shape, 0)


def _copy(memory: torch.Tensor, begin: int, values: torch.Tensor) -> None:
    """Copies `values` to those elements of `memory` that are at `begin` and after it, in row-major order."""
    # Tensors that were made in inference mode can be written to only there.
    with torch.inference_mode(memory.is_inference()):
        for part in _parts_of(memory.detach(), begin, begin + values.numel()):
            size = part.numel()
            part.copy_(values[:size].view(part.shape))
            values = values[size:]


def _parts_of(tensor: torch.Tensor, begin: int, end: int) -> Iterator[torch.Tensor]:
    """Yields views that have, one after the other, the elements from `begin` to `end` in row-major order."""
    if begin >= end:
        return
    if tensor.is_contiguous():
        yield tensor.view(-1)[begin:end]
        return
    row = tensor.numel() // len(tensor)
    first, last = -(-begin // row), end // row
    if first > last:
        yield from _parts_of(tensor[last], begin - last * row, end - last * row)
        return
    if begin < first * row:
        yield from _parts_of(tensor[first - 1], begin - (first - 1) * row, row)
    if first < last:
        yield tensor[first:last]
    if last * row < end:
        yield from _parts_of(tensor[last], 0, end - last * row)


def read_into(
    checkpoint: Checkpoint,
    targets: Sequence[Target],
    options: ReadOptions,
    before_first: Callable[[], None] = lambda: None,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Reads to all targets, on all devices at the same time. Returns the new tensors, and figures of the reads.

    `before_first` is called before the first read, when all engines are there. When this raises, nothing is in flight
    any more, but targets may have got some of their values if `before_first` was called.
    """
    by_device: dict[torch.device, list[Target]] = defaultdict(list)
    tensors: dict[str, torch.Tensor] = {}
    for target in targets:
        if target.entry.size_bytes:
            by_device[target.device].append(target)
        elif target.memory is None:
            tensors[target.entry.name] = _new_memory(target)
    sides = {device: side_of(device, checkpoint.files()[0]) for device in by_device}
    with CollectorPause():
        runs = [_Run(checkpoint, here, sides[device], options) for device, here in by_device.items()]
    to_start: Iterator[tuple[int, tuple[_Step, ...]]] = enumerate(
        zip_longest(*(run.steps() for run in runs), fillvalue=_Step())
    )
    stats: dict[str, Any] = {}
    begin = time.monotonic()
    total_bytes = sum(run.total_bytes for run in runs)
    with (
        progress_bar("Loading", total_bytes, options.show) as progress,
        UnderWay[tuple[int, tuple[_Step, ...]]]() as under_way,
    ):
        before_first()
        while True:
            with CollectorPause():
                next_steps = list(islice(to_start, _WINDOWS - len(under_way)))
            for number, steps in next_steps:
                loads = (run.start(step, number % _WINDOWS) for run, step in zip(runs, steps, strict=True))
                under_way.start((number, steps), loads)
            if not under_way:
                break
            (number, steps), all_stats = under_way.finish(progress)
            for each in all_stats:
                add_stats(stats, each)
            with CollectorPause():
                for run, step in zip(runs, steps, strict=True):
                    run.empty_window(step, number % _WINDOWS, tensors)
    if stats:
        stats["seconds"] = time.monotonic() - begin
        logger.info("%s: %s", checkpoint, describe(stats))
    return tensors, stats


def read_and_cast(
    checkpoint: Checkpoint,
    wanted: Mapping[torch.device, Sequence[Entry]],
    dtype_of: Callable[[Entry], torch.dtype],
    options: ReadOptions,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Reads to all devices at the same time what is wanted there, as tensors of these dtypes. No two share bytes.

    Returns them by name, in the given order, and figures of the reads. It takes their memory and that of the windows.
    """
    targets: list[Target] = []
    for device, entries in wanted.items():
        dtypes = list(map(dtype_of, entries))
        large = [
            entry
            for entry, dtype in zip(entries, dtypes, strict=True)
            if entry.size_bytes >= _LARGE_BYTES and string_to_dtype(entry.dtype) == dtype
        ]
        filled = make_room(Wanted(checkpoint, large), device, options).filled()
        # Where the engine cannot use a device, tensors go there through windows.
        is_home = filled.device.type == device.type
        room = tensors_of(large, filled) if is_home else {}
        home = filled.device if is_home else device
        with CollectorPause():
            targets += (
                Target(entry, home, dtype, room.get(entry.name)) for entry, dtype in zip(entries, dtypes, strict=True)
            )
    tensors, stats = read_into(checkpoint, targets, options)
    every = {
        target.entry.name: tensors[target.entry.name] if target.memory is None else target.memory for target in targets
    }
    return every, stats
