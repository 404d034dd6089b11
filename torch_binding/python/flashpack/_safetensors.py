"""What safetensors calls dtypes, shapes and errors, and writing its files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError

from . import _native
from ._checkpoint import Entry, StrPath
from ._device import CPU, DeviceLike, side_of
from ._file import FlashPackFile
from ._memory import supported_device
from ._native import FlashPackError
from ._progress import progress_bar
from .utils import string_to_dtype

_PACKED = "float4_e2m1fn_x2"
# These have no name there, because no safetensors file can have them.
UNNAMED = {"complex32": "C32", "complex128": "C128"}
_NAMES = {
    "bool": "BOOL",
    **{f"{sign}int{bits}": f"{'U' if sign else 'I'}{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"F{bits}" for bits in (16, 32, 64)},
    "bfloat16": "BF16",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    _PACKED: "F4",
    **UNNAMED,
}


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


def write_safetensors(
    path: StrPath, entries: Sequence[Entry], tensors: Mapping[str, torch.Tensor], metadata: dict[str, str], show: bool
) -> None:
    """Writes `entries`, whose values `tensors` has on the CPU, to a safetensors file, durably.

    Raises FlashPackError for what no such file can have, OSError for the system's failures.
    """
    # Readers map the file, so that every tensor has to be aligned: large elements come first.
    ordered = sorted(entries, key=lambda entry: (-string_to_dtype(entry.dtype).itemsize, entry.name))
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for entry in ordered:
        if entry.dtype in UNNAMED:
            raise FlashPackError(f"safetensors files cannot hold {entry.dtype}, as of {entry.name!r}; a .pt file can")
        begin, end = end, end + entry.size_bytes
        header[entry.name] = {"dtype": dtype_name(entry), "shape": header_shape(entry), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    lead = torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.uint8)
    sources = [lead, *(tensors[entry.name] for entry in ordered if entry.size_bytes)]
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
    return _NAMES[entry.dtype]


def header_shape(entry: Entry) -> list[int]:
    """Returns the shape in the header, which counts the two elements of a packed byte."""
    shape = list(entry.shape)
    return [*shape[:-1], 2 * shape[-1]] if entry.dtype == _PACKED else shape
