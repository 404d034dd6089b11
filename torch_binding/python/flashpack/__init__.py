"""flashpack: model checkpoints between disk and memory at hardware speed.

Importing this package imports neither torch nor numpy; the first use of a name that needs them does.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from ._logging import printable
from ._native import FlashPackError, kept_memory_bytes, release_kept_memory
from .version import __commit_id__, __version__, __version_tuple__, commit_id, version, version_tuple

if TYPE_CHECKING:
    from . import (
        cli,
        commands,
        constants,
        deserialization,
        integrations,
        mixin,
        parallel_read,
        safetensors,
        serialization,
        utils,
    )
    from ._accelerate import Acceleration, accelerate
    from ._checkpoint import get_flashpack_file_metadata, is_flashpack_file
    from ._file import load_file, open_file
    from ._prefetch import Prefetch, prefetch_flashpack_file
    from ._stream import stream_tensors
    from .deserialization import (
        AssignReport,
        assign_from_file,
        iterate_from_flash_tensor,
        read_flashpack_file,
        read_flashpack_file_distributed,
        revert_from_file,
        verify_file,
    )
    from .integrations import patch_integrations
    from .mixin import FlashPackMixin
    from .safetensors import load_model, safe_open, save_file, save_model
    from .serialization import pack_to_file

__all__ = [
    "Acceleration",
    "AssignReport",
    "FlashPackError",
    "FlashPackMixin",
    "Prefetch",
    "__commit_id__",
    "__implementation__",
    "__version__",
    "__version_tuple__",
    "accelerate",
    "assign_from_file",
    "cli",
    "commands",
    "commit_id",
    "constants",
    "deserialization",
    "get_flashpack_file_metadata",
    "integrations",
    "is_flashpack_file",
    "iterate_from_flash_tensor",
    "kept_memory_bytes",
    "load_file",
    "load_model",
    "mixin",
    "open_file",
    "pack_to_file",
    "parallel_read",
    "patch_integrations",
    "prefetch_flashpack_file",
    "read_flashpack_file",
    "read_flashpack_file_distributed",
    "release_kept_memory",
    "revert_from_file",
    "safe_open",
    "safetensors",
    "save_file",
    "save_model",
    "serialization",
    "stream_tensors",
    "utils",
    "verify_file",
    "version",
    "version_tuple",
]

__implementation__ = "cpp"
# Callers catch and pickle the class by this name; it is made in _native.
FlashPackError.__module__ = __name__


def _message_of(error: FlashPackError) -> str:
    return printable(ValueError.__str__(error))


# Files and tensors may have any names, so that a message is made one printable line, as in the log.
FlashPackError.__str__ = _message_of  # type: ignore[assignment, method-assign]

_SUBMODULES = frozenset(
    {
        "cli",
        "commands",
        "constants",
        "deserialization",
        "integrations",
        "mixin",
        "parallel_read",
        "safetensors",
        "serialization",
        "utils",
    }
)
_HOME_OF = {
    "Acceleration": "_accelerate",
    "AssignReport": "deserialization",
    "FlashPackMixin": "mixin",
    "Prefetch": "_prefetch",
    "accelerate": "_accelerate",
    "assign_from_file": "deserialization",
    "get_flashpack_file_metadata": "_checkpoint",
    "is_flashpack_file": "_checkpoint",
    "iterate_from_flash_tensor": "deserialization",
    "load_file": "_file",
    "load_model": "safetensors",
    "open_file": "_file",
    "pack_to_file": "serialization",
    "patch_integrations": "integrations",
    "prefetch_flashpack_file": "_prefetch",
    "stream_tensors": "_stream",
    "read_flashpack_file": "deserialization",
    "read_flashpack_file_distributed": "deserialization",
    "revert_from_file": "deserialization",
    "safe_open": "safetensors",
    "save_file": "safetensors",
    "save_model": "safetensors",
    "verify_file": "deserialization",
}


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if os.environ.get("FLASHPACK_ACCELERATE") == "1":
    from ._accelerate import accelerate as _accelerate_all

    _accelerate_all()
