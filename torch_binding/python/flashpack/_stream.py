"""Tensors of a checkpoint one after the other, while the rest is being read."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Generator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, NamedTuple, get_args

import torch

from ._casts import DTypeLike, asked_dtype, dtype_when_asked
from ._checkpoint import Checkpoint, Entry, Verify, open_checkpoint
from ._device import DeviceLike, DeviceMap, as_on_this_thread, captures_undisturbed
from ._engine import left_before_exit
from ._file import checked_names, places_of, selected
from ._logging import logger, printable
from ._memory import Block
from ._native import FlashPackError
from ._options import positive_integer
from ._owner_process import OwnerProcess
from ._paths import StrPath, checked_path
from ._tensors import small_ones_apart, tensors_of
from ._transfers import Filling, ReadOptions, Wanted, make_room, start
from ._under_way import AT_ONCE, UnderWay, add_stats
from .utils import string_to_dtype

Order = Literal["file", "names"]

# Tensors that are neighbours in a file are read together up to this size. The first tensor waits for so many bytes.
_GROUP_BYTES = 64 << 20
# With fewer groups under way the disk would wait for the consumer of each.
_AT_LEAST = 2
# By default there is room for AT_ONCE groups that are read and for as many that the consumer still has. With less the
# disk would wait for a consumer that casts or keeps some tensors for a while.
_WINDOW_BYTES = 512 << 20


class _Sizes(NamedTuple):
    """The memory that a group needs until its tensors have been yielded."""

    read_bytes: int
    """Bytes of the group's blocks, and of the blocks that small tensors were moved to."""
    largest_copy_bytes: int
    """Size of the largest copy, in another dtype or on another device; only one copy is alive at a time."""


class _Group(NamedTuple):
    """Tensors of one device that are read by one transfer."""

    entries: list[Entry]
    filling: Filling
    device: torch.device
    """The device that was asked for. The blocks are on the CPU if the engine cannot use it."""

    @property
    def is_home(self) -> bool:
        """Whether the tensors are read to the device that was asked for."""
        return self.filling.side.device.type == self.device.type


class _Alive:
    """Counts bytes of memory until they are freed, whoever keeps them: a tensor, a slice of it, or its neighbour."""

    def __init__(self) -> None:
        self._bytes = 0
        # Memory may be freed on any thread, at any time, also while this is counting.
        self._freed: deque[int] = deque()

    def add(self, owner: object, size_bytes: int) -> None:
        """Counts memory as long as there is its `owner`."""
        self._bytes += size_bytes
        weakref.finalize(owner, self._freed.append, size_bytes).atexit = False

    def count_bytes(self) -> int:
        while self._freed:
            self._bytes -= self._freed.popleft()
        return self._bytes


class _Reading:
    """Reads the tensors of a stream.

    It does not know the stream, so that a stream which is dropped ends at once. In a cycle with the generator below,
    the stream would keep its memory and descriptors until Python looks for cycles.
    """

    def __init__(
        self,
        paths: StrPath | Sequence[StrPath],
        targets: Callable[[Checkpoint], list[tuple[torch.device, list[Entry]]]],
        options: ReadOptions,
        dtype: torch.dtype | None,
        window_bytes: int,
    ) -> None:
        self.stats: dict[str, Any] = {}
        self._paths = paths
        self._targets = targets
        self._options = options
        self._dtype = dtype
        self._window_bytes = window_bytes
        self._alive = _Alive()
        self._unseen: deque[_Sizes] = deque()  # Groups that have not been yielded to their end.
        # Bytes that the newest tensor keeps alive: its copy, or its whole group. The variable of a loop still holds
        # that tensor when the next one is asked for. That does not count as keeping it, even if it is larger than the
        # window.
        self._newest_memory_bytes = 0
        self._begin = 0.0
        self._warned = False

    def __repr__(self) -> str:
        paths = self._paths if isinstance(self._paths, (list, tuple)) else [self._paths]
        return f"TensorStream({', '.join(printable(str(path)) for path in paths)})"

    def run(self) -> Generator[tuple[str, torch.Tensor], None, None]:
        with open_checkpoint(self._paths) as checkpoint, UnderWay[_Group]() as under_way:
            groups = iter(self._targets(checkpoint))
            self._begin = time.monotonic()
            while self._start(checkpoint, groups, under_way):
                device, tensors = self._finish(under_way)
                self._start(checkpoint, groups, under_way)
                for name in list(tensors):
                    yield name, self._as_asked(tensors.pop(name), device)
                self._unseen.popleft()

    @left_before_exit
    @captures_undisturbed()
    def _start(
        self,
        checkpoint: Checkpoint,
        groups: Iterator[tuple[torch.device, list[Entry]]],
        under_way: UnderWay[_Group],
    ) -> bool:
        """Starts to read the next groups, as many as there is room for, and returns whether any is under way."""
        while len(under_way) < self._most_at_once(len(under_way)):
            device, entries = next(groups, (None, []))
            if device is None:
                break
            with torch.inference_mode(False), torch.no_grad():
                # A stripe that two groups share is read by both, so that both can verify it.
                has_checksums = any(file.has_checksums for file in checkpoint.files())
                verified = has_checksums and self._options.verify != "never"
                whole: Verify = "always" if verified else "never"
                # Memory that a group gives back serves the next one, which must not be larger.
                options = self._options._replace(verify=whole)
                filling = make_room(Wanted(checkpoint, entries), device, options, _GROUP_BYTES)
                batches = filling.batches(as_stream=False)
                loads = (start(checkpoint, batch, filling, self._options) for batch in batches)
                group = _Group(entries, filling, device)
                under_way.start(group, loads)
                read_bytes = self._count(filling.blocks)
            self._unseen.append(_Sizes(read_bytes, self._largest_copy_bytes(group)))
        return bool(under_way)

    @left_before_exit
    @captures_undisturbed()
    def _finish(self, under_way: UnderWay[_Group]) -> tuple[torch.device, dict[str, torch.Tensor]]:
        """Waits for the oldest group, and returns its device, and its tensors as they were read."""
        (entries, filling, device), [stats] = under_way.finish()
        add_stats(self.stats, stats)
        self.stats["seconds"] = time.monotonic() - self._begin
        with torch.inference_mode(False), torch.no_grad():
            filled = small_ones_apart(entries, filling.filled())
            sizes = self._unseen[0]
            read_bytes = sizes.read_bytes + self._count(filled.blocks[len(filling.blocks) :])
            self._unseen[0] = sizes._replace(read_bytes=read_bytes)
            return device, tensors_of(entries, filled)

    def _count(self, blocks: Sequence[Block]) -> int:
        """Counts blocks until they are freed. Returns their size in bytes."""
        sizes = [block.memory.numel() for block in blocks]
        for block, size_bytes in zip(blocks, sizes, strict=True):
            self._alive.add(block.owner, size_bytes)
        return sum(sizes)

    def _largest_copy_bytes(self, group: _Group) -> int:
        """Returns the size of the largest tensor that _as_asked copies, 0 if there is none."""
        largest = 0
        for entry in group.entries:
            own = string_to_dtype(entry.dtype)
            dtype = dtype_when_asked(own, self._dtype)
            if dtype != own or not group.is_home:
                largest = max(largest, entry.elems * dtype.itemsize)
        return largest

    def _as_asked(self, own: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Returns the tensor, cast if the caller asked for a dtype, on `device` if the engine could not use it.

        Only one copy is alive at a time if the caller drops the one before.
        """
        dtype = dtype_when_asked(own.dtype, self._dtype)
        home = own.device if own.device.type == device.type else device
        if (dtype, home) == (own.dtype, own.device):
            self._newest_memory_bytes = self._unseen[0].read_bytes
            return own
        copy = _copy(own, home, dtype)
        self._alive.add(copy.untyped_storage(), copy.nbytes)
        self._newest_memory_bytes = copy.nbytes
        return copy

    def _most_at_once(self, under_way: int) -> int:
        """Returns how many groups may be under way, of which there are `under_way` now."""
        alive_bytes = self._alive.count_bytes()
        unseen_bytes = sum(sizes.read_bytes for sizes in self._unseen)
        # A group more needs this room, and so do the copies to come, of which there is one at a time.
        room_bytes = _GROUP_BYTES + max((sizes.largest_copy_bytes for sizes in self._unseen), default=0)
        if alive_bytes - unseen_bytes <= max(self._window_bytes, self._newest_memory_bytes):
            return AT_ONCE if alive_bytes + room_bytes <= self._window_bytes else max(under_way, 1)
        if not self._warned:
            self._warned = True
            logger.warning(
                "%r: more than window_bytes=%d of the tensors are kept: memory grows with what is kept",
                self,
                self._window_bytes,
            )
        # The consumer has exceeded the window, and the disk must not wait. About a window more is read ahead.
        return AT_ONCE if unseen_bytes + room_bytes <= self._window_bytes else max(under_way, _AT_LEAST)


class TensorStream(Iterator[tuple[str, torch.Tensor]], AsyncIterator[tuple[str, torch.Tensor]]):
    """Yields (name, tensor) as tensors land. Made by stream_tensors(). One thread or task at a time may use it.

    A forked child cannot use a stream of its parent that has begun: RuntimeError says so.
    """

    def __init__(self, reading: _Reading) -> None:
        self.stats = reading.stats
        """Figures of the reads so far, as read_flashpack_file's storage has them.

        Seconds are counted from the start of the first read to the end of the last one.
        """
        self._reading = reading
        self._tensors = reading.run()
        self._owner: OwnerProcess | None = None
        """The process that has begun to read."""
        # It is held while a tensor is being waited for, perhaps on the thread of a task that has been cancelled.
        self._turn = threading.RLock()
        # The find of such a thread, the end or an error included, until somebody takes it.
        self._found: deque[tuple[str, torch.Tensor] | BaseException] = deque()

    def __repr__(self) -> str:
        return repr(self._reading)

    def __iter__(self) -> TensorStream:
        return self

    def __next__(self) -> tuple[str, torch.Tensor]:
        self._find()
        found = self._found.popleft()
        if not isinstance(found, BaseException):
            return found
        try:
            raise found
        finally:
            del found  # Otherwise the error and this frame would keep each other, and memory that was read, alive.

    def __aiter__(self) -> TensorStream:
        return self

    async def __anext__(self) -> tuple[str, torch.Tensor]:
        # A task that is cancelled leaves its tensor to whoever asks next, so that none is lost.
        await asyncio.to_thread(as_on_this_thread(self._find))
        try:
            return next(self)
        except StopIteration:
            raise StopAsyncIteration from None

    def _find(self) -> None:
        """Waits until something is found that nobody has taken."""
        self._owner = self._owner or OwnerProcess()
        self._owner.require_current("a stream of tensors")
        with self._turn:
            if not self._found:
                try:
                    self._found.append(next(self._tensors))
                except BaseException as error:
                    # An interrupt may come when a tensor has been taken out. It must not be passed over in silence.
                    self._tensors.close()
                    self._found.clear()
                    self._found.append(error)

    def close(self) -> None:
        """Ends the reads that are under way, and closes the files. Tensors that were yielded stay valid."""
        if self._owner is not None and not self._owner.is_current():
            # The reads are the parent's. Another thread may have held _turn at the fork, so it is not taken here.
            return
        with self._turn:
            self._tensors.close()
            self._found.clear()

    async def aclose(self) -> None:
        """Does the same, and lets other tasks run while a read ends. contextlib.aclosing() calls it."""
        await asyncio.to_thread(as_on_this_thread(self.close))

    def __enter__(self) -> TensorStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@left_before_exit
@captures_undisturbed()
def _copy(own: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return own.to(device, dtype)


def stream_tensors(
    paths: StrPath | Sequence[StrPath],
    device: DeviceLike = "cpu",
    *,
    names: Collection[str] | Callable[[str], bool] | None = None,
    order: Order = "file",
    window_bytes: int = _WINDOW_BYTES,
    dtype: DTypeLike | None = None,
    device_map: DeviceMap | None = None,
    verify: Verify = "auto",
) -> TensorStream:
    """Returns an iterator of (name, tensor), which yields each tensor soon after it has landed, while the rest is read.

        with flashpack.stream_tensors("llama/", "cuda") as stream:
            for name, tensor in stream:
                parameters[name].copy_(tensor)

    `async for` works, too. Leaving the `with` block, close(), or dropping the stream ends the reads. Reading begins
    with the first tensor that is asked for.

    A tensor is never changed once it has been yielded. Small neighbours share memory of at most 64 MiB, which lives as
    long as the last of them; a copy (clone()) of a small tensor frees the rest. On a GPU a tensor may be used on any
    stream, but one that was cast is a result of the stream that was current where it was asked for. After an error the
    stream has ended. A task that is cancelled while it waits leaves its tensor to whoever asks next.

    `paths`: a flashpack or safetensors file, the index of several, a directory, or a list of files.
    `names`: the tensors to read, by default all, or a function that says for each name whether it is wanted.
    `order`: "file" yields them file by file, in the order of their bytes; "names" in the order of `names`, a list.
    `window_bytes`: about so many bytes are alive at a time: those being read ahead, and those that what was yielded
    keeps alive, also by a slice, or by a small tensor for its neighbours. What was cast counts with its new size. A
    consumer that keeps more gets a warning in the log, and all of its tensors. A tensor larger than the window is read
    all the same, and cast besides.
    `dtype`, `device_map`, `verify`: see load_file and assign_from_file.

    Raises FlashPackError (a ValueError) for an argument that is not valid, TypeError for a path that is none; from the
    iterator, what load_file raises.
    """
    dtype = asked_dtype(dtype)
    if order not in get_args(Order):
        raise FlashPackError(f"order must be file or names, got {order!r}")
    if order == "names" and not isinstance(names, Sequence):
        raise FlashPackError(f'order="names" needs a list of names, got names={names!r}')
    window_bytes = positive_integer("window_bytes", window_bytes)
    paths, wanted = checked_path(paths), checked_names(names)
    options = ReadOptions(verify=verify)

    def targets(checkpoint: Checkpoint) -> list[tuple[torch.device, list[Entry]]]:
        entries = selected(checkpoint, wanted)
        if order == "names":
            by_name = {entry.name: entry for entry in entries}
            entries = [by_name[name] for name in dict.fromkeys(wanted)]  # type: ignore[arg-type]
        return _groups(entries, places_of(entries, device, device_map, options))

    places_of([], device, device_map, options)  # This refuses arguments that are not valid.
    return TensorStream(_Reading(paths, targets, options, dtype, window_bytes))


def _groups(entries: list[Entry], places: Mapping[torch.device, list[Entry]]) -> list[tuple[torch.device, list[Entry]]]:
    """Cuts `entries` into groups of neighbours for one device each."""
    device_of = {entry.number: device for device, here in places.items() for entry in here}
    groups: list[tuple[torch.device, list[Entry]]] = []
    size_bytes = 0
    for entry in entries:
        device = device_of[entry.number]
        if not groups or groups[-1][0] != device or size_bytes + entry.size_bytes > _GROUP_BYTES:
            groups.append((device, []))
            size_bytes = 0
        groups[-1][1].append(entry)
        size_bytes += entry.size_bytes
    return groups
