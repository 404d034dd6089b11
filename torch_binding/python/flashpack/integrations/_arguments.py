"""Helpers of both integrations, for the arguments of callers and for what files say before a model is built."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from .._casts import PLAIN_FLOATS
from .._checkpoint import Checkpoint
from ..constants import WEIGHTS_NAME
from ..utils import logger, string_to_dtype


def without_unknown(function: str, arguments: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Returns those of `arguments` that are in `known`. Others are only logged, because 0.4.5 took them, too."""
    dropped = sorted(name for name in arguments if name not in known)
    if dropped:
        logger.warning("%s does not take %s", function, ", ".join(dropped))
    return {name: value for name, value in arguments.items() if name in known}


def requested_dtype(arguments: dict[str, Any]) -> Any:
    """Takes `dtype` and its older name `torch_dtype` out of `arguments`, and returns what they ask for."""
    older = arguments.pop("torch_dtype", None)
    dtype = arguments.pop("dtype", None)
    return older if dtype is None else dtype


def flashpack_file(directory: Path) -> Path:
    """Returns the file with the weights of a model; raises FileNotFoundError if there is none."""
    path = directory / WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, f"Flashpack file {path} not found", str(path))
    return path


def main_dtype(checkpoint: Checkpoint) -> torch.dtype | None:
    """Returns that dtype of PLAIN_FLOATS that most bytes of the file have; None if no tensor has one of them."""
    sizes: Counter[torch.dtype] = Counter()
    for entry in checkpoint.entries():
        sizes[string_to_dtype(entry.dtype)] += entry.size_bytes
    return max((dtype for dtype in sizes if dtype in PLAIN_FLOATS), key=lambda dtype: sizes[dtype], default=None)
