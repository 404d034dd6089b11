from __future__ import annotations

import copy
import errno
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import flashpack
import page_cache
import pytest
import torch
from flashpack import _prefetch
from support import held_in_page_cache, in_a_fork, random_tensor

MIB = 1 << 20


@pytest.fixture
def cold_file():
    """A file of several steps and streams of which nothing is in the page cache."""
    # Not below /tmp, which may be memory.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        path = Path(folder) / "a.flashpack"
        flashpack.pack_to_file({"a": random_tensor((20 * MIB,), torch.int8), "b": random_tensor((5,))}, path)
        if page_cache.drop_from_page_cache(path) != 0:
            pytest.skip("this file system does not let go of cached pages")
        yield path


def is_cached_after(prefetch: Callable[[], object], path: Path) -> bool:
    """Whether all of the file is in the page cache after a prefetch. The kernel may take pages back at once, so that
    one time of several counts."""

    def is_cached() -> bool:
        prefetch()
        return page_cache.resident_fraction(path) == 1

    return any(is_cached() for _ in range(20))


def prefetch(path: Path, size_bytes: int) -> _prefetch.Prefetch:
    with path.open("rb") as file:
        return _prefetch.Prefetch(file.fileno(), path, size_bytes)


class Gate:
    """Stands in for os.sendfile, and lets nobody through before it opens."""

    def __init__(self):
        self.calls = 0
        self.opened = threading.Event()

    def __call__(self, sink, source, offset, size):
        self.calls += 1
        assert self.opened.wait(60)
        return size


@pytest.fixture
def gate(monkeypatch):
    gate = Gate()
    monkeypatch.setattr(os, "sendfile", gate)
    yield gate
    gate.opened.set()


def test_the_payload_is_in_the_page_cache_after_the_wait_and_the_load_finds_it_there(cold_file):
    payload_bytes = 20 * MIB + 20

    def prefetch_and_wait() -> None:
        handle = flashpack.prefetch_flashpack_file(cold_file)
        handle.wait()
        assert handle.progress() == (payload_bytes, payload_bytes)

    assert is_cached_after(prefetch_and_wait, cold_file)
    with held_in_page_cache(cold_file):
        assert flashpack.read_flashpack_file(cold_file)[0].stats["direct_bytes"] == 0


@pytest.mark.parametrize("size_bytes", [1, 8 * MIB, 8 * MIB + 1, 33 * MIB, 100 * MIB])
def test_parts_cover_the_payload_once(tmp_path, monkeypatch, size_bytes):
    sent = []
    monkeypatch.setattr(os, "sendfile", lambda sink, source, offset, size: sent.append((offset, size)) or size)
    path = tmp_path / "a"
    path.touch()
    prefetch(path, size_bytes).wait()
    end = 0
    for offset, size in sorted(sent):
        assert offset == end
        end += size
    assert end == size_bytes


def test_what_was_only_partly_sent_is_sent_again_from_there(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(os, "sendfile", lambda sink, source, offset, size: sent.append((offset, size)) or 1)
    path = tmp_path / "a"
    path.touch()
    handle = prefetch(path, 3)
    handle.wait()
    assert sent == [(0, 3), (1, 2), (2, 1)]
    assert handle.progress() == (3, 3)


def test_an_empty_payload_is_done_at_once(tmp_path):
    (tmp_path / "a").touch()
    handle = prefetch(tmp_path / "a", 0)
    handle.wait(0)
    assert handle.progress() == (0, 0)


def test_it_goes_on_when_nobody_holds_the_handle(cold_file):
    def prefetch_and_join() -> None:
        before = set(threading.enumerate())
        flashpack.prefetch_flashpack_file(cold_file)
        for thread in set(threading.enumerate()) - before:
            thread.join(60)

    assert is_cached_after(prefetch_and_join, cold_file)


def test_what_is_no_flashpack_file_is_an_error_before_anything_is_read(tmp_path, gate):
    (tmp_path / "a").write_bytes(bytes(100))
    with pytest.raises(flashpack.FlashPackError):
        flashpack.prefetch_flashpack_file(tmp_path / "a")
    with pytest.raises(FileNotFoundError):
        flashpack.prefetch_flashpack_file(tmp_path / "b")
    assert gate.calls == 0


def test_a_wait_that_is_too_short_raises_and_the_next_one_may_succeed(cold_file, gate):
    handle = flashpack.prefetch_flashpack_file(cold_file)
    for timeout in (0, -1, 0.01):
        with pytest.raises(TimeoutError, match="not in the page cache yet"):
            handle.wait(timeout)
    assert handle.progress()[0] == 0
    gate.opened.set()
    handle.wait(60)


@pytest.fixture
def until_stopped(monkeypatch):
    """Reads in one stream, of which each step takes until somebody cancels. Takes the handle, gives the steps."""
    handles, steps = [], []
    given = threading.Event()

    def send(sink, source, offset, size):
        steps.append(size)
        if not (given.wait(60) and handles[0]._stop.wait(60)):
            raise OSError(errno.ETIME, "told to go on")
        return size

    def give(handle):
        handles.append(handle)
        given.set()
        return steps

    monkeypatch.setattr(_prefetch, "_STREAMS", 1)
    monkeypatch.setattr(os, "sendfile", send)
    return give


def test_cancel_returns_at_once_and_stops_after_what_is_being_read(cold_file, until_stopped):
    handle = flashpack.prefetch_flashpack_file(cold_file)
    steps = until_stopped(handle)
    handle.cancel()
    for _ in range(2):
        with pytest.raises(OSError, match="cancelled") as caught:
            handle.wait(60)
        assert (caught.value.errno, caught.value.filename) == (errno.ECANCELED, str(cold_file))
    assert handle.progress() == (sum(steps), 20 * MIB + 20)
    assert len(steps) <= 1


def test_a_cancel_after_the_end_changes_nothing(cold_file):
    handle = flashpack.prefetch_flashpack_file(cold_file)
    handle.wait()
    handle.cancel()
    handle.wait()


def test_the_end_of_the_block_cancels_and_waits(cold_file, until_stopped):
    with flashpack.prefetch_flashpack_file(cold_file) as handle:
        steps = until_stopped(handle)
    assert len(steps) <= 1
    with pytest.raises(OSError, match="cancelled"):
        handle.wait(0)


def test_an_error_of_the_system_is_raised_by_every_wait(cold_file, monkeypatch):
    def fail(sink, source, offset, size):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "sendfile", fail)
    handle = flashpack.prefetch_flashpack_file(cold_file)
    frames = []
    for _ in range(3):
        with pytest.raises(OSError, match="Input/output error") as caught:
            handle.wait()
        assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(cold_file))
        frames.append(len(list(traceback.walk_tb(caught.value.__traceback__))))
    assert len(set(frames)) == 1


def test_an_error_in_one_stream_stops_the_others(tmp_path, monkeypatch, gate):
    steps = []

    def fail_at_the_start(sink, source, offset, size):
        if offset == 0:
            raise OSError(errno.EIO, "Input/output error")
        gate(sink, source, offset, size)
        steps.append(offset)
        return size

    monkeypatch.setattr(os, "sendfile", fail_at_the_start)
    path = tmp_path / "a"
    path.touch()
    handle = prefetch(path, 400 * MIB)
    assert handle._stop.wait(60)
    gate.opened.set()
    with pytest.raises(OSError, match="Input/output error"):
        handle.wait(60)
    assert len(steps) < _prefetch._STREAMS


def test_the_threads_that_were_started_stop_where_others_cannot_be_started(cold_file, monkeypatch):
    before, start, handles = set(threading.enumerate()), threading.Thread.start, []

    def start_one(thread):
        if handles:
            raise RuntimeError("can't start new thread")
        handles.append(thread._target.__self__)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_one)
    with pytest.raises(RuntimeError, match="start new thread"):
        flashpack.prefetch_flashpack_file(cold_file)
    assert handles[0]._stop.is_set()
    for thread in set(threading.enumerate()) - before:
        thread.join(60)


def test_a_file_that_became_shorter_is_an_error(tmp_path):
    (tmp_path / "a").write_bytes(bytes(1000))
    with pytest.raises(OSError, match="ends before its payload"):
        prefetch(tmp_path / "a", 2000).wait(60)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_cannot_use_it_and_makes_its_own(cold_file, gate, monkeypatch):
    handle = flashpack.prefetch_flashpack_file(cold_file)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            refused = 0
            for use in (handle.progress, handle.wait, handle.cancel):
                try:
                    use()
                except RuntimeError as error:
                    refused += "process that started it" in str(error)
            with handle:
                pass
            monkeypatch.undo()  # The gate's lock may have been held at the fork.
            flashpack.prefetch_flashpack_file(cold_file).wait(30)
            os._exit(0 if refused == 3 else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    gate.opened.set()
    handle.wait(60)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_child_with_the_process_id_of_its_parent_cannot_use_it(cold_file, monkeypatch):
    parent = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: parent)  # As in a PID namespace of the child's own.
    handle = flashpack.prefetch_flashpack_file(cold_file)

    def use() -> bool:
        with pytest.raises(RuntimeError, match="a prefetch belongs to the process that started it"):
            handle.progress()
        return True

    assert in_a_fork(use) is True
    handle.wait(60)


def test_it_refuses_to_be_pickled_or_copied(pack):
    handle = flashpack.prefetch_flashpack_file(pack({"a": torch.ones(2)}))
    for duplicate in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot pickle or copy"):
            duplicate(handle)


def test_it_needs_no_torch(pack):
    code = f"""
import sys, flashpack
flashpack.prefetch_flashpack_file({str(pack({"a": torch.ones(2)}))!r}).wait()
assert not {{"torch", "numpy"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
