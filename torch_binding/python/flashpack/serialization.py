"""Writing flashpack files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

import torch

from . import _native
from ._device import CPU, side_of
from ._footer import StrPath
from ._native import FlashPackError
from ._progress import progress_bar
from .constants import DEFAULT_ALIGN_BYTES, DEFAULT_NUM_WRITE_WORKERS
from .utils import dtype_to_string, string_to_dtype

__all__ = ["pack_to_file"]

# Copies made for writing: two groups of this size exist at a time, or of one tensor, if that is larger.
_GROUP_BYTES = 256 << 20

Place = tuple[str, int, int]
"""Name, file offset in bytes, size in bytes."""


def pack_to_file(
    state_dict_or_model: Mapping[str, torch.Tensor] | torch.nn.Module,
    destination_path: StrPath,
    target_dtype: torch.dtype | None = None,
    name_order: Sequence[str] | None = None,
    align_bytes: int = DEFAULT_ALIGN_BYTES,
    silent: bool = True,
    num_workers: int = DEFAULT_NUM_WRITE_WORKERS,
) -> None:
    """Writes the tensors of a state dict, or of a module's, to a file: durably, and whole or not at all.

    Tensors may be on any device, and need not be contiguous; the file has them contiguous. Missing directories are
    made. Until this returns, an existing file stays as it is.

    `target_dtype`: what every tensor, also of integers, is cast to; None keeps each one's dtype.
    `name_order`: the tensors to write, in this order; names that do not exist are passed over. Default: all, largest
    first.
    `align_bytes`: every tensor starts at a multiple of it, in its macroblock; 0 packs densely.
    `num_workers`: accepted for compatibility.

    Raises FlashPackError (a ValueError) naming the tensor that cannot be written, OSError for the system's failures.
    """
    tensors = _select(state_dict_or_model, name_order)
    specs = _specs(tensors, align_bytes, target_dtype)
    payload_bytes, places, footer = _native.layout(specs, align_bytes, name_order)

    destination = os.path.abspath(destination_path)
    os.makedirs(os.path.dirname(destination), exist_ok=True)
    dtypes = {name: string_to_dtype(dtype) for name, dtype, _ in specs}
    side = side_of(_main_device(tensors))
    writer = _native.Writer(side.engine, destination, payload_bytes)
    try:
        with progress_bar("Writing", sum(size for _, _, size in places), silent) as progress:
            # One is made ready while another is written.
            for group, extents in _groups(tensors, dtypes, places, side.device):
                writer.finish(progress)
                writer.start_write(extents, group, side.stream)
            writer.finish(progress)
        writer.commit(footer)
    finally:
        writer.abort()


def _select(
    state_dict_or_model: Mapping[str, torch.Tensor] | torch.nn.Module, name_order: Sequence[str] | None
) -> dict[str, torch.Tensor]:
    if isinstance(state_dict_or_model, torch.nn.Module):
        state_dict: Mapping[str, torch.Tensor] = state_dict_or_model.state_dict()
    else:
        state_dict = state_dict_or_model
    names = state_dict if name_order is None else [name for name in name_order if name in state_dict]
    return {name: state_dict[name] for name in names}


def _specs(
    tensors: dict[str, torch.Tensor], align_bytes: int, target_dtype: torch.dtype | None
) -> list[tuple[str, str, list[int]]]:
    """(name, dtype, shape) of each tensor, once it is known that it can be written."""
    if not tensors:
        raise FlashPackError("No tensors to pack.")
    if align_bytes < 0:
        raise FlashPackError(f"align_bytes must be >= 0, got {align_bytes}")
    if target_dtype is not None and not isinstance(target_dtype, torch.dtype):
        raise FlashPackError(f"Unsupported dtype in state dict: {target_dtype!r}")
    specs = []
    for name, tensor in tensors.items():
        _check_writable(name, tensor)
        dtype = dtype_to_string(target_dtype or tensor.dtype)
        try:
            _native.element_bytes(dtype)
        except FlashPackError as error:
            raise FlashPackError(f"Unsupported dtype for packing: {dtype}, of tensor {name!r}") from error
        specs.append((name, dtype, list(tensor.shape)))
    return specs


def _check_writable(name: object, tensor: object) -> None:
    if not isinstance(name, str):
        raise FlashPackError(f"tensor name {name!r} is a {type(name).__name__}, not a str")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise FlashPackError(f"tensor name {name!r} cannot be written as UTF-8") from error
    if not isinstance(tensor, torch.Tensor):
        raise FlashPackError(f"cannot pack {name!r}: it is a {type(tensor).__name__}, not a tensor")
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise FlashPackError(f"cannot pack {name!r}: {type(tensor).__name__} keeps its bytes elsewhere")
    if tensor.layout is not torch.strided:
        raise FlashPackError(f"cannot pack {name!r}: its layout is {tensor.layout}")
    if tensor.is_meta:
        raise FlashPackError(f"cannot pack {name!r}: it is on the meta device and has no bytes")


def _main_device(tensors: dict[str, torch.Tensor]) -> torch.device:
    """The CUDA device whose tensors need not come to the CPU first; the CPU if there is none."""
    on_cuda = (tensor.device for tensor in tensors.values() if tensor.device.type == "cuda")
    return next(on_cuda, CPU)


def _groups(
    tensors: dict[str, torch.Tensor], dtypes: dict[str, torch.dtype], places: Sequence[Place], device: torch.device
) -> Iterator[tuple[list[torch.Tensor], list[tuple[int, int, int]]]]:
    """Tensors ready to be written, on the CPU or `device`, and where: as many as need _GROUP_BYTES of copies."""
    group: list[torch.Tensor] = []
    extents: list[tuple[int, int, int]] = []
    copied_bytes = 0
    for name, offset_bytes, size_bytes in places:
        source = tensors[name].detach()
        ready = _ready(source, dtypes[name], device)
        group.append(ready)
        extents.append((offset_bytes, size_bytes, ready.data_ptr()))
        if source.device != ready.device or source.data_ptr() != ready.data_ptr():
            copied_bytes += size_bytes
        if copied_bytes >= _GROUP_BYTES:
            yield group, extents
            group, extents, copied_bytes = [], [], 0
    if group:
        yield group, extents


def _ready(tensor: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The values as they go to the file: contiguous, of `dtype`, on `device` if they are there; else on the CPU."""
    where = device if tensor.device == device else CPU
    return tensor.resolve_conj().resolve_neg().to(device=where, dtype=dtype).contiguous()
