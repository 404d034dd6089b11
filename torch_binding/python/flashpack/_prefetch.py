"""Reading a file into the page cache ahead of its load. Needs no torch."""

from __future__ import annotations

import errno
import os
import threading
import time
from io import FileIO
from typing import NoReturn

from ._checkpoint import open_checkpoint
from ._listing import human_bytes
from ._logging import printable
from ._native import FlashPackError
from ._owner_process import OwnerProcess
from ._paths import StrPath

# sendfile() to /dev/null waits for the pages without copying them, which preadv would. POSIX_FADV_WILLNEED and
# MADV_POPULATE_READ stop early where the kernel reads ahead by little (read_ahead_kb). There, one stream leaves a fast
# disk idle between its reads, and more than a few take cores from whoever prepares something else meanwhile.
_STREAMS = 4
# cancel() and progress() wait for the end of a step. With smaller steps, threads would want the GIL more often.
_STEP_BYTES = 8 << 20


class Prefetch:
    """A payload on its way into the page cache, read by threads of this process.

    The threads go on when the handle is dropped, and end with the process. As a context manager the handle cancels the
    rest at the end of the block. It is thread-safe, but cannot be used in a forked child or pickled.
    """

    def __init__(self, fd: int, path: StrPath, size_bytes: int) -> None:
        """Use prefetch_flashpack_file. Borrows `fd` until it returns."""
        self._owner = OwnerProcess()
        self._path = os.fsdecode(path)
        self._size_bytes = size_bytes
        self._stop = threading.Event()
        # Not the error itself: each wait() raises one of its own, or the traceback of one would grow with every wait.
        self._failure: tuple[int, str] | None = None
        steps = -(-size_bytes // _STEP_BYTES)
        part_bytes = -(-steps // _STREAMS) * _STEP_BYTES
        begins = range(0, size_bytes, part_bytes or 1)
        self._done_bytes = [0] * len(begins)
        files = [open_again(fd) for _ in begins]
        self._threads = [
            threading.Thread(
                target=self._read,
                args=(part, file, begin, min(begin + part_bytes, size_bytes)),
                name="flashpack-prefetch",
                daemon=True,
            )
            for part, (file, begin) in enumerate(zip(files, begins, strict=True))
        ]
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:  # There are too many threads, or an interrupt: nobody could cancel those that run.
            self._stop.set()
            raise

    def __repr__(self) -> str:
        done, total = human_bytes(sum(self._done_bytes)), human_bytes(self._size_bytes)
        return f"Prefetch({printable(self._path)!r}, {done} of {total})"

    def progress(self) -> tuple[int, int]:
        """Returns the bytes that are in the page cache by now, and the bytes in all."""
        self._owner.require_current("a prefetch")
        return sum(self._done_bytes), self._size_bytes

    def wait(self, timeout: float | None = None) -> None:
        """Returns when everything is in the page cache. May be called again, with the same result.

        Raises TimeoutError after `timeout` seconds, and OSError if reading fails; its errno is ECANCELED if a cancel()
        came before the end.
        """
        self._owner.require_current("a prefetch")
        deadline = None if timeout is None else time.monotonic() + timeout
        for thread in self._threads:
            thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            raise TimeoutError(errno.ETIMEDOUT, "the file is not in the page cache yet", self._path)
        if self._failure is not None:
            raise OSError(*self._failure, self._path)
        if sum(self._done_bytes) < self._size_bytes:
            raise OSError(errno.ECANCELED, "the prefetch was cancelled", self._path)

    def cancel(self) -> None:
        """Stops every thread after the read that it is in. Returns at once; wait() returns when all have stopped."""
        self._owner.require_current("a prefetch")
        self._stop.set()

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def __reduce__(self) -> NoReturn:
        raise TypeError("cannot pickle or copy: it owns threads; make one in each process")

    def _read(self, part: int, file: FileIO, begin: int, end: int) -> None:
        try:
            with file, FileIO("/dev/null", "w") as sink:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
                while begin < end and not self._stop.is_set():
                    sent_bytes = os.sendfile(sink.fileno(), file.fileno(), begin, min(_STEP_BYTES, end - begin))
                    if sent_bytes == 0:
                        raise OSError(errno.EIO, "the file ends before its payload")
                    begin += sent_bytes
                    self._done_bytes[part] += sent_bytes
        except OSError as error:
            self._failure = (error.errno or errno.EIO, error.strerror or str(error))
            self._stop.set()


def open_again(fd: int) -> FileIO:
    """Opens the file again, because the kernel reads ahead for each open file. Its path may lead to another one now."""
    try:
        return FileIO(f"/proc/self/fd/{fd}")
    except OSError:  # There is no /proc, or this process may not open the file any more.
        return FileIO(os.dup(fd))


def prefetch_flashpack_file(path: StrPath) -> Prefetch:
    """Starts to read the payload of a flashpack or safetensors file into the page cache, where a later load finds it.

    Returns at once. This saves time only while something else is being prepared: a load alone is not faster for it.

    Raises FlashPackError (a ValueError) for what is neither, and for several files; OSError for the system's failures.

        with flashpack.prefetch_flashpack_file("model.flashpack"):
            model = build_model()
            flashpack.assign_from_file(model, "model.flashpack")
    """
    with open_checkpoint(path) as checkpoint:
        files = checkpoint.files()
        if len(files) > 1:
            raise FlashPackError(f"{checkpoint} has several files: read each of them ahead by its own path")
        return Prefetch(files[0].fd, path, checkpoint.native.payload_bytes)
