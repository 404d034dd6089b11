"""The engines of this process, one per device: made on first use, gone at exit, never inherited by a fork."""

from __future__ import annotations

import atexit
import os
import threading

from ._native import Engine

_engines: dict[int | None, Engine] = {}
_lock = threading.Lock()


def engine(cuda_device: int | None = None) -> Engine:
    """The engine for the host, or for a CUDA device."""
    with _lock:
        if cuda_device not in _engines:
            _engines[cuda_device] = Engine(cuda_device)
        return _engines[cuda_device]


def release_engines() -> None:
    """Gives back what they hold, once what is under way is done; the next use makes new ones."""
    with _lock:
        _engines.clear()


def _drop_in_child() -> None:
    # The thread that held the lock may not exist here.
    global _lock
    _lock = threading.Lock()
    _engines.clear()


atexit.register(release_engines)
os.register_at_fork(after_in_child=_drop_in_child)
