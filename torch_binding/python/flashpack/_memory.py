"""Memory for bytes of files, on the host or a device, and tensors over it."""

from __future__ import annotations

import errno
import math
import mmap
import os
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from . import _native
from ._checkpoint import File
from ._device import CPU
from .utils import string_to_dtype

_HUGE_PAGE_BYTES = 2 << 20
# Python has a name for this from 3.13 on; before, the number of x86, Arm and RISC-V stands in.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


class Block(Protocol):
    """Memory for bytes of a file, which is freed when the block and its last tensor are gone."""

    @property
    def address(self) -> int: ...

    @property
    def memory(self) -> torch.Tensor:
        """The whole block, as bytes."""
        ...

    @property
    def owner(self) -> object:
        """The object that the block and its tensors keep alive. The memory is freed with it."""
        ...

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...], offset_bytes: int) -> torch.Tensor:
        """Returns a tensor, which is not empty, over bytes of the block. It has a version counter of its own."""
        ...


class HostBlock:
    """Memory of the host. Each tensor has a storage of its own."""

    def __init__(self, buffer: _native.HostMemory | mmap.mmap, size_bytes: int) -> None:
        self._buffer = buffer
        self.size_bytes = size_bytes

    @property
    def address(self) -> int:
        return self.memory.data_ptr()

    @property
    def memory(self) -> torch.Tensor:
        return self.tensor(torch.uint8, (self.size_bytes,), 0)

    @property
    def owner(self) -> object:
        return self._buffer

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...], offset_bytes: int) -> torch.Tensor:
        buffer: Any = self._buffer  # The types of Python 3.11 cannot say that HostMemory has the buffer protocol.
        flat = torch.frombuffer(buffer, dtype=dtype, count=math.prod(shape), offset=offset_bytes)
        return flat if len(shape) == 1 else flat.view(shape).detach()


class MappedFile(HostBlock):
    """A mapping of a whole file. Tensors that the file has at no multiple of their element size are copies."""

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...], offset_bytes: int) -> torch.Tensor:
        mapped = super().tensor(dtype, shape, offset_bytes)
        return mapped.clone() if offset_bytes % dtype.itemsize else mapped


class DeviceBlock:
    """Memory of torch's allocator. All tensors share its storage."""

    def __init__(self, memory: torch.Tensor, without_elements: dict[torch.dtype, torch.Tensor]) -> None:
        """`without_elements`: where tensors of the device by dtype are kept, which blocks made together share."""
        self.memory = memory
        self._storage = memory.untyped_storage()
        self._without_elements = without_elements

    @property
    def address(self) -> int:
        return self.memory.data_ptr()

    @property
    def owner(self) -> object:
        return self._storage

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...], offset_bytes: int) -> torch.Tensor:
        empty: Any = self._without_elements.get(dtype)  # torch's stubs know set_ with strides alone.
        if empty is None:
            with torch.inference_mode(False):  # Others share it, and what is made of it.
                empty = self._without_elements[dtype] = torch.empty(0, dtype=dtype, device=self.memory.device)
        # `data` has a version counter of its own, which a view lacks, and takes less time than torch.empty.
        tensor: torch.Tensor = empty.data.set_(self._storage, offset_bytes // dtype.itemsize, shape)
        return tensor


def allocate_block(phase_bytes: int, size_bytes: int, device: torch.device = CPU) -> Block:
    """Allocates memory; on the host its address is `phase_bytes` modulo the page. Its contents are unspecified."""
    if device.type == "cpu":
        return _allocate_host(phase_bytes, size_bytes)
    return DeviceBlock(torch.empty(size_bytes, dtype=torch.uint8, device=device), {})


def allocate(plan: _native.SegmentPlan, device: torch.device, home: torch.device, usual_bytes: int = 0) -> list[Block]:
    """Allocates the blocks of a plan for `device` on `home`, which is the CPU if the engine cannot use the device.

    On the host, blocks of more than half of `usual_bytes`, up to that, get memory of one size.
    """
    if device.type == "cpu":
        return [_allocate_host(phase_bytes, size_bytes, usual_bytes) for size_bytes, phase_bytes in plan.blocks]
    shared: dict[torch.dtype, torch.Tensor] = {}
    sizes = (size_bytes for size_bytes, _ in plan.blocks)
    return [DeviceBlock(torch.empty(size_bytes, dtype=torch.uint8, device=home), shared) for size_bytes in sizes]


def _allocate_host(phase_bytes: int, size_bytes: int, usual_bytes: int = 0) -> HostBlock:
    """Allocates memory whose address is `phase_bytes` modulo a page, or a huge page if it has the size of one.

    The engine can read whole pages in place if that is the offset in the file.
    """
    room_bytes = size_bytes
    if usual_bytes // 2 < size_bytes <= usual_bytes:  # What is not used of it is never touched, and takes no pages.
        room_bytes = usual_bytes + _HUGE_PAGE_BYTES - phase_bytes % _HUGE_PAGE_BYTES
    return HostBlock(_native.HostMemory(room_bytes, phase_bytes), size_bytes)


def aligned_phase(offset_bytes: int, dtype: torch.dtype) -> int:
    """Returns the phase of memory for elements at `offset_bytes` of a file: that of the file, or 0 to align them."""
    return 0 if offset_bytes % dtype.itemsize else offset_bytes


def allocate_tensor(dtype: str, shape: Sequence[int], offset_bytes: int, device: torch.device) -> torch.Tensor:
    """Allocates a tensor of its own memory for bytes at `offset_bytes` of a file. Its values are unspecified."""
    torch_dtype = string_to_dtype(dtype)
    size_bytes = math.prod(shape) * torch_dtype.itemsize
    if size_bytes < _HUGE_PAGE_BYTES:  # The number of mappings of a process is limited.
        return torch.empty(tuple(shape), dtype=torch_dtype, device=device)
    phase_bytes = aligned_phase(offset_bytes, torch_dtype)
    return allocate_block(phase_bytes, size_bytes, device).tensor(torch_dtype, tuple(shape), 0)


def extent_bytes(tensor: torch.Tensor) -> int:
    """Returns the size of the memory from the first element to the end of the last one; 0 if there are none."""
    if tensor.is_contiguous():
        return tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(last + 1) * tensor.element_size() if tensor.numel() else 0


def end_bytes(tensor: torch.Tensor) -> int:
    """Returns the place in the storage where the last element ends, which may be past its end; 0 if there are none."""
    return int(tensor.storage_offset()) * tensor.element_size() + extent_bytes(tensor) if tensor.numel() else 0


def map_file(file: File) -> MappedFile:
    """Maps a whole file, privately and writable. If others truncate the file, touching the mapping is SIGBUS.

    The file may be larger than memory, because only pages that are written to take any of their own. Raises OSError
    with the file's name, also where the process has no descriptor left for the one that the mapping keeps.
    """
    if not file.is_unchanged():
        raise OSError(errno.ESTALE, "the file was changed", os.fspath(file.path))
    size_bytes = file.identity[2]
    # Otherwise the kernel would ask for room for a copy of every page.
    flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
    try:
        buffer = mmap.mmap(file.fd, size_bytes, flags, mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError as error:
        error.filename = os.fspath(file.path)
        raise
    return MappedFile(buffer, size_bytes)
