"""Checkpoints in other formats, for tests that convert them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import safetensors.torch
import torch
from support import random_tensor

STATE = {
    "weight": random_tensor((300, 70), seed=1),
    "bias": random_tensor((70,), seed=2),
    "half": random_tensor((9, 3), torch.bfloat16, 3),
    "scale": random_tensor((), torch.float32, 4),
    "count": torch.tensor(7),
}


def save_index(path: Path, shards: dict[str, dict[str, torch.Tensor]]) -> Path:
    """An index beside its shards, in the format that their suffix says."""
    for name, tensors in shards.items():
        if name.endswith(".safetensors"):
            safetensors.torch.save_file(tensors, path.parent / name)
        else:
            torch.save(tensors, path.parent / name)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return path


def names_in(directory: Path) -> list[str]:
    return sorted(os.fspath(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def halves() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    items = list(STATE.items())
    return dict(items[:2]), dict(items[2:])
