"""The names that safetensors has for dtypes, shapes and errors, and writing its files."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter

import torch
from safetensors import SafetensorError

from . import _native
from ._checkpoint import Entry
from ._device import CPU, DeviceLike, side_of
from ._file import FlashPackFile
from ._native import FlashPackError
from ._paths import StrPath
from ._progress import progress_bar
from ._transfers import supported_device

# These have no name there, because no safetensors file can have them.
UNNAMED = {"complex32": "C32", "complex128": "C128"}
# As much is written together, and nothing is read for the file meanwhile. With smaller batches the disk would often
# wait.
_BATCH_BYTES = 32 << 20

_Part = tuple[int, torch.Tensor]
"""Bytes of a file: their offset and the tensor that has them."""


class CheckpointError(FlashPackError, SafetensorError):
    """A file or an argument is not valid. Whoever catches the errors of either library catches it."""


@contextmanager
def catchable() -> Iterator[None]:
    """Within it, a FlashPackError becomes a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except FlashPackError as error:
        raise CheckpointError(str(error)) from error


def safetensors_header(entries: Sequence[Entry], metadata: dict[str, str]) -> tuple[bytes, list[Entry]]:
    """Returns the beginning of a safetensors file with these tensors, and the tensors in the order of that file.

    Raises FlashPackError for what no such file can have.
    """
    header, order = _native.safetensors_header([(name, dtype, shape) for name, dtype, shape, *_ in entries], metadata)
    return header, [entries[number] for number in order]


def write_safetensors(
    path: StrPath,
    header: bytes,
    entries: Sequence[Entry],
    tensors: Iterable[tuple[str, torch.Tensor]],
    show: bool,
) -> None:
    """Writes a header and its tensors to a file, durably. `entries`: all tensors, in the order of the file.

    `tensors`: their names and values, which are on the CPU, in any order. No more of them is held than a batch of
    32 MiB, or one larger tensor. Raises OSError, and what `tensors` raises.
    """
    ends = [*itertools.accumulate((entry.size_bytes for entry in entries), initial=len(header))]
    places = {entry.name: begin for entry, begin in zip(entries, ends, strict=False)}
    side = side_of(CPU)
    writer = _native.Writer(side.engine, path, ends[-1])

    def start(batch: list[_Part]) -> None:
        for run in _runs(batch):
            extents = [(begin, source.nbytes, source.data_ptr()) for begin, source in run]
            writer.start_write(extents, [source for _, source in run], side.stream)

    try:
        with progress_bar("Writing", ends[-1], show) as progress:
            for batch in _batches(header, places, tensors):
                start(batch)  # A function of its own, after which no variable holds the batch's last tensors.
                writer.finish(0, progress)
            writer.commit(b"")
    finally:
        writer.abort()


def _batches(
    header: bytes, places: Mapping[str, int], tensors: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[list[_Part]]:
    """Yields all bytes of the file. A batch is emptied before the next tensor is asked for."""
    batch: list[_Part] = [(0, torch.frombuffer(bytearray(header), dtype=torch.uint8))]
    size_bytes = len(header)
    for name, tensor in tensors:
        if tensor.nbytes:
            batch.append((places[name], tensor))
            size_bytes += tensor.nbytes
        if size_bytes >= _BATCH_BYTES:
            yield batch
            batch.clear()
            size_bytes = 0
    yield batch


def _runs(batch: list[_Part]) -> Iterator[list[_Part]]:
    """Cuts a batch into parts without gaps, because a write with a short gap would fill it with zeros."""
    run: list[_Part] = []
    for begin, source in sorted(batch, key=itemgetter(0)):
        if run and run[-1][0] + run[-1][1].nbytes != begin:
            yield run
            run = []
        run.append((begin, source))
    if run:
        yield run


class FileOnDevice(FlashPackFile):
    """An open file, whose tensors are read to another device."""

    def __init__(self, file: FlashPackFile, device: DeviceLike) -> None:
        vars(self).update(vars(file))
        self._device = supported_device(device, self._options)


def dtype_name(entry: Entry) -> str:
    return _native.safetensors_dtype(entry.dtype) or UNNAMED[entry.dtype]


def header_shape(entry: Entry) -> list[int]:
    """Returns the shape in the header, which counts the two elements of a packed byte."""
    return _native.safetensors_shape(entry.dtype, entry.shape)
