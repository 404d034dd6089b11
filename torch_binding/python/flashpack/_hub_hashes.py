"""Files in the cache of the Hugging Face Hub, held against the hashes that are their names there."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

from ._checkpoint import File
from ._links import is_blob, is_blob_link
from ._progress import Progress

# Two chunks of this size are held for each file. With smaller ones, threads would wait for each other more often.
_CHUNK_BYTES = 4 << 20
# The kernel reads so far ahead of the chunk that is being read: enough that a fast disk has work while one is hashed.
_AHEAD_BYTES = 32 << 20
# Progress is told so often, which looks smooth; an error or an interrupt also waits no longer.
_TELL_SECONDS = 0.1
_NAME = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


class Named(NamedTuple):
    """A file, and the hash of its content by which the cache names it."""

    file: File
    hash: str
    """The sha256 of a file in LFS, and git's sha1 of a small one."""

    @property
    def algorithm(self) -> str:
        return "sha256" if len(self.hash) == 64 else "sha1"

    @property
    def size_bytes(self) -> int:
        return self.file.identity[2]


def named_for_its_hash(file: File) -> Named | None:
    """Returns the file with its hash if it is a blob of the cache, whatever links it was opened by."""
    blob = Path(os.readlink(f"/proc/self/fd/{file.fd}"))
    if _NAME.fullmatch(blob.name) and (is_blob(blob) or is_blob_link(file.path)):
        return Named(file, blob.name)
    return None


def hashes_of(files: list[Named], progress: Progress | None) -> list[str]:
    """Returns the hashes that the contents have, each computed by two threads of its own.

    Raises OSError for what cannot be read or changes meanwhile.
    """
    done_bytes = [0] * len(files)
    stop = threading.Event()

    def run(index: int) -> str:
        def tell(count: int) -> None:
            done_bytes[index] = count
            if stop.is_set():
                raise InterruptedError

        return _hash_of(files[index], tell)

    with ThreadPoolExecutor(min(len(files), os.cpu_count() or 1)) as pool:
        try:
            pending = set(hashes := [pool.submit(run, index) for index in range(len(files))])
            while pending:
                done, pending = wait(pending, _TELL_SECONDS)
                for each in done:
                    each.result()  # An error ends the others, too.
                if progress is not None:
                    progress(sum(done_bytes))
        finally:
            stop.set()
    return [each.result() for each in hashes]


def _hash_of(named: Named, tell: Callable[[int], None]) -> str:
    file, size_bytes = named.file, named.size_bytes
    digest = hashlib.new(named.algorithm, usedforsecurity=False)
    if named.algorithm == "sha1":
        digest.update(b"blob %d\0" % size_bytes)
    at = 0
    # Both calls release the GIL, so that one chunk is hashed while the next one is read.
    with ThreadPoolExecutor(1) as reader:
        chunks = [memoryview(bytearray(min(_CHUNK_BYTES, size_bytes))) for _ in range(2)]
        ahead = reader.submit(_read, named, chunks[0], 0)
        while count := ahead.result():
            ready = chunks[0][:count]
            chunks.reverse()
            ahead = reader.submit(_read, named, chunks[0], at + count)
            digest.update(ready)
            at += count
            tell(at)
    if at < size_bytes or not file.is_unchanged():
        raise OSError(errno.ESTALE, "the file has changed since it was opened", os.fspath(file.path))
    return digest.hexdigest()


def _read(named: Named, chunk: memoryview, at: int) -> int:
    """Reads to `chunk` and returns the number of bytes; 0 at the end of the file."""
    if at >= named.size_bytes:
        return 0
    # The disk reads ahead of this thread, too.
    os.posix_fadvise(named.file.fd, at + len(chunk), _AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
    try:
        return os.preadv(named.file.fd, [chunk[: named.size_bytes - at]], at)
    except OSError as error:
        error.filename = os.fspath(named.file.path)
        raise
