"""Writing flashpack files."""

from __future__ import annotations

import errno
import itertools
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch.nn.parameter import is_lazy

from . import _native
from ._casts import asked_dtype, dtype_of, dtype_when_asked
from ._device import CPU, captures_undisturbed, side_of
from ._durable import make_directories
from ._engine import left_before_exit
from ._links import is_blob_link
from ._memory import allocate_block, end_bytes
from ._name_hints import without_compiled
from ._native import FlashPackError
from ._own_code import EXTRA_STATE
from ._paths import StrPath, path_of
from ._progress import progress_bar
from .constants import DEFAULT_ALIGN_BYTES, DEFAULT_NUM_WRITE_WORKERS
from .utils import dtype_to_string, listed, string_to_dtype

__all__ = ["pack_to_file"]

_BUFFER_BYTES = _native.PACK_BUFFER_BYTES

Place = tuple[str, int, int]
"""Name, file offset in bytes, size in bytes."""
Spec = tuple[str, str, list[int]]
"""Name, dtype, shape."""


@left_before_exit
@captures_undisturbed()
def pack_to_file(
    state_dict_or_model: Mapping[str, torch.Tensor] | torch.nn.Module,
    destination_path: StrPath,
    target_dtype: torch.dtype | None = None,
    name_order: Iterable[str] | None = None,
    align_bytes: int = DEFAULT_ALIGN_BYTES,
    silent: bool = True,
    num_workers: int = DEFAULT_NUM_WRITE_WORKERS,
    checksum: bool = True,
    metadata: Mapping[str, str] | None = None,
    strip_compiled: bool = False,
) -> None:
    """Writes the tensors of a state dict, or of a module, to a file: durably, and whole or not at all.

    Tensors may be on any device, and need not be contiguous; the file has them contiguous. Missing directories are
    made. Until this returns, an existing file stays as it is. A symbolic link is followed, unless it leads to a blob in
    the cache of the Hub: then the link is replaced.

    `target_dtype`: floating-point tensors, or complex ones, are cast to it; None keeps each one's dtype. Integers and
    8-bit floats, which may be packed or quantised weights, keep theirs, and a cast to integers is refused.
    `name_order`: the tensors to write, in this order; unknown names are ignored. Default: all, largest first.
    `align_bytes`: every tensor starts at a multiple of it, in its macroblock; 0 packs densely.
    `checksum`: puts checksums of the payload into the footer, for loads to verify. Without checksums and `metadata`
    the file is, byte for byte, what flashpack 0.4.5 writes; readers that know neither ignore both.
    `metadata`: text by name for the footer, like `__metadata__` of safetensors files; get_flashpack_file_metadata
    returns it as "metadata".
    `strip_compiled`: leaves out the "_orig_mod." that torch.compile puts into names, so that the file fits the module
    that was compiled.
    `num_workers`: accepted for compatibility, without effect.

    Raises FlashPackError (a ValueError) naming the tensor that cannot be written, OSError for the system's failures.
    """
    path = path_of(destination_path)
    refuse_name_of_directory(path)
    name_order = None if name_order is None else list(listed(name_order) or ())
    _check_arguments(align_bytes, name_order)
    tensors = _select(state_dict_or_model, name_order, strip_compiled)
    if not tensors:
        raise FlashPackError("No tensors to pack. A flashpack file has at least one; a safetensors file can be empty")
    specs = _specs(tensors, target_dtype)
    layout = _native.layout(specs, align_bytes, name_order, _checked_metadata(metadata), checksum)

    def footer(writer: _native.Writer) -> bytes:
        return layout.footer(writer.checksums() if checksum else None)

    _write(path, tensors, specs, _Plan(layout.places, layout.payload_bytes, checksum=checksum, footer=footer), silent)


@left_before_exit
@captures_undisturbed()
def save_as_safetensors(
    tensors: Mapping[str, torch.Tensor], destination_path: StrPath, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors to a safetensors file as pack_to_file writes a flashpack file.

    The bytes are those of safetensors, which has more than one entry of metadata in any order.

    Raises FlashPackError naming the tensor that such a file cannot have, RuntimeError for tensors that share memory, as
    safetensors does, OSError for the system's failures.
    """
    path = path_of(destination_path)
    refuse_name_of_directory(path)
    specs, header, order = plan_safetensors(tensors, metadata)
    _refuse_parts(tensors)
    sizes = [tensors[specs[number][0]].nbytes for number in order]
    ends = [*itertools.accumulate(sizes, initial=len(header))]
    places = [(specs[number][0], begin, size) for number, begin, size in zip(order, ends, sizes, strict=False)]
    _write(path, tensors, specs, _Plan(places, ends[-1], header), silent=True)


def plan_safetensors(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> tuple[list[Spec], bytes, list[int]]:
    """Returns the tensors of a safetensors file, its beginning, and the indices of its tensors in their order.

    Raises FlashPackError naming the tensor that such a file cannot have.
    """
    specs = _specs(tensors, None)
    return specs, *_native.safetensors_header(specs, None if metadata is None else _checked_metadata(metadata))


def _refuse_parts(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuses tensors that share memory, of which a load makes several, and those that may be parts of another one."""
    import safetensors.torch

    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise FlashPackError(
                f"{name!r} is not contiguous, so that it may be a part of another tensor: save tensor.contiguous(), "
                f"use save_model(..., force_contiguous=True), or save a flashpack file (*.flashpack)"
            )
    for names in safetensors.torch._find_shared_tensors(dict(tensors)):
        if len(names) > 1:
            sharing = " and ".join(map(repr, sorted(names)))
            raise RuntimeError(
                f"{sharing} share memory, and a safetensors file would have it twice: save_model writes one of them, "
                f"and a flashpack file (*.flashpack) has all"
            )


class _Plan(NamedTuple):
    """A file that is to be written."""

    places: Sequence[Place]
    payload_bytes: int
    """The end of the last place."""
    header: bytes = b""
    """Bytes before the first place."""
    checksum: bool = False
    footer: Callable[[_native.Writer], bytes] = lambda writer: b""
    """Makes the bytes after the payload, once that is written."""


def _write(path: str, tensors: Mapping[str, torch.Tensor], specs: Sequence[Spec], plan: _Plan, silent: bool) -> None:
    make_directories(os.path.dirname(path) or ".")
    dtypes = {name: string_to_dtype(dtype) for name, dtype, _ in specs}
    side = side_of(_main_device(tensors))
    follow_links = not is_blob_link(path)
    writer = _native.Writer(side.engine, path, plan.payload_bytes, plan.checksum, follow_links)
    try:
        total_bytes = sum(size_bytes for _, _, size_bytes in plan.places)
        with progress_bar("Writing", total_bytes, not silent) as progress, torch.no_grad():
            if plan.header:
                header = _Group()
                header.add(torch.frombuffer(bytearray(plan.header), dtype=torch.uint8), 0)
                writer.start_write(header.extents, header.sources, side.stream)
            for group in _groups(tensors, dtypes, plan.places, side.device):
                writer.start_write(group.extents, group.sources, side.stream)
                writer.finish(_native.PACK_GROUPS - 1, progress)
            writer.finish(0, progress)
            writer.commit(plan.footer(writer))
    finally:
        writer.abort()


def refuse_name_of_directory(path: StrPath) -> None:
    """Raises IsADirectoryError for a name that only a directory can have."""
    text = os.fsdecode(path)
    if text.endswith(os.sep):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), text)


def file_to_replace(path: StrPath) -> Path:
    """Returns the file that pack_to_file would write for `path`: the target of a link, if pack_to_file follows it.

    Raises what pack_to_file raises if there is something else than a regular file.
    """
    follow_links = not is_blob_link(path)
    if os.path.lexists(path):
        _native.Writer(side_of(CPU).engine, path, 0, False, follow_links).abort()
    return Path(os.path.realpath(path) if follow_links else path)


def _select(
    state_dict_or_model: Mapping[str, torch.Tensor] | torch.nn.Module,
    name_order: Sequence[str] | None,
    strip_compiled: bool,
) -> dict[str, torch.Tensor]:
    if isinstance(state_dict_or_model, torch.nn.Module):
        _refuse_lazy(state_dict_or_model)
        state_dict: Mapping[str, torch.Tensor] = state_dict_or_model.state_dict()
    elif isinstance(state_dict_or_model, Mapping):
        state_dict = state_dict_or_model
    else:
        raise TypeError(f"a state dict or a module is packed, not a {type(state_dict_or_model).__name__}")
    if strip_compiled:
        state_dict = named_without_compiled(state_dict)
    names = state_dict if name_order is None else [name for name in name_order if name in state_dict]
    return {name: state_dict[name] for name in names}


def _refuse_lazy(model: torch.nn.Module) -> None:
    for name, module in model.named_modules():
        if any(map(is_lazy, module._parameters.values())) or any(map(is_lazy, module._buffers.values())):
            raise FlashPackError(
                f"cannot pack {name or 'the model'!r}: this {type(module).__name__} is lazy, and has no shape yet; a "
                f"first batch through the model gives it one"
            )


def named_without_compiled(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns `state_dict` with the names that its tensors had before modules were compiled, without "_orig_mod."."""
    names = [without_compiled(name) if isinstance(name, str) else name for name in state_dict]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise FlashPackError(f"without '_orig_mod.' two tensors are called {twice!r}")
    return dict(zip(names, state_dict.values(), strict=True))


def dicts_of_tensors(state_dict: Mapping[str, Any]) -> list[str]:
    """Returns the names of those values that are dicts with tensors in them, as training checkpoints have them."""
    return [
        name
        for name, value in state_dict.items()
        if isinstance(value, Mapping) and any(isinstance(each, torch.Tensor) for each in value.values())
    ]


def _specs(tensors: Mapping[str, torch.Tensor], target_dtype: torch.dtype | None) -> list[Spec]:
    """Returns what the file says of each tensor. Raises FlashPackError if one of them cannot be written."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            _refuse_other(name, tensor, tensors)
        _check_writable(name, tensor)
    _check_target(tensors, target_dtype)
    specs = []
    for name, tensor in tensors.items():
        dtype = _storable(dtype_when_asked(tensor.dtype, target_dtype), f"of tensor {name!r}")
        specs.append((name, dtype, list(tensor.shape)))
    return specs


def _check_arguments(align_bytes: Any, name_order: Sequence[Any] | None) -> None:
    try:
        is_valid = 0 <= operator.index(align_bytes) < 1 << 63
    except TypeError:
        is_valid = False
    if not is_valid:
        raise FlashPackError(f"align_bytes must be >= 0, and an integer of 64 bits, got {align_bytes!r}")
    for name in name_order or ():
        if not isinstance(name, str):
            raise FlashPackError(f"name_order has {name!r}, which is a {type(name).__name__}, not a str")


def _checked_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    if metadata is not None and not isinstance(metadata, Mapping):
        raise FlashPackError(f"metadata is a {type(metadata).__name__}, not a mapping of strings")
    checked = dict(metadata or {})
    for key, value in checked.items():
        for text in (key, value):
            if not isinstance(text, str):
                raise FlashPackError(f"metadata {key!r}: {text!r} is a {type(text).__name__}, not a str")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise FlashPackError(f"metadata {key!r} cannot be written as UTF-8") from error
    return checked


def _check_target(tensors: Mapping[str, torch.Tensor], target_dtype: torch.dtype | None) -> None:
    if target_dtype is None:
        return
    if not isinstance(target_dtype, torch.dtype):
        # Loads take names, but flashpack 0.4.5 refuses them here, and programs may rely on that.
        raise FlashPackError(f"Unsupported dtype for packing: {target_dtype!r}: pass {dtype_of(target_dtype)}")
    _storable(target_dtype, "which is asked for")
    if not (target_dtype.is_floating_point or target_dtype.is_complex):
        changed = [name for name, tensor in tensors.items() if tensor.dtype != target_dtype]
        if changed:
            raise FlashPackError(f"a cast to {target_dtype} could lose values of {len(changed)} tensors: {changed}")
    else:
        asked_dtype(target_dtype)


def _storable(dtype: torch.dtype, whose: str) -> str:
    name = dtype_to_string(dtype)
    try:
        _native.element_bytes(name)
    except FlashPackError as error:
        raise FlashPackError(f"Unsupported dtype for packing: {name}, {whose}") from error
    return name


def _refuse_other(name: object, value: object, state_dict: Mapping[str, Any]) -> NoReturn:
    cure = ""
    if isinstance(name, str) and name.endswith(EXTRA_STATE):
        cure = ": get_extra_state() of its module must return one"
    elif nested := dicts_of_tensors(state_dict):
        cure = f": tensors are in {' and '.join(map(repr, nested[:3]))}"
    raise FlashPackError(f"cannot pack {name!r}: it is a {type(value).__name__}, not a tensor{cure}")


def check_name(name: object) -> None:
    """Raises FlashPackError for what cannot be the name of a tensor in a file."""
    if not isinstance(name, str):
        raise FlashPackError(f"tensor name {name!r} is a {type(name).__name__}, not a str")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise FlashPackError(f"tensor name {name!r} cannot be written as UTF-8") from error


def _check_writable(name: object, tensor: torch.Tensor) -> None:
    check_name(name)
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise FlashPackError(f"cannot pack {name!r}: {type(tensor).__name__} keeps its bytes elsewhere")
    if is_lazy(tensor):
        raise FlashPackError(f"cannot pack {name!r}: it is lazy, and has no shape yet")
    if tensor.is_nested:
        raise FlashPackError(f"cannot pack {name!r}: it is nested, and has no shape")
    if tensor.layout is not torch.strided:
        raise FlashPackError(f"cannot pack {name!r}: its layout is {tensor.layout}")
    if tensor.is_meta:
        raise FlashPackError(f"cannot pack {name!r}: it is on the meta device and has no bytes")
    if tensor.numel() and not _address_of(tensor):
        raise FlashPackError(
            f"cannot pack {name!r}: it has no memory, as inside of torch.func, or if all of it is zero"
        )
    storage_bytes = tensor.untyped_storage().nbytes()
    if end_bytes(tensor) > storage_bytes:
        raise FlashPackError(
            f"cannot pack {name!r}: its storage has {storage_bytes} bytes, and its last element ends at byte "
            f"{end_bytes(tensor)}"
        )


def _address_of(tensor: torch.Tensor) -> int:
    """Returns the address of the memory of `tensor`, 0 if it has none."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return 0


def _main_device(tensors: Mapping[str, torch.Tensor]) -> torch.device:
    """Returns the CUDA device whose tensors need not come to the CPU first; the CPU if there is none."""
    on_cuda = (tensor.device for tensor in tensors.values() if tensor.device.type == "cuda")
    return next(on_cuda, CPU)


@dataclass
class _Group:
    """The extents of one write."""

    extents: list[tuple[int, int, int]] = field(default_factory=list)
    """File offset, size, address."""
    sources: list[torch.Tensor] = field(default_factory=list)
    """The owners of that memory."""

    def add(self, tensor: torch.Tensor, offset_bytes: int) -> None:
        self.extents.append((offset_bytes, tensor.numel() * tensor.element_size(), tensor.data_ptr()))
        self.sources.append(tensor)


def _groups(
    tensors: Mapping[str, torch.Tensor],
    dtypes: Mapping[str, torch.dtype],
    places: Sequence[Place],
    device: torch.device,
) -> Iterator[_Group]:
    """Yields the groups of a _native.PackPlan, filled. The group that comes PACK_GROUPS later uses the same buffers.

    `device`: the engine's.
    """
    plan = _native.PackPlan()
    for name, offset_bytes, _ in places:
        tensor, dtype = tensors[name], dtypes[name]
        on_device = tensor.device == device != CPU
        contiguous, final = tensor.is_contiguous(), _is_final(tensor, dtype, device)
        has_rows = tensor.dim() <= 1 or tensor.stride(-1) == 1
        plan.add(contiguous, final, has_rows, on_device, dtype.itemsize, offset_bytes, tensor.shape)
    rounds = itertools.cycle([dict[torch.device, _Buffer]() for _ in range(_native.PACK_GROUPS)])
    for steps, buffers in zip(plan.groups(_BUFFER_BYTES), rounds, strict=False):
        group = _Group()
        for index, first_elem, elems, at_bytes, scratch_at_bytes in map(steps.__getitem__, range(len(steps))):
            name, offset_bytes, _ = places[index]
            tensor, dtype = tensors[name].detach(), dtypes[name]
            if at_bytes is not None:
                side = device if tensor.device == device else CPU
                if side not in buffers:
                    buffers[side] = _Buffer(side)
                part = _part(tensor, first_elem, elems)
                tensor = buffers[side].convert(part, dtype, at_bytes, scratch_at_bytes)
            group.add(tensor, offset_bytes + first_elem * dtype.itemsize)
        yield group


def _is_final(tensor: torch.Tensor, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `tensor` has the values of the file, and the engine can read them where they are."""
    return tensor.device in (CPU, device) and tensor.dtype == dtype and not tensor.is_conj() and not tensor.is_neg()


def _part(tensor: torch.Tensor, first_elem: int, elems: int) -> torch.Tensor:
    if tensor.is_contiguous():
        return tensor.view(-1)[first_elem : first_elem + elems]
    while tensor.numel() > elems:
        row_elems = tensor.numel() // tensor.shape[0]
        row, rows = first_elem // row_elems, elems // row_elems
        if rows > 1:
            return tensor[row : row + rows]
        tensor, first_elem = tensor[row], first_elem - row * row_elems
    return tensor


class _Buffer:
    """Memory of one device for converted values."""

    def __init__(self, device: torch.device) -> None:
        self._bytes = allocate_block(0, _BUFFER_BYTES, device).memory

    def convert(
        self, part: torch.Tensor, dtype: torch.dtype, at_bytes: int, scratch_at_bytes: int | None
    ) -> torch.Tensor:
        """Returns the values of `part` as they go to the file."""
        if part.dtype == dtype and dtype.itemsize == 1:
            part, dtype = part.view(torch.uint8), torch.uint8  # Some dtypes of a byte lack copy_().
        place = self._at(at_bytes, part.numel(), dtype)
        if scratch_at_bytes is not None:
            strides = torch.empty_like(part, dtype=dtype, device="meta").stride()
            dense = self._at(scratch_at_bytes, part.numel(), dtype).as_strided(part.shape, strides)
            place.view(part.shape).copy_(dense.copy_(part))
        elif part.device == CPU and part.is_contiguous():
            split = _native.PACK_SERIAL_ELEMS
            torch._foreach_copy_(torch.split(place, split), torch.split(part.view(-1), split))
        else:
            place.view(part.shape).copy_(part)
        return place

    def _at(self, begin: int, elems: int, dtype: torch.dtype) -> torch.Tensor:
        return self._bytes[begin : begin + elems * dtype.itemsize].view(dtype)
