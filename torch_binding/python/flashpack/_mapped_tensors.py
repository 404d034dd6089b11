"""Tensors that share their memory with the page cache, and reading into that cache ahead of their use."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import _native
from ._checkpoint import Entry, File
from ._file import FlashPackFile, TensorSlice, UnknownIndexError
from ._logging import logger
from ._memory import MappedFile, extent_bytes, map_file
from ._owner_process import held_by_forks
from ._prefetch import open_again
from .utils import string_to_dtype

# Files are read ahead in pieces of this size, of which those that are cached are left out. Threads that end with their
# mapping finish one piece; smaller pieces would be many.
_PIECE_BYTES = 8 << 20
# As many threads as those of a prefetch read ahead, for the same reason.
_STREAMS = 4
# Bytes are read to memory of this size, which stays in the CPU's caches; with less, the calls would be more.
_SCRATCH_BYTES = 1 << 20
# Looking at every page would cost more than mapping them.
_LOOK_BYTES = 512 << 10

_lock = threading.RLock()  # A signal handler may fork while this thread holds it.
held_by_forks(_lock)
_mapped_bytes: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
"""The sizes of the files that are mapped now."""


class MappedTensors:
    """The tensors of one or several files on the CPU, without a copy.

    They share the page cache's memory until they are written to.

    Whole tensors that are not in the page cache are read into it in the background. Parts of tensors are then read into
    memory of their own, so that nothing around them is read.

    If somebody truncates the file, touching such a tensor kills the process (SIGBUS).
    """

    def __init__(self, file: FlashPackFile) -> None:
        self._file = file
        self._maps: dict[int, _Map] = {}

    def tensor(self, entry: Entry) -> torch.Tensor:
        if not _is_aligned(entry):
            return self._file.get(entry.name)
        tensor = self._view(entry)
        self._read_ahead(entry, entry.size_bytes)
        return tensor

    def tensors(self, entries: Sequence[Entry]) -> dict[str, torch.Tensor]:
        """Returns them, which are in file order. What lies between the first and the last of a file is read ahead."""
        there = [entry for entry in entries if _is_aligned(entry)]
        every = {each.name: self._view(each) if _is_aligned(each) else self._file.get(each.name) for each in entries}
        for _, of_file in groupby(there, key=lambda each: each.file):
            first, *others = of_file
            last = others[-1] if others else first
            self._read_ahead(first, last.offset_bytes + last.size_bytes - first.offset_bytes)
        return every

    def part(self, entry: Entry, index: Any) -> torch.Tensor:
        """Returns what torch gives for `index`."""
        if index is ...:
            return self.tensor(entry)
        if _is_aligned(entry):
            whole = self._view(entry)
            part = whole[index]
            if part.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
                return part  # It is a copy.
            if part.numel() == whole.numel():
                self._read_ahead(entry, entry.size_bytes)
                return part
            of_file = self._map_of(entry)
            if of_file.is_cached(part.data_ptr() - of_file.address, extent_bytes(part)):
                return part
        try:
            return TensorSlice(self._file, entry)[index]
        except UnknownIndexError:  # None, which adds a dim.
            return self.tensor(entry)[index]

    def _view(self, entry: Entry) -> torch.Tensor:
        block = self._map_of(entry).block
        return block.tensor(string_to_dtype(entry.dtype), entry.shape, entry.offset_bytes)

    def _map_of(self, entry: Entry) -> _Map:
        """Returns the mapping of the file that has the tensor, made when it is first used."""
        if entry.file not in self._maps:
            file = self._file._checkpoint.files()[entry.file]
            block = map_file(file)
            with _lock:
                _mapped_bytes[block._buffer] = block.size_bytes
                fits = 2 * sum(_mapped_bytes.values()) < _memory_bytes()
            # What is read too far ahead would be displaced before it is used.
            ahead = _read_ahead_of(file.fd, block.owner) if fits else None
            made = _Map(file, block, block.address, _is_told_what_is_cached(file.fd), ahead)
            self._maps.setdefault(entry.file, made)  # Two threads may each map the file; then one mapping is dropped.
        return self._maps[entry.file]

    def _read_ahead(self, first: Entry, size_bytes: int) -> None:
        """Starts to read this much of a file, from the tensor `first` on."""
        of_file = self._map_of(first)
        if of_file.ahead is None:
            return
        for at in range(first.offset_bytes, first.offset_bytes + size_bytes, _PIECE_BYTES):
            piece_bytes = min(_PIECE_BYTES, first.offset_bytes + size_bytes - at)
            if not of_file.is_cached(at, piece_bytes):
                of_file.ahead.want(at, piece_bytes)


class _Map(NamedTuple):
    """One file."""

    file: File
    block: MappedFile
    address: int
    is_told: bool
    """Whether the kernel tells which of its pages are cached."""
    ahead: _ReadAhead | None

    def is_cached(self, offset_bytes: int, size_bytes: int) -> bool:
        """Returns whether this part of the open file is in the page cache, as far as a few pages tell."""
        if self.is_told:
            return _is_cached(self.address + offset_bytes, size_bytes)
        return _is_read_at_once(self.file.fd, offset_bytes, size_bytes)


class _ReadAhead:
    """Ranges of a file on their way into the page cache, by threads that end when there is nothing left to read.

    They also end once the mapping and all tensors in it are gone, which may be long after the file was closed. At the
    end of the interpreter each of them is in one read at most.

    It has no locks: that a thread too many or too few is started, also in a forked child, costs only speed.
    """

    def __init__(self, fd: int, mapping: object) -> None:
        self._file = open_again(fd)
        weakref.finalize(self, self._file.close).atexit = False
        self._mapping = weakref.ref(mapping)
        self._ranges: deque[tuple[int, int]] = deque()
        self._threads = 0

    def want(self, offset_bytes: int, size_bytes: int) -> None:
        self._ranges.append((offset_bytes, offset_bytes + size_bytes))
        if self._threads < _STREAMS:
            self._threads += 1
            try:
                threading.Thread(target=self._read, name="flashpack-read-ahead", daemon=True).start()
            except RuntimeError:  # There are too many threads, or the interpreter ends.
                self._threads -= 1

    def _read(self) -> None:
        try:
            # Reading into memory touches the pages, as sendfile() does not. In a virtual machine that is slow, and else
            # whoever computes with them next has to wait for it.
            scratch = memoryview(bytearray(_SCRATCH_BYTES))
            with open_again(self._file.fileno()) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
                while self._mapping() is not None:
                    begin, end = self._ranges.popleft()
                    while begin < end and (size_bytes := os.preadv(file.fileno(), [scratch[: end - begin]], begin)):
                        begin += size_bytes
        except (IndexError, OSError):  # Nothing is left to read, or who touches the pages will meet the same error.
            pass
        finally:
            self._threads -= 1


def _read_ahead_of(fd: int, mapping: object) -> _ReadAhead | None:
    """Returns none where the file cannot be opened again: its tensors can be used all the same."""
    try:
        return _ReadAhead(fd, mapping)
    except OSError as error:
        logger.debug("nothing is read ahead: %s", error)
        return None


def _is_aligned(entry: Entry) -> bool:
    return entry.size_bytes > 0 and entry.offset_bytes % string_to_dtype(entry.dtype).itemsize == 0


def _is_told_what_is_cached(fd: int) -> bool:
    """Returns whether the kernel tells this process which pages of a mapped file are cached.

    It tells so of files that are the user's own, or that the user may write. All pages of other files seem to be there.
    """
    own = os.fstat(fd).st_uid == os.geteuid()
    return own or os.access(f"/proc/self/fd/{fd}", os.W_OK, effective_ids=True)


def _is_cached(address: int, size_bytes: int) -> bool:
    """Returns whether this part of a mapping is in the page cache, as far as a few pages tell."""
    return _native.is_cached(address, size_bytes, _LOOK_BYTES)


def _is_read_at_once(fd: int, offset_bytes: int, size_bytes: int) -> bool:
    """Returns the same for a file of which the kernel does not tell.

    Each look makes the kernel read around it, so that a second look at the same place would find what the first has
    brought in.
    """
    byte = bytearray(1)
    try:
        for at in (*range(offset_bytes, offset_bytes + size_bytes, _LOOK_BYTES), offset_bytes + size_bytes - 1):
            os.preadv(fd, [byte], at, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except OSError:  # The file system cannot read so, or fails: whoever touches the page will see.
        pass
    return True


@cache
def _memory_bytes() -> int:
    """Returns the size of the memory, or of that part of it that this container may use."""
    total_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(total_bytes, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    except (OSError, ValueError):  # There is no limit, or it is elsewhere.
        return total_bytes
