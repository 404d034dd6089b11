"""Ctrl-C and failing callbacks while bytes are moving. Nothing here depends on how fast that is."""

from __future__ import annotations

import ctypes
import functools
import signal
from concurrent.futures import ThreadPoolExecutor

import flashpack
import pytest
import torch
from flashpack import _engine, _memory, _native
from flashpack._checkpoint import open_checkpoint
from support import bits, random_tensor, state_of

SIZE_BYTES = 32 << 20


@pytest.fixture(autouse=True)
def ctrl_c_is_heard():
    """A shell starts what it runs in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def path(pack):
    return pack({"weight": random_tensor((SIZE_BYTES // 4,))})


# Called as a progress callback it sends SIGINT to the interpreter, and as it is no Python function, no bytecode runs
# that could notice before the waiting loop does.
interrupt = ctypes.pythonapi.PyErr_SetInterrupt


def test_ctrl_c_during_a_load_is_noticed_by_the_waiting_loop(path):
    with open_checkpoint(path) as checkpoint:
        block = _memory.allocate_block(0, SIZE_BYTES)
        reads = [(0, 0, SIZE_BYTES, block.address)]
        load = functools.partial(_engine.engine().load, checkpoint.native, reads, "auto")
        finished = []
        with pytest.raises(KeyboardInterrupt):
            finished.extend(map(load, [interrupt]))
        assert finished == []
        # Nothing is in flight any more: what is put there now stays while the engine moves other bytes.
        memory = block.memory.fill_(0xAB)
        assert flashpack.revert_from_file(path)["weight"].numel() == SIZE_BYTES // 4
        assert bool((memory == 0xAB).all())
        assert load(None)["requested_bytes"] == SIZE_BYTES
        assert bits(memory) == bits(random_tensor((SIZE_BYTES // 4,)))


def test_ctrl_c_leaves_the_module_as_it_was_and_the_engine_usable(path, tell):
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.zeros(SIZE_BYTES // 4))
    before = state_of(model)
    tell(interrupt)
    with pytest.raises(KeyboardInterrupt):
        flashpack.assign_from_file(model, path)
    assert state_of(model) == before
    tell(None)
    flashpack.assign_from_file(model, path)
    assert bits(model.weight) == bits(random_tensor((SIZE_BYTES // 4,)))


def test_an_exception_of_the_progress_callback_ends_the_load(path, tell):
    def fail(done_bytes):
        raise ZeroDivisionError(done_bytes)

    tell(fail)
    with pytest.raises(ZeroDivisionError):
        flashpack.revert_from_file(path)


def test_progress_begins_with_the_load_and_ends_with_all_bytes(path, tell):
    told = []
    tell(told.append)
    flashpack.revert_from_file(path)
    assert told == sorted(told)
    assert told[-1] == SIZE_BYTES


def test_ctrl_c_during_a_write_leaves_no_file(tmp_path):
    tensor = random_tensor((SIZE_BYTES // 4,))
    writer = _native.Writer(_engine.engine(), tmp_path / "a", SIZE_BYTES)
    writer.start_write([(0, SIZE_BYTES, tensor.data_ptr())], tensor)
    finished = []
    with pytest.raises(KeyboardInterrupt):
        finished.extend(map(writer.finish, [0], [interrupt]))
    assert finished == []
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_a_writer_takes_one_call_at_a_time(tmp_path):
    tensor = random_tensor((SIZE_BYTES // 4,))
    writer = _native.Writer(_engine.engine(), tmp_path / "a", SIZE_BYTES)
    extents = [(0, SIZE_BYTES, tensor.data_ptr())]
    writer.start_write(extents, tensor)
    calls = [lambda: writer.start_write(extents, tensor), writer.finish, writer.checksums, writer.abort]
    calls.append(lambda: writer.commit(b""))
    refused = []

    def use_it_meanwhile(done_bytes):
        with ThreadPoolExecutor() as others:
            refused.extend(others.submit(call).exception() for call in calls)

    writer.finish(0, use_it_meanwhile)
    assert len(refused) >= len(calls)
    assert all("one at a time" in str(error) for error in refused)
    writer.commit(b"footer")
    assert (tmp_path / "a").read_bytes() == tensor.numpy().tobytes() + b"footer"


def test_a_writer_dropped_while_writing_leaves_no_file_and_keeps_its_sources_until_then(tmp_path):
    tensor = random_tensor((SIZE_BYTES // 4,))
    writer = _native.Writer(_engine.engine(), tmp_path / "a", SIZE_BYTES)
    writer.start_write([(0, SIZE_BYTES, tensor.data_ptr())], tensor)
    del tensor, writer
    assert list(tmp_path.iterdir()) == []
    done = _native.Writer(_engine.engine(), tmp_path / "b", 0)
    done.commit(b"footer")
    with pytest.raises(flashpack.FlashPackError, match="committed or aborted"):
        done.commit(b"")
