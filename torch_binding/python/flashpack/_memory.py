"""Memory that the engine fills, on the host or a device, and the tensors that own it."""

from __future__ import annotations

import errno
import gc
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, Protocol, cast, get_args

import torch

from . import _native
from ._device import CPU, DeviceLike, Side, side_of
from ._footer import Entry, Footer, Verify
from ._logging import logger
from ._native import FlashPackError
from ._progress import Show, progress_bar
from .utils import string_to_dtype

_HUGE_PAGE_BYTES = 2 << 20
_SEGMENT_BYTES = 1 << 30
# Reading through a gap of this size costs less than another operation.
_GAP_BYTES = 1 << 20
# On a device, tensors below 1 MiB share small blocks, so that one that outlives the rest does not keep a segment. torch
# itself keeps 2 MiB of CUDA's memory for each that is left of several small tensors.
_SMALL_BYTES = 1 << 20
_SMALL_BLOCK_BYTES = 2 << 20
# At most so much padding lies between tensors that follow each other in a file.
_PADDING_BYTES = 4096
# Where memory begins that CUDA gives, and kernels may expect tensors to.
_DEVICE_ALIGN_BYTES = 256


Span = tuple[int, int]
"""Begin and end in the file, in bytes."""


class Place(NamedTuple):
    """The bytes that a region is for."""

    offset_bytes: int
    """In the file."""
    size_bytes: int
    lead_bytes: int = 0
    """On a device, how far after its begin the region reaches a multiple of the alignment."""


class Region(Protocol):
    """Memory for the bytes of a file from `offset_bytes` on, and the maker of tensors over it.

    The memory is given back when the region and its last tensor are gone.
    """

    offset_bytes: int
    size_bytes: int

    @property
    def address(self) -> int: ...

    @property
    def memory(self) -> torch.Tensor:
        """All of what it is a part of, as bytes: one object for regions that share it."""
        ...

    def tensor(self, dtype: str, shape: Sequence[int], length_elems: int, offset_bytes: int) -> torch.Tensor:
        """A tensor over the bytes at `offset_bytes` of the file, with a version counter of its own."""
        ...


class HostRegion:
    """A mapping. Each tensor has a storage of its own."""

    def __init__(self, buffer: mmap.mmap, skip_bytes: int, offset_bytes: int, size_bytes: int) -> None:
        self._buffer = buffer
        self._skip_bytes = skip_bytes
        self.offset_bytes = offset_bytes
        self.size_bytes = size_bytes

    @property
    def address(self) -> int:
        return torch.frombuffer(self._buffer, dtype=torch.uint8).data_ptr() + self._skip_bytes

    @property
    def memory(self) -> torch.Tensor:
        return self.tensor("uint8", (self.size_bytes,), self.size_bytes, self.offset_bytes)

    def tensor(self, dtype: str, shape: Sequence[int], length_elems: int, offset_bytes: int) -> torch.Tensor:
        torch_dtype = string_to_dtype(dtype)
        if length_elems == 0:  # frombuffer refuses it.
            return torch.empty(tuple(shape), dtype=torch_dtype, device="cpu")
        offset = self._skip_bytes + offset_bytes - self.offset_bytes
        flat = torch.frombuffer(self._buffer, dtype=torch_dtype, count=length_elems, offset=offset)
        return flat.view(tuple(shape)).detach()


class DeviceRegion:
    """A part of a block of torch's allocator. Tensors share the block's storage."""

    def __init__(self, block: torch.Tensor, skip_bytes: int, offset_bytes: int, size_bytes: int) -> None:
        self.memory = block
        self._storage = block.untyped_storage()
        self._without_elements: dict[str, torch.Tensor] = {}
        self._skip_bytes = skip_bytes
        self.offset_bytes = offset_bytes
        self.size_bytes = size_bytes

    @property
    def address(self) -> int:
        return self.memory.data_ptr() + self._skip_bytes

    def tensor(self, dtype: str, shape: Sequence[int], length_elems: int, offset_bytes: int) -> torch.Tensor:
        torch_dtype = string_to_dtype(dtype)
        begin = (self._skip_bytes + offset_bytes - self.offset_bytes) // torch_dtype.itemsize
        if dtype not in self._without_elements:
            self._without_elements[dtype] = torch.empty(0, dtype=torch_dtype, device=self.memory.device)
        # As no view has, it has a version counter of its own; and it takes half the time of torch.empty.
        tensor: Any = self._without_elements[dtype].data  # torch's stubs know set_ with strides alone.
        return cast(torch.Tensor, tensor.set_(self._storage, begin, tuple(shape)))


def allocate_region(offset_bytes: int, size_bytes: int, device: torch.device = CPU) -> Region:
    """Memory for one extent, with unspecified bytes."""
    return allocate_places([Place(offset_bytes, size_bytes)], device, device)[0]


def allocate_places(places: Sequence[Place], device: torch.device, home: torch.device) -> list[Region]:
    """Memory for what goes to `device`, on `home`, which is the CPU where the engine cannot use the device."""
    if device.type == "cpu":
        return [_allocate_host(place.offset_bytes, place.size_bytes) for place in places]
    sizes: list[int] = []
    in_blocks: list[tuple[int, int]] = []
    last: dict[int, int] = {}
    for place in places:
        limit = _SMALL_BLOCK_BYTES if place.size_bytes <= _SMALL_BLOCK_BYTES else _SEGMENT_BYTES
        block = last.get(limit, -1)
        skip_bytes = _aligned(sizes[block]) + -place.lead_bytes % _DEVICE_ALIGN_BYTES if block >= 0 else 0
        if block < 0 or skip_bytes + place.size_bytes > limit:
            last[limit] = block = len(sizes)
            skip_bytes = -place.lead_bytes % _DEVICE_ALIGN_BYTES
            sizes.append(0)
        sizes[block] = skip_bytes + place.size_bytes
        in_blocks.append((block, skip_bytes))
    blocks = [torch.empty(size_bytes, dtype=torch.uint8, device=home) for size_bytes in sizes]
    return [
        DeviceRegion(blocks[block], skip_bytes, place.offset_bytes, place.size_bytes)
        for place, (block, skip_bytes) in zip(places, in_blocks, strict=True)
    ]


def _aligned(size_bytes: int) -> int:
    return size_bytes + -size_bytes % _DEVICE_ALIGN_BYTES


def _allocate_host(offset_bytes: int, size_bytes: int) -> HostRegion:
    """Private anonymous memory, untouched.

    Its address and the file offset agree modulo a page (a huge page, where it is large enough to have one), so that
    the engine can read whole pages in place.
    """
    huge = size_bytes >= _HUGE_PAGE_BYTES
    align = _HUGE_PAGE_BYTES if huge else mmap.PAGESIZE
    try:
        buffer = mmap.mmap(-1, size_bytes + align, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise OSError(errno.ENOMEM, f"allocate {size_bytes} bytes: {error.strerror}") from error
    if huge:
        with suppress(OSError):  # Kernels without huge pages refuse the advice; small ones are only slower.
            buffer.madvise(mmap.MADV_HUGEPAGE)
    base = torch.frombuffer(buffer, dtype=torch.uint8).data_ptr()
    return HostRegion(buffer, (offset_bytes - base) % align, offset_bytes, size_bytes)


def allocate_tensor(dtype: str, shape: Sequence[int], offset_bytes: int, device: torch.device) -> torch.Tensor:
    """Memory of its own for what lies at `offset_bytes` of a file, with unspecified values."""
    length_elems = math.prod(shape)
    size_bytes = length_elems * string_to_dtype(dtype).itemsize
    if size_bytes < _HUGE_PAGE_BYTES:  # A process may have only so many mappings.
        return torch.empty(tuple(shape), dtype=string_to_dtype(dtype), device=device)
    region = allocate_region(offset_bytes, size_bytes, device)
    return region.tensor(dtype, shape, length_elems, offset_bytes)


def map_file(footer: Footer) -> HostRegion:
    """The whole file, mapped privately and writable. Truncation by others is SIGBUS for whoever touches it."""
    stat = os.fstat(footer.fileno())
    if (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns) != footer.native.identity:
        raise OSError(errno.ESTALE, "the file was changed", footer.path)
    buffer = mmap.mmap(footer.fileno(), stat.st_size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    return HostRegion(buffer, 0, 0, stat.st_size)


class ReadOptions(NamedTuple):
    """How a file is read."""

    mmap: bool = False
    verify: Verify = "auto"
    show: Show = False


def supported_device(device: DeviceLike, options: ReadOptions) -> torch.device:
    """Raises FlashPackError for a device that cannot be read to, or not in that way, or for no such way."""
    if options.verify not in get_args(Verify):
        raise FlashPackError(f"verify must be auto, always or never, got {options.verify!r}")
    try:
        target = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise FlashPackError(f"Unsupported device: {device!r}") from error
    if options.mmap and options.verify == "always":
        raise FlashPackError("with mmap=True nothing is read, so there is nothing to verify")
    if target.type not in (("cpu",) if options.mmap else ("cpu", "cuda")):
        raise FlashPackError(f"Unsupported device: {target}{' with mmap=True' if options.mmap else ''}")
    return target


class Filling(NamedTuple):
    """Regions of one side that are to have the bytes of a file."""

    regions: list[Region]
    side: Side


def fill(footer: Footer, fillings: Sequence[Filling], options: ReadOptions) -> list[dict[str, Any]]:
    """Reads the regions of each side in one transfer, all sides at the same time, and returns the statistics of each.

    When this raises, be it OSError or KeyboardInterrupt, nothing is in flight any more.
    """
    loads: list[_native.Load] = []
    total_bytes = sum(region.size_bytes for regions, _ in fillings for region in regions)
    with progress_bar("Loading", total_bytes, options.show) as progress:
        try:
            for regions, side in fillings:
                # A name for the load would keep it in the traceback of the next one's error.
                loads.append(_start(footer, regions, side, options))
        except BaseException:
            loads.clear()  # This ends those that have been started.
            raise
        all_stats: list[dict[str, Any]] = _native.finish_loads(loads, progress)
    for stats in all_stats:
        logger.info("%s: %s", footer.path, _describe(stats))
    return all_stats


def _start(footer: Footer, regions: list[Region], side: Side, options: ReadOptions) -> _native.Load:
    extents = [(region.offset_bytes, region.size_bytes, region.address) for region in regions]
    fd, native = footer.fileno(), footer.native
    return side.engine.start_load(fd, footer.path, extents, native, regions, options.verify, stream=side.stream)


class Filled(NamedTuple):
    """Regions with the bytes of a file, where they ended up, and the statistics of this process's reads, if any."""

    regions: list[Region]
    device: torch.device
    stats: dict[str, Any] | None


def read_regions(footer: Footer, spans: Sequence[Span], device: torch.device, options: ReadOptions) -> Filled:
    """Reads each of `spans`, which ascend, into a region of its own, on `device` or, where the engine cannot, the CPU.

    A mapped file is one region for all.
    """
    if options.mmap:
        return Filled([map_file(footer)] * len(spans), CPU, None)
    filling = _make_room(footer, spans, device, options)
    [stats] = fill(footer, [filling], options)
    return Filled(filling.regions, filling.side.device, stats)


def _make_room(footer: Footer, spans: Sequence[Span], device: torch.device, options: ReadOptions) -> Filling:
    side = side_of(device)
    places = places_of(spans, footer, options.verify)
    return Filling(allocate_places(places, device, side.device), side)


ReadRegions = Callable[[Footer, Sequence[Span], torch.device, ReadOptions], Filled]
"""read_regions, or what does the same in another way."""


def read_tensors(
    footer: Footer,
    entries: Sequence[Entry],
    device: torch.device,
    options: ReadOptions,
    read: ReadRegions = read_regions,
) -> dict[str, torch.Tensor]:
    """Reads `entries` in one transfer, to where `read` puts them."""
    runs = plan_runs(entries, device)
    filled = read(footer, _spans_of(runs), device, options)
    return tensors_of(entries, _region_at(filled.regions, runs), filled.device)


def read_to_devices(
    footer: Footer, wanted: Mapping[torch.device, Sequence[Entry]], options: ReadOptions
) -> dict[str, torch.Tensor]:
    """Reads what is wanted on each device, on all at the same time; to the CPU where the engine cannot use a device."""
    if options.mmap:
        return read_tensors(footer, [entry for entries in wanted.values() for entry in entries], CPU, options)
    runs = {device: plan_runs(entries, device) for device, entries in wanted.items()}
    fillings = {device: _make_room(footer, _spans_of(runs[device]), device, options) for device in wanted}
    fill(footer, list(fillings.values()), options)
    tensors: dict[str, torch.Tensor] = {}
    for device, (regions, side) in fillings.items():
        tensors |= tensors_of(wanted[device], _region_at(regions, runs[device]), side.device)
    return tensors


def _spans_of(runs: Sequence[Sequence[Entry]]) -> list[Span]:
    return [(run[0].offset_bytes, stop_of(run[-1])) for run in runs]


def _region_at(regions: Sequence[Region], runs: Sequence[Sequence[Entry]]) -> dict[int, Region]:
    return {entry.offset_bytes: region for region, run in zip(regions, runs, strict=True) for entry in run}


def places_of(spans: Sequence[Span], footer: Footer, verify: Verify) -> list[Place]:
    """Says what is to be read for the bytes between begin and end of each of `spans`, which ascend.

    Only whole stripes can be verified. So a place takes in the padding that follows; and where everything is to be
    verified, it reaches to the borders of stripes.
    """
    stripe_bytes = _native.STRIPE_BYTES
    longest_padding_bytes = math.lcm(footer.native.align_bytes or 1, 16) - 1
    places: list[Place] = []
    free = 0
    limits = [*(begin for begin, _ in spans[1:]), footer.native.payload_bytes]
    for (first, end), limit in zip(spans, limits, strict=False):
        begin = first
        if verify == "always":
            begin = max(free, begin - begin % stripe_bytes)
            end = min(limit, end + -end % stripe_bytes)
        if limit - end <= longest_padding_bytes:
            end = limit
        places.append(Place(begin, end - begin, first - begin))
        free = end
    return places


def tensors_of(
    entries: Sequence[Entry], region_at: Mapping[int, Region], device: torch.device = CPU
) -> dict[str, torch.Tensor]:
    """The tensors of `entries`, each with memory of its own.

    `region_at`: by file offset; empty tensors need none.
    """
    tensors: dict[str, torch.Tensor] = {}
    with _collector_paused():
        for name, dtype, shape, offset_bytes, length_elems, size_bytes, *_ in entries:
            if size_bytes:
                tensors[name] = region_at[offset_bytes].tensor(dtype, shape, length_elems, offset_bytes)
            else:
                tensors[name] = torch.empty(shape, dtype=string_to_dtype(dtype), device=device)
    return tensors


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Python's cyclic garbage collector does not look again and again at a million objects while they are made."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def plan_runs(entries: Sequence[Entry], device: torch.device = CPU) -> list[list[Entry]]:
    """Groups `entries`, but for empty ones, by place in the file into runs worth one read into one region each.

    A run ends before a gap that is not worth reading, and before it outgrows a segment, so that the memory of a model
    can be given back stripe by stripe. On a device it ends, too, before what would not begin at a multiple of the
    alignment, and holds either large tensors or small ones.
    """
    joins = _joins if device.type == "cpu" else _joins_on_device
    runs: list[list[Entry]] = []
    for entry in sorted((entry for entry in entries if entry.size_bytes), key=lambda entry: entry.offset_bytes):
        if runs and joins(runs[-1], entry):
            runs[-1].append(entry)
        else:
            runs.append([entry])
    return runs


def _joins(run: list[Entry], entry: Entry) -> bool:
    gap_bytes = entry.offset_bytes - stop_of(run[-1])
    return gap_bytes <= _GAP_BYTES and stop_of(entry) - run[0].offset_bytes <= _SEGMENT_BYTES


def _joins_on_device(run: list[Entry], entry: Entry) -> bool:
    is_small = entry.size_bytes < _SMALL_BYTES
    distance_bytes = entry.offset_bytes - run[0].offset_bytes
    return (
        is_small == (run[0].size_bytes < _SMALL_BYTES)
        and entry.offset_bytes - stop_of(run[-1]) < _PADDING_BYTES
        and distance_bytes % _DEVICE_ALIGN_BYTES == 0
        and distance_bytes + entry.size_bytes <= (_SMALL_BLOCK_BYTES if is_small else _SEGMENT_BYTES)
    )


def stop_of(entry: Entry) -> int:
    return entry.offset_bytes + entry.size_bytes


def _describe(stats: dict[str, Any]) -> str:
    rate = stats["requested_bytes"] / max(stats["seconds"], 1e-9) / 1e9
    text = (
        f"{stats['requested_bytes']} bytes in {stats['seconds']:.3f} s ({rate:.2f} GB/s), "
        f"{stats['direct_bytes']} direct, {stats['buffered_bytes']} through the page cache, "
        f"{stats['verified_bytes']} verified, backend {stats['backend']}"
    )
    return f"{text}; {stats['fallback_reason']}" if stats["fallback_reason"] else text
