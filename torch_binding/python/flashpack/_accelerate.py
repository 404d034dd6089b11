"""flashpack.accelerate(): programs that know only safetensors load through the engine. This needs no torch."""

from __future__ import annotations

import errno
import functools
import inspect
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors

from ._logging import logger
from ._native import FlashPackError, bindings_of
from ._owner_process import held_by_forks

original_open: Any = safetensors.safe_open
"""This opens files without flashpack. `safetensors.safe_open` may stand for this package by now."""
# These modules keep the original, because they call it.
_LEFT_ALONE = ("safetensors._safetensors_rust", "flashpack.safetensors.torch", __name__)
_LACKS_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)
_lock = threading.RLock()
held_by_forks(_lock)
_active: set[Acceleration] = set()
_undo: list[tuple[Any, str, Any]] = []
"""The functions of transformers that are wrapped: their owner, their name, and the original."""


class Acceleration:
    """The changes of flashpack.accelerate(), until undo() or the end of a with block. Its text has their places."""

    def undo(self) -> None:
        """Puts the original back, unless another accelerate() is still in force. May be called again."""
        with _lock:
            _active.discard(self)
            if not _active:
                _replace(safe_open, original_open)
                while _undo:
                    setattr(*_undo.pop())

    def patched(self) -> list[str]:
        """Returns the names that stand for the engine now: "safetensors.safe_open" and others."""
        with _lock:
            names = {f"{module.__name__}.{name}" for module, name in _bindings_of(safe_open)}
            wrapped = {f"{getattr(owner, '__module__', owner.__name__)}.{name}" for owner, name, _ in _undo}
            return sorted(names | wrapped) if self in _active else []

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"<flashpack.accelerate(): {', '.join(self.patched()) or 'undone'}>"


def accelerate() -> Acceleration:
    """Lets transformers, diffusers, accelerate, torch.load and all others that use safetensors load through flashpack.

    `safetensors.safe_open` is replaced, also where a module that is imported already has it under any name. All of
    safetensors.torch goes through it. What transformers loads to a GPU is read straight to it. On the CPU, tensors
    share the page cache's memory, as with safetensors, and what is not there is read ahead. Frameworks other than
    torch, devices other than the CPU and CUDA, and files that this package cannot read are left to safetensors, whose
    errors the caller gets.

    This is in force until undo() of the result or, as a context manager, to the end of the block. It may be called
    again; then the original comes back when all have been undone. `FLASHPACK_ACCELERATE=1` in the environment calls it
    when Python starts.

        with flashpack.accelerate():
            model = AutoModelForCausalLM.from_pretrained(name)
    """
    with _lock:
        handle = Acceleration()
        _active.add(handle)
        _replace(original_open, safe_open)
        return handle


class _TellsHandles(type):
    """Programs may ask what they opened is an instance of."""

    def __instancecheck__(cls, handle: object) -> bool:
        ours = sys.modules.get("flashpack.safetensors")  # Only what has loaded it can have made one of its handles.
        return isinstance(handle, original_open) or (ours is not None and isinstance(handle, ours.safe_open))


class safe_open(metaclass=_TellsHandles):  # noqa: N801  It has the name of what it stands for.
    """safetensors.safe_open, as accelerate() puts it in place.

    The arguments are those of the original, and mean the same: by default tensors on the CPU share the memory of the
    page cache.
    """

    def __new__(cls, filename: Any, framework: str, device: Any = "cpu", *, backend: Any = "mmap") -> Any:
        options = {} if backend == "mmap" else {"backend": backend}  # Older versions do not know the argument.
        if framework not in ("pt", "torch", "pytorch"):
            return original_open(filename, framework, device, **options)
        from .safetensors import torch as ours

        _wrap_transformers()
        try:
            return ours.safe_open(filename, framework, device, backend=backend)
        except (FlashPackError, OSError) as error:
            if Path(os.fsdecode(filename)).is_fifo():
                raise  # The original would wait for somebody to write to it.
            try:
                handle = original_open(filename, framework, device, **options)
            except Exception:  # Its error is the one that callers know.
                if isinstance(error, OSError) and error.errno in _LACKS_DESCRIPTORS:
                    raise error from None  # That of safetensors would be that the file is not there.
                raise
            logger.warning("left to safetensors: %s", error)
            return handle


def _replace(old: object, new: object) -> None:
    for module, name in list(_bindings_of(old)):
        setattr(module, name, new)


def _bindings_of(wanted: object) -> Iterator[tuple[Any, str]]:
    """Yields each global name of an imported module that stands for `wanted`."""
    for module, name in bindings_of(wanted, list(sys.modules.values())):
        # vars() would load a module of importlib's LazyLoader, which may fail.
        if object.__getattribute__(module, "__dict__").get("__name__", __name__) not in _LEFT_ALONE:
            yield module, name


def _wrap_transformers() -> None:
    """Lets transformers read slices straight to the GPU that it would copy them to, if it does that as we know it."""
    with _lock:
        if not _active:
            return
        # Each time, because programs may import these modules after they have opened their first file.
        loading = sys.modules.get("transformers.core_model_loading")
        sharding = sys.modules.get("transformers.distributed.sharding_utils")
        _wrap(loading, "_materialize_copy", "tensor")
        _wrap(getattr(sharding, "DtensorShardOperation", None), "shard_tensor", "source")


def _wrap(owner: Any, name: str, argument: str) -> None:
    """Wraps a function so that a slice that it is given as `argument` is one on the device that it is given."""
    original = getattr(owner, name, None)
    if original is None or any(each is owner and known == name for each, known, _ in _undo):
        return
    # The two arguments are found by their places: signature.bind() takes long beside the load of a mapped tensor.
    parameters = list(inspect.signature(original).parameters)
    if not {argument, "device"} <= set(parameters):
        return
    at, device_at = parameters.index(argument), parameters.index("device")

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        device = kwargs["device"] if "device" in kwargs else args[device_at] if len(args) > device_at else None
        if argument in kwargs:
            kwargs[argument] = _on_device(kwargs[argument], device)
        elif len(args) > at:
            args = (*args[:at], _on_device(args[at], device), *args[at + 1 :])
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)
    _undo.append((owner, name, original))


def _on_device(tensor: Any, device: Any) -> Any:
    from .safetensors import torch as ours

    return tensor.on(device) if isinstance(tensor, ours.PySafeSlice) and ours.is_gpu(device) else tensor
