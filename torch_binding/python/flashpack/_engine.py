"""The engines of this process, one per device: made on first use, gone at exit, never inherited by a fork."""

from __future__ import annotations

import atexit
import os
import threading
import traceback
from contextlib import ContextDecorator
from types import TracebackType

from ._native import Engine, enter_call, leave_call

_engines: dict[int | None, Engine] = {}
_lock = threading.Lock()


class _Call(ContextDecorator):
    """Around what must be left before the interpreter ends: it waits, and daemon threads raise SystemExit.

    Python would end them within C++, be it torch's, which aborts the process, and files that they write would stay.
    """

    def __enter__(self) -> None:
        enter_call()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is SystemExit and trace is not None:
            traceback.clear_frames(trace)  # To free memory gives up the GIL, too.
        leave_call()


left_before_exit = _Call()


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
