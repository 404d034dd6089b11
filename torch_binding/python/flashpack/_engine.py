"""The one engine of this process: made on first use, gone at exit, never inherited by a fork."""

from __future__ import annotations

import atexit
import os
import threading

from ._native import Engine

_engine: Engine | None = None
_lock = threading.Lock()


def engine() -> Engine:
    global _engine
    with _lock:
        if _engine is None:
            _engine = Engine()
        return _engine


def _drop() -> None:
    global _engine
    _engine = None


def _drop_in_child() -> None:
    # The thread that held the lock may not exist here.
    global _lock
    _lock = threading.Lock()
    _drop()


atexit.register(_drop)
os.register_at_fork(after_in_child=_drop_in_child)
