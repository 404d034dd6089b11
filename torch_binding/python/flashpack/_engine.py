"""The engines of this process, one per device and profile. They are made on first use, gone at exit, and not used after
a fork.
"""

from __future__ import annotations

import atexit
import errno
import logging
import os
import stat
import threading
import traceback
from contextlib import ContextDecorator, suppress
from types import TracebackType
from typing import Any

from ._checkpoint import File
from ._logging import logger
from ._native import Engine, FlashPackError, Trace, enter_call, leave_call, tuned_options

_engines: dict[tuple[int | None, str], Engine] = {}
_tuned: dict[tuple[int | None, int], dict[str, Any]] = {}
# The log levels by the use of a profile: if it is ignored, the one who tuned the machine sees it without asking.
_LEVELS = {"none": logging.DEBUG, "used": logging.INFO, "ignored": logging.WARNING}
_lock = threading.RLock()  # A signal handler may load or save while this thread makes an engine.
_traces: list[Trace | None] = []  # None if there is to be no trace; empty before the first engine.


class _Call(ContextDecorator):
    """Around calls that must end before the interpreter does: it waits for them, and daemon threads raise SystemExit.

    Otherwise Python would end daemon threads inside of C++, which aborts the process and leaves temporary files.
    """

    def __enter__(self) -> None:
        enter_call()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is SystemExit and trace is not None:
            traceback.clear_frames(trace)  # Freeing memory gives up the GIL, so that it is done within the call.
        leave_call()


left_before_exit = _Call()


def engine(cuda_device: int | None = None, file: File | None = None) -> Engine:
    """Returns the engine for the host, or for a CUDA device, with the profile for loads of `file` if there is one."""
    options = {} if file is None else _options(cuda_device, file)
    if file is None or not options:
        return _made(cuda_device, {})
    try:
        return _made(cuda_device, options)
    except (FlashPackError, OSError, MemoryError) as error:  # As under a limit on memory or threads.
        usual = _made(cuda_device, {})
        logger.warning("loads go on with the defaults, without the profile %s: %s", options["profile"], error)
        _tuned[cuda_device, file.identity[0]] = {}
        return usual


def _made(cuda_device: int | None, options: dict[str, Any]) -> Engine:
    key = (cuda_device, options.get("profile", ""))
    with _lock:
        if key not in _engines:
            made = Engine(cuda_device, trace=_trace(), **options)
            _engines.setdefault(key, made)  # A signal handler may have made it meanwhile.
        return _engines[key]


def _trace() -> Trace | None:
    """Returns the trace that FLASHPACK_TRACE asks for, which all engines of the process share, with engines to come."""
    if not _traces:
        path = os.environ.get("FLASHPACK_TRACE")
        _traces.append(_new_trace(path) if path else None)
    return _traces[0]


def _new_trace(path: str) -> Trace | None:
    try:
        try:
            return _opened_trace(path)
        except BlockingIOError:  # Another process has it.
            stem, extension = os.path.splitext(path)
            return _opened_trace(f"{stem}.{os.getpid()}{extension}")
    except OSError as error:
        logger.warning("there is no trace of loads and saves: %s", error)
        return None


def _opened_trace(path: str) -> Trace:
    """Refuses a FIFO, which would hold up the load until somebody reads it, and a disk, whose data it would replace."""
    mode = stat.S_IFREG
    with suppress(OSError):  # It does not exist yet, or opening it will tell why not.
        mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISCHR(mode)):
        raise OSError(errno.EINVAL, "a trace is written to a regular file, which this is not", path)
    return Trace(path)


def _options(cuda_device: int | None, file: File) -> dict[str, Any]:
    """Returns what flashpack_tune has found for the disk of `file`.

    It is looked up once, because small reads are many. It is looked up without the lock, because the file system of the
    profiles may hang, and loads of other disks must not wait for it.
    """
    key = (cuda_device, file.identity[0])
    found = _tuned.get(key)
    if found is None:
        found, reason, use = tuned_options(os.fspath(file.path), cuda_device)
        if not found:
            logger.log(_LEVELS[use], "loads like that of %s have the defaults: %s", file.path, reason)
    return _tuned.setdefault(key, found)


def release_engines() -> None:
    """Releases the engines and their memory once their transfers are done; the next use makes new engines."""
    with _lock:
        _engines.clear()
        _tuned.clear()


def _drop_in_child() -> None:
    # A thread that does not exist in the child may have held the lock.
    global _lock
    _lock = threading.RLock()
    _engines.clear()
    _traces.clear()


atexit.register(release_engines)
os.register_at_fork(after_in_child=_drop_in_child)
