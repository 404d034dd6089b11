"""Reading the tensors of a file by name: all, some, or parts of one."""

from __future__ import annotations

import itertools
import math
import operator
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
import torch

from ._casts import DTypeLike, asked_dtype, dtype_when_asked
from ._checkpoint import Checkpoint, Entry, Verify, open_checkpoint, opened_checkpoint
from ._device import CPU, DeviceLike, DeviceMap, Side, captures_undisturbed, devices_by_module, side_of
from ._engine import left_before_exit
from ._listing import as_html, by_name, summary_of
from ._logging import printable, shortened
from ._memory import aligned_phase, allocate_block, allocate_tensor
from ._native import FlashPackError
from ._options import Filters
from ._paths import StrPath
from ._tensors import read_tensors, read_to_devices
from ._transfers import Read, ReadOptions, Wanted, supported_device
from .utils import string_to_dtype

__all__ = ["FlashPackFile", "TensorSlice", "load_file", "open_file"]

# Reading a gap of this size costs less than another operation, as the engine has it (engine_bench, cost/gap_*).
_SHORT_GAP_BYTES = 64 << 10
# A thread copies this much from the page cache in less time than it takes to wake another one (engine_bench,
# cost/wake).
_SMALL_BYTES = 256 << 10
# Slices with short gaps are read into a window of this size again and again, so that its pages are made only once.
_WINDOW_BYTES = 32 << 20
# Below this distance, reading the extents of a slice one by one costs more than reading the gaps, too. On a device it
# costs more at any distance, because each extent is a copy of its own.
_DENSE_BYTES = 1 << 10
# Each extent that is read by itself takes some hundred bytes of memory while it is read.
_MOST_RUNS = 1 << 18


@left_before_exit
@captures_undisturbed()
def load_file(
    path: StrPath,
    device: DeviceLike = "cpu",
    *,
    names: Collection[str] | None = None,
    ignore_names: Collection[str] | None = None,
    ignore_prefixes: Collection[str] | None = None,
    ignore_suffixes: Collection[str] | None = None,
    dtype: DTypeLike | None = None,
    device_map: DeviceMap | None = None,
    mmap: bool = False,
    verify: Verify = "auto",
    progress: Callable[[int, int], object] | None = None,
    metadata: dict[str, str] | None = None,
    stats: dict[str, Any] | None = None,
) -> dict[str, torch.Tensor]:
    """Reads tensors of a file, in file order. Other tensors are not read.

    No two tensors share bytes, but one that is kept may keep the memory of its neighbours in the file alive.

    `names`: the tensors to read, by default all; `ignore_*`: names, and beginnings and ends of names, not to read.
    `dtype`: floating-point tensors, or complex ones, are cast to it: torch.bfloat16, or its name, "bfloat16". Integers
    and 8-bit floats, which may be quantised weights, keep theirs.
    `device_map`: devices by module, as in {"": "cpu", "encoder": "cuda:0", "encoder.layers.7": 1}; the longest name
    that fits decides, and `device` where none does. All devices are loaded to at the same time. One device stands for
    all modules; so do "auto", "balanced" and "sequential", which mean the current GPU or, without any, the CPU.
    `mmap`: maps the file instead of reading it (CPU only), see read_flashpack_file. `verify`: see assign_from_file.
    `progress`: called now and then, on this thread, with the bytes done and their total; its exceptions end the load.
    `metadata`: a dict that gets the text that pack_to_file was given as `metadata` for the file that is read.
    `stats`: a dict that gets figures of the reads, as in FlashTensorStorage.stats; none of a file that is mapped.

    Raises FlashPackError (a ValueError) for a file or an argument that is not valid, a name that the file lacks
    included; OSError for the system's failures.
    """
    dtype = asked_dtype(dtype)
    filters = Filters.of(ignore_names, ignore_prefixes, ignore_suffixes)
    with open_checkpoint(path) as checkpoint, torch.inference_mode(False), torch.no_grad():
        entries = filters.without_ignored(selected(checkpoint, names))
        options = ReadOptions(mmap, verify, False if progress is None else _told_of(entries, progress))
        places = places_of(entries, device, device_map, options)
        own_dtypes = {name: string_to_dtype(name) for name in {entry.dtype for entry in entries}}
        dtypes = {name: dtype_when_asked(own, dtype) for name, own in own_dtypes.items()}
        if dtypes != own_dtypes and not mmap:
            from ._into import read_and_cast

            tensors, figures = read_and_cast(checkpoint, places, lambda entry: dtypes[entry.dtype], options)
        else:
            tensors, figures = read_to_devices(checkpoint, places, options)
            for place, here in places.items():
                if (mmap and dtype is not None) or tensors[here[0].name].device.type != place.type:
                    _move(tensors, here, place, dtype)
        if metadata is not None:
            metadata.update(checkpoint.native.user_metadata)
        if stats is not None:
            stats.update(figures)
    return tensors if len(places) == 1 else {entry.name: tensors[entry.name] for entry in entries}


def open_file(
    path: StrPath | Sequence[StrPath], device: DeviceLike = "cpu", *, verify: Verify = "auto"
) -> FlashPackFile:
    """Opens a file to read its tensors one by one, or parts of them. Nothing else is read.

    `device`: tensors are read to it. `verify`: see assign_from_file.

    Raises FlashPackError (a ValueError) for a file that is not valid, OSError for the system's failures.
    """
    return FlashPackFile(path, device, verify)


class FlashPackFile:
    """The tensors of one file by name. Made by open_file().

    The file stays open until close(), the end of a with block, or until this is dropped. So another file at its path
    does not matter; if the file is changed in place, reading is an OSError (ESTALE). Several threads and forked
    processes may use this.
    """

    def __init__(self, path: StrPath | Sequence[StrPath], device: DeviceLike = "cpu", verify: Verify = "auto") -> None:
        self._options = ReadOptions(verify=verify)
        self._device = supported_device(device, self._options)
        self._checkpoint = opened_checkpoint(path)
        self._entries = {entry.name: entry for entry in self._checkpoint.entries()}

    @property
    def path(self) -> str:
        return self._checkpoint.path

    @property
    def metadata(self) -> dict[str, Any]:
        """The footer, as get_flashpack_file_metadata returns it, in a dict of its own."""
        return self._checkpoint.native.to_dict()

    def keys(self) -> list[str]:
        """Returns the names, in file order."""
        return list(self._entries)

    def __repr__(self) -> str:
        about = summary_of(list(self._entries.values()))
        return f"{type(self).__name__}({printable(self.path)!r}, {about}, on {self._device})"

    def _repr_html_(self) -> str:
        return as_html(repr(self), by_name(list(self._entries.values())))

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    @left_before_exit
    @captures_undisturbed()
    def get(self, name: str) -> torch.Tensor:
        """Reads a tensor into memory of its own. Raises KeyError for an unknown name, else what load_file raises."""
        entry = self._entry(name)
        with torch.inference_mode(False), torch.no_grad():
            if (cached := self._read_cached(entry)) is not None:
                return cached
            wanted = Wanted(self._checkpoint, [entry])
            return read_tensors(wanted, self._device, self._options)[name].to(self._device)

    __getitem__ = get

    def get_slice(self, name: str) -> TensorSlice:
        """Returns a tensor to read parts of: get_slice("w")[10:20, :5]. Raises KeyError for an unknown name."""
        return TensorSlice(self, self._entry(name))

    def close(self) -> None:
        """Closes the files. After that, reading their tensors is a ValueError."""
        self._checkpoint.native.close()

    def __enter__(self) -> FlashPackFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        _refuse_pickling(self)

    def _read_cached(self, entry: Entry) -> torch.Tensor | None:
        """Returns a small tensor whose bytes are in the page cache, without the costs of a transfer; else None."""
        file = self._checkpoint.files()[entry.file]
        verify = self._options.verify
        may_be_unverified = verify == "never" or (verify == "auto" and not file.has_checksums)
        if self._device != CPU or not 0 < entry.size_bytes <= _SMALL_BYTES or not may_be_unverified:
            return None
        tensor = torch.empty(entry.shape, dtype=string_to_dtype(entry.dtype), device=CPU)
        memory = tensor.view(-1).view(torch.uint8).numpy().data
        try:
            read_bytes = os.preadv(file.fd, [memory], entry.offset_bytes, os.RWF_NOWAIT)
        except OSError:  # It is not there, or the engine will say what is wrong.
            return None
        return tensor if read_bytes == entry.size_bytes and file.is_unchanged() else None

    def _entry(self, name: str) -> Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise KeyError(f"{self.path} has no tensor {name!r}") from None


class UnknownIndexError(TypeError):
    """Parts of a tensor cannot be read by such an index."""


class TensorSlice:
    """A tensor of a file, of which parts can be read. Made by FlashPackFile.get_slice()."""

    def __init__(self, file: FlashPackFile, entry: Entry) -> None:
        self._file = file
        self._entry = entry

    def __repr__(self) -> str:
        return f"TensorSlice({printable(self._entry.name)!r}, {self._entry.dtype}, {list(self._entry.shape)})"

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self._entry.shape)

    @property
    def dtype(self) -> torch.dtype:
        return string_to_dtype(self._entry.dtype)

    @left_before_exit
    @captures_undisturbed()
    def __getitem__(self, index: Any) -> torch.Tensor:
        """Returns what torch gives for integers, slices and `...`, in memory of its own.

        Only short gaps between its bytes are read, too. With verify="always" the whole tensor is read, because a
        checksum is for a whole stripe of the file.

        Raises IndexError as torch does, and what load_file raises.
        """
        ranges, kept = _ranges(index, self._entry.shape)
        if self._file._options.verify == "always":
            return self._file.get(self._entry.name)[index].clone()
        with torch.inference_mode(False), torch.no_grad():
            return self._read(ranges).view([len(ranges[dim]) for dim in kept]).detach()

    def __reduce__(self) -> NoReturn:
        _refuse_pickling(self)

    def _read(self, ranges: list[range]) -> torch.Tensor:
        """Reads the elements that `ranges` stand for, in as many dims."""
        side = side_of(self._file._device, self._file._checkpoint.files()[self._entry.file])
        item_bytes = self.dtype.itemsize
        strides = [item_bytes * math.prod(self.shape[dim + 1 :]) for dim in range(len(ranges))]
        shape = [len(each) for each in ranges]
        if not all(shape):
            return torch.empty(shape, dtype=self.dtype, device=self._file._device)
        extent_bytes, repeats = _repeated_extent(ranges, strides, item_bytes, self.shape)
        along = repeats and (
            repeats[-1][1] < _DENSE_BYTES or side.device != CPU or math.prod(count for count, _ in repeats) > _MOST_RUNS
        )
        if along and (rows := _dim_of_rows(ranges, strides, item_bytes)) is not None:
            return self._read_rows(ranges, strides, rows, side).to(self._file._device)
        begin = sum(each.start * stride for each, stride in zip(ranges, strides, strict=True))
        part = allocate_tensor(self._entry.dtype, shape, self._entry.offset_bytes + begin, side.device)
        self._load([(begin, extent_bytes, part.data_ptr())], side, repeats)
        return part.to(self._file._device)

    def _read_rows(self, ranges: list[range], strides: list[int], dim: int, side: Side) -> torch.Tensor:
        """Reads many rows at a time into a window, and copies the wanted elements from there.

        A row has the elements of one index of `dim`. It is read from its first wanted byte to its last one; gaps
        between rows are read, too.
        """
        outer = [*ranges[:dim], range(ranges[dim][0], ranges[dim][-1] + 1)]
        row_bytes, inner = strides[dim], ranges[dim + 1 :]
        begin = sum(each.start * stride for each, stride in zip(inner, strides[dim + 1 :], strict=True))
        end = self.dtype.itemsize + sum(
            each[-1] * stride for each, stride in zip(inner, strides[dim + 1 :], strict=True)
        )
        counts = [len(each) for each in outer]
        at_once = min(max(1, _WINDOW_BYTES // row_bytes), math.prod(counts))
        origin = self._entry.offset_bytes + ranges[dim].start * row_bytes
        block = allocate_block(aligned_phase(origin, self.dtype), at_once * row_bytes, side.device)
        window = block.tensor(self.dtype, (at_once, *self.shape[dim + 1 :]), 0)
        wanted = (slice(None), *(slice(each.start, each.stop, each.step) for each in inner))
        lengths = [len(each) for each in inner]
        target = allocate_tensor(self._entry.dtype, [math.prod(counts), *lengths], origin, side.device)
        extents: list[tuple[int, int, int]] = []
        done, there = 0, 0
        for row, count in _bands(outer, strides, at_once):
            if there + count > at_once:
                self._load(extents, side)
                target[done : done + there] = window[:there][wanted]
                done, extents, there = done + there, [], 0
            address = block.address + there * row_bytes + begin
            extents.append((row + begin, (count - 1) * row_bytes + end - begin, address))
            there += count
        self._load(extents, side)
        target[done:] = window[:there][wanted]
        steps = [*[slice(None)] * dim, slice(None, None, ranges[dim].step)]
        return target.view([*counts, *lengths])[tuple(steps)].contiguous()

    def _load(self, extents: list[tuple[int, int, int]], side: Side, repeats: Sequence[tuple[int, int]] = ()) -> None:
        """Reads extents, whose offsets are in the tensor, as often as `repeats` tells the engine."""
        file, begin = self._entry.file, self._entry.offset_bytes
        reads: list[Read] = [(file, begin + at, size, address) for at, size, address in extents]
        native, verify = self._file._checkpoint.native, self._file._options.verify
        side.engine.load(native, reads, verify, stream=side.stream, repeats=repeats)


def _dim_of_rows(ranges: list[range], strides: list[int], item_bytes: int) -> int | None:
    """Returns the first dim whose rows are small and have short gaps between them, if there is one."""
    spans = [(each[-1] - each[0]) * stride for each, stride in zip(ranges, strides, strict=True)]
    for dim, (each, stride) in enumerate(zip(ranges, strides, strict=True)):
        span_bytes = item_bytes + sum(spans[dim + 1 :])
        if len(each) > 1 and stride <= _WINDOW_BYTES and each.step * stride <= span_bytes + _SHORT_GAP_BYTES:
            return dim
    return None


def _bands(ranges: list[range], strides: list[int], most: int) -> Iterator[tuple[int, int]]:
    """Yields groups of neighbouring rows: the offset of the first in the tensor, and their number, at most `most`."""
    rows, stride = ranges[-1], strides[len(ranges) - 1]
    for at in itertools.product(*ranges[:-1]):
        start = sum(i * s for i, s in zip(at, strides, strict=False))
        for row in range(rows.start, rows.stop, most):
            yield start + row * stride, min(most, rows.stop - row)


def _repeated_extent(
    ranges: list[range], strides: list[int], item_bytes: int, shape: Sequence[int]
) -> tuple[int, list[tuple[int, int]]]:
    """Returns the bytes of each extent, and how often they are repeated and how far apart, outermost first."""
    # Whole dims are one extent, together with neighbouring indices of the dim before them.
    first = len(shape)
    while first and len(ranges[first - 1]) == shape[first - 1]:
        first -= 1
    if first and (ranges[first - 1].step == 1 or len(ranges[first - 1]) == 1):
        first -= 1
    repeats = [(len(each), each.step * stride) for each, stride in zip(ranges[:first], strides, strict=False)]
    extent_bytes = item_bytes * math.prod(len(each) for each in ranges[first:])
    return extent_bytes, [repeat for repeat in repeats if repeat[0] != 1]


def _ranges(index: Any, shape: tuple[int, ...]) -> tuple[list[range], list[int]]:
    """Returns what `index` means in each dim, and the dims that it keeps, which are those without a single integer."""
    items = _one_for_each_dim([_known(item) for item in (index if isinstance(index, tuple) else (index,))], len(shape))
    ranges: list[range] = []
    kept: list[int] = []
    for dim, (item, size) in enumerate(zip(items, shape, strict=True)):
        if isinstance(item, slice):
            begin, end, step = item.indices(size)
            if step < 1:
                raise ValueError("the step of a slice must be greater than zero")
            ranges.append(range(begin, end, step))
            kept.append(dim)
        else:
            if not -size <= item < size:
                raise IndexError(f"index {item} is out of bounds for a dim of size {size}")
            ranges.append(range(item % size, item % size + 1))
    return ranges, kept


def _one_for_each_dim(items: list[Any], dims: int) -> list[Any]:
    """Returns an integer or a slice for each dim. Raises IndexError for an item that is beyond the last dim."""
    given = sum(item is not ... for item in items)
    if given > dims:
        raise IndexError(f"too many indices for a tensor of {dims} dims: {given}")
    placed: list[Any] = []
    for item in items:
        if item is ...:  # torch lets each of several stand for as many dims as the only one would.
            placed += [slice(None)] * (dims - given)
        elif len(placed) < dims:
            placed.append(item)
        elif item != slice(None):
            raise IndexError(f"index {item} is for a dim after the last of {dims}, because '...' is there twice")
    return (placed + [slice(None)] * dims)[:dims]


def _known(item: Any) -> Any:
    """Returns a slice, `...` or an integer. Raises UnknownIndexError for any other item of an index."""
    if isinstance(item, slice) or item is ...:
        return item
    if (number := _as_integer(item)) is None:
        raise UnknownIndexError(f"parts of a tensor are read by integers, slices and '...', not by {item!r}")
    return number


def _as_integer(item: Any) -> int | None:
    """Returns an integer for `item` (also numpy's, or a tensor without dims), but None for booleans and others.

    A tensor that has dims is a list of indices, which gives its dims to the result, also if it has only one element.
    """
    is_bool = isinstance(item, (bool, np.bool_)) or getattr(item, "dtype", None) is torch.bool
    has_dims = getattr(item, "ndim", 0) > 0
    try:
        return None if is_bool or has_dims else operator.index(item)
    except TypeError:
        return None


def _move(
    tensors: dict[str, torch.Tensor], entries: Collection[Entry], device: torch.device, dtype: torch.dtype | None
) -> None:
    """Moves and casts in file order, so that the memory of a block is freed once all of its tensors are cast."""
    for entry in sorted(entries, key=lambda entry: entry.offset_bytes):
        cast = dtype_when_asked(string_to_dtype(entry.dtype), dtype)
        tensors[entry.name] = tensors[entry.name].to(device, cast)


def _told_of(entries: Collection[Entry], progress: Callable[[int, int], object]) -> Callable[[int, int], object]:
    """Tells `progress` the bytes of these entries, because more may be read."""
    total_bytes = sum(entry.size_bytes for entry in entries)
    return lambda done_bytes, _: progress(min(done_bytes, total_bytes), total_bytes)


def selected(checkpoint: Checkpoint, names: Collection[str] | Callable[[str], bool] | None) -> list[Entry]:
    """Returns the tensors that `names` has or accepts. Raises FlashPackError for a name that is not there."""
    names = checked_names(names)
    entries = checkpoint.entries()
    if names is None:
        return entries
    if callable(names):
        return [entry for entry in entries if names(entry.name)]
    wanted = set(names)
    if unknown := wanted - {entry.name for entry in entries}:
        raise FlashPackError(f"{checkpoint} has no tensors {shortened(sorted(unknown))}")
    return [entry for entry in entries if entry.name in wanted]


def checked_names(
    names: Collection[str] | Callable[[str], bool] | None,
) -> list[str] | Callable[[str], bool] | None:
    """Returns a list of the names that a caller chooses, or his function. Raises FlashPackError for what is neither."""
    if names is None or callable(names):
        return names
    refusal = f"names must be names of tensors, or a function that says of a name whether it is wanted, got {names!r}"
    try:
        copied = [names] if isinstance(names, str) else list(names)
    except TypeError:
        raise FlashPackError(refusal) from None
    for name in copied:
        if not isinstance(name, str):
            raise FlashPackError(f"{refusal}, which has {name!r}")
    return copied


def places_of(
    entries: list[Entry], device: DeviceLike, device_map: DeviceMap | None, options: ReadOptions
) -> dict[torch.device, list[Entry]]:
    """Sorts the entries by the device that they are read to, in file order."""
    devices = {name: supported_device(each, options) for name, each in devices_by_module(device_map).items()}
    default = devices[""] if "" in devices else supported_device(device, options)
    if not devices:
        return {default: entries} if entries else {}
    places: dict[torch.device, list[Entry]] = {}
    deepest = max(name.count(".") for name in devices) + 1
    for entry in entries:
        # A forged name may have millions of dots, so that only as many are looked at as matter.
        parts = entry.name.split(".", deepest)[:deepest]
        leads = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
        place = next((devices[lead] for lead in leads if lead in devices), default)
        places.setdefault(place, []).append(entry)
    return places


def _refuse_pickling(handle: object) -> NoReturn:
    raise TypeError(f"cannot pickle or copy a {type(handle).__name__}: open the file in each process")
