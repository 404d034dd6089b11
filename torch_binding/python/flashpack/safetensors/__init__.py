"""safetensors' API, under its own names, for safetensors and flashpack files alike.

`from flashpack.safetensors import safe_open` takes the place of `from safetensors import safe_open`, and
`from flashpack.safetensors.torch import load_file` that of `from safetensors.torch import load_file`. Both modules have
all names of both. Modules for other frameworks, such as `flashpack.safetensors.numpy`, are copies of those of
safetensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import safetensors

from . import torch
from .torch import (
    CheckpointError,
    SafetensorError,
    TensorMeta,
    load,
    load_file,
    load_model,
    safe_open,
    save,
    save_file,
    save_model,
)

if TYPE_CHECKING:
    from .torch import PrefetchLoader

__all__ = [
    "CheckpointError",
    "PrefetchLoader",
    "SafetensorError",
    "TensorMeta",
    "load",
    "load_file",
    "load_model",
    "safe_open",
    "save",
    "save_file",
    "save_model",
]

# Imports of the modules for other frameworks find the files of safetensors.
__path__.extend(safetensors.__path__)


def __getattr__(name: str) -> Any:
    try:
        return getattr(torch, name)
    except AttributeError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
