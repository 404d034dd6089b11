"""What safetensors calls dtypes, shapes and errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from ._checkpoint import Entry
from ._device import DeviceLike
from ._file import FlashPackFile
from ._memory import supported_device
from ._native import FlashPackError

_PACKED = "float4_e2m1fn_x2"
# The last two have no name there, because no safetensors file can have them.
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
    "complex32": "C32",
    "complex128": "C128",
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
