"""Shared by the tests on a real CUDA device. Without one, to import this skips the whole file, or fails where a machine
with a GPU says FLASHPACK_REQUIRE_GPU=1.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from flashpack.deserialization import FlashTensorStorage, iterate_from_flash_tensor, read_flashpack_file
from support import random_tensor, require_gpu

require_gpu()

Tensors = dict[str, torch.Tensor]
MIB = 1 << 20
DEVICE = torch.device("cuda", 0)
# Several chunks and slots, edges in the middle of pages, and small ones that go in batches.
SIZES = [5 * MIB + 3, 40 * MIB, 1, 0, *range(1000, 3000, 17)]


def state_dict(sizes: Iterable[int] = SIZES, seed: int = 0) -> Tensors:
    return {f"t{i}": random_tensor((size,), torch.bfloat16, seed + i) for i, size in enumerate(sizes)}


def load(path: Path, device: str | torch.device = DEVICE) -> tuple[FlashTensorStorage, Tensors]:
    storage, metadata = read_flashpack_file(path, device)
    return storage, dict(iterate_from_flash_tensor(storage, metadata))


def on_host(tensors: Tensors) -> Tensors:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def nbytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
