"""What safetensors calls dtypes, shapes and errors, and writing its files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from safetensors import SafetensorError

from . import _native
from ._checkpoint import Entry, StrPath
from ._device import CPU, DeviceLike, side_of
from ._file import FlashPackFile
from ._memory import supported_device
from ._native import FlashPackError
from ._progress import progress_bar

# These have no name there, because no safetensors file can have them.
UNNAMED = {"complex32": "C32", "complex128": "C128"}


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


def write_safetensors(path: StrPath, header: bytes, tensors: Iterable[torch.Tensor], show: bool) -> None:
    """Writes a header and its tensors, which are on the CPU, to a file, durably. Raises OSError."""
    lead = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    sources = [lead, *(tensor for tensor in tensors if tensor.nbytes)]
    extents, at = [], 0
    for source in sources:
        extents.append((at, source.nbytes, source.data_ptr()))
        at += source.nbytes
    side = side_of(CPU)
    writer = _native.Writer(side.engine, os.path.abspath(path), at)
    try:
        with progress_bar("Writing", at, show) as progress:
            writer.start_write(extents, sources, side.stream)
            writer.finish(0, progress)
            writer.commit(b"")
    finally:
        writer.abort()


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
