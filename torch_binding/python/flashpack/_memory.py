"""Memory that the engine fills, on the host or a device, and the tensors that own it."""

from __future__ import annotations

import errno
import gc
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, Protocol

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
# On a device, smaller tensors get memory of their own, so that one that outlives the rest does not keep a segment.
_MIN_SHARED_BYTES = 1 << 20


Span = tuple[int, int]
"""Begin and end in the file, in bytes."""


class Region(Protocol):
    """Memory for the bytes of a file from `offset_bytes` on, and the maker of tensors over it.

    The memory is given back when the region and its last tensor are gone.
    """

    offset_bytes: int
    size_bytes: int

    @property
    def address(self) -> int: ...

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

    def tensor(self, dtype: str, shape: Sequence[int], length_elems: int, offset_bytes: int) -> torch.Tensor:
        torch_dtype = string_to_dtype(dtype)
        if length_elems == 0:  # frombuffer refuses it.
            return torch.empty(tuple(shape), dtype=torch_dtype, device="cpu")
        offset = self._skip_bytes + offset_bytes - self.offset_bytes
        flat = torch.frombuffer(self._buffer, dtype=torch_dtype, count=length_elems, offset=offset)
        return flat.view(tuple(shape)).detach()


class DeviceRegion:
    """A block of torch's allocator. Tensors share its storage, but for small ones."""

    def __init__(self, offset_bytes: int, size_bytes: int, device: torch.device) -> None:
        self._block = torch.empty(size_bytes, dtype=torch.uint8, device=device)
        self.offset_bytes = offset_bytes
        self.size_bytes = size_bytes

    @property
    def address(self) -> int:
        return self._block.data_ptr()

    def tensor(self, dtype: str, shape: Sequence[int], length_elems: int, offset_bytes: int) -> torch.Tensor:
        torch_dtype = string_to_dtype(dtype)
        begin = offset_bytes - self.offset_bytes
        size_bytes = length_elems * torch_dtype.itemsize
        if begin % torch_dtype.itemsize:  # Packed more densely than a device can address.
            return self._block[begin : begin + size_bytes].clone().view(torch_dtype).view(tuple(shape)).detach()
        tensor = torch.empty(0, dtype=torch_dtype, device=self._block.device)
        flat = (begin // torch_dtype.itemsize, (length_elems,), (1,))
        tensor = tensor.set_(self._block.untyped_storage(), *flat).view(tuple(shape)).detach()
        return tensor if size_bytes == self.size_bytes or size_bytes >= _MIN_SHARED_BYTES else tensor.clone()


def allocate_region(offset_bytes: int, size_bytes: int, device: torch.device = CPU) -> Region:
    """Memory for one extent, with unspecified bytes."""
    if device != CPU:
        return DeviceRegion(offset_bytes, size_bytes, device)
    return _allocate_host(offset_bytes, size_bytes)


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
    """Raises FlashPackError for a device that cannot be read to, or not in that way."""
    try:
        target = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise FlashPackError(f"Unsupported device: {device!r}") from error
    if options.mmap and options.verify == "always":
        raise FlashPackError("with mmap=True nothing is read, so there is nothing to verify")
    if target.type not in (("cpu",) if options.mmap else ("cpu", "cuda")):
        raise FlashPackError(f"Unsupported device: {target}{' with mmap=True' if options.mmap else ''}")
    return target


def fill_regions(footer: Footer, regions: Sequence[Region], side: Side, options: ReadOptions) -> dict[str, Any]:
    """Reads all regions, of one side, in one transfer and returns its statistics.

    When this raises, be it OSError or KeyboardInterrupt, nothing is in flight any more.
    """
    extents = [(region.offset_bytes, region.size_bytes, region.address) for region in regions]
    with progress_bar("Loading", sum(region.size_bytes for region in regions), options.show) as progress:
        stats = side.engine.load(
            footer.fileno(), footer.path, extents, footer.native, options.verify, progress=progress, stream=side.stream
        )
    logger.info("%s: %s", footer.path, _describe(stats))
    return stats


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
    side = side_of(device)
    regions = allocate_regions(spans, footer, side.device, options.verify)
    return Filled(regions, side.device, fill_regions(footer, regions, side, options))


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
    runs = plan_runs([entry for entry in entries if entry.size_bytes])
    filled = read(footer, [(run[0].offset_bytes, stop_of(run[-1])) for run in runs], device, options)
    region_at = {entry.offset_bytes: region for region, run in zip(filled.regions, runs, strict=True) for entry in run}
    return tensors_of(entries, region_at, filled.device)


def allocate_regions(spans: Sequence[Span], footer: Footer, device: torch.device, verify: Verify) -> list[Region]:
    """Memory for the bytes between begin and end of each of `spans`, which ascend.

    Only whole pieces can be verified. So a region takes in the padding that follows; and where everything is to be
    verified, it reaches to the borders of pieces.
    """
    piece_bytes = _native.PIECE_BYTES
    longest_padding_bytes = math.lcm(footer.native.align_bytes or 1, 16) - 1
    regions: list[Region] = []
    free = 0
    limits = [*(begin for begin, _ in spans[1:]), footer.payload_bytes()]
    for (begin, end), limit in zip(spans, limits, strict=False):
        if verify == "always":
            begin = max(free, begin - begin % piece_bytes)
            end = min(limit, end + -end % piece_bytes)
        if limit - end <= longest_padding_bytes:
            end = limit
        regions.append(allocate_region(begin, end - begin, device))
        free = end
    return regions


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


def plan_runs(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Groups `entries`, none of them empty, by place in the file into runs worth one read into one region each.

    A run ends before a gap that is not worth reading, and before it outgrows a segment, so that the memory of a model
    can be given back piece by piece.
    """
    runs: list[list[Entry]] = []
    for entry in sorted(entries, key=lambda entry: entry.offset_bytes):
        run = runs[-1] if runs else None
        if (
            run is None
            or entry.offset_bytes - stop_of(run[-1]) > _GAP_BYTES
            or stop_of(entry) - run[0].offset_bytes > _SEGMENT_BYTES
        ):
            runs.append([entry])
        else:
            run.append(entry)
    return runs


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
