"""Processes that come to be while flashpack is in use."""

import contextlib
import multiprocessing
import os
import signal
import threading

import flashpack
import flashpack.safetensors
import pytest
import torch
from flashpack import _accelerate, _mapped_tensors
from support import bits, in_a_fork, random_tensor

MIB = 1 << 20
IN_THREADS = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def same(a, b):
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


class FilesDataset(torch.utils.data.Dataset):
    """Each item is a file, loaded in whichever process asks for it."""

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return os.getpid(), flashpack.revert_from_file(self.paths[index])["a"]


@pytest.fixture
def files(tmp_path):
    sources = [random_tensor((300_000,), seed=seed) for seed in range(8)]
    paths = [tmp_path / f"{seed}.flashpack" for seed in range(8)]
    for source, path in zip(sources, paths, strict=True):
        flashpack.pack_to_file({"a": source}, path)
    return sources, paths


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader_load_with_engines_of_their_own(files, method):
    sources, paths = files
    flashpack.revert_from_file(paths[0])  # The parent's engine is there before the fork.
    loader = torch.utils.data.DataLoader(
        FilesDataset(paths), batch_size=None, num_workers=2, timeout=60, multiprocessing_context=method
    )
    pids = set()
    for source, (pid, loaded) in zip(sources, loader, strict=True):
        pids.add(pid)
        assert same(loaded, source)
    assert len(pids) == 2
    assert os.getpid() not in pids
    assert same(flashpack.revert_from_file(paths[1])["a"], sources[1])


def _exit_with_success(path):
    os._exit(0 if flashpack.revert_from_file(path)["a"].numel() == 300_000 else 1)


@pytest.mark.filterwarnings("error", "ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_fork_in_the_middle_of_a_load_leaves_both_sides_whole(files, tmp_path, tell):
    _, paths = files
    source = random_tensor((16 * MIB,), seed=1)
    flashpack.pack_to_file({"big": source}, tmp_path / "big.flashpack")
    children = []

    def fork(done_bytes):
        pid = os.fork()
        if pid == 0:
            signal.alarm(60)  # A child that hangs dies of it.
            tell(None)
            try:
                _exit_with_success(paths[0])
            finally:
                os._exit(2)
        children.append((pid, done_bytes))

    tell(fork)
    loaded = flashpack.revert_from_file(tmp_path / "big.flashpack")["big"]
    assert same(loaded, source)
    assert children[0][1] < source.nbytes, "the load was over before the fork"
    assert [os.waitpid(pid, 0)[1] for pid, _ in children] == [0] * len(children)


def test_forks_while_another_thread_loads_leave_both_sides_whole(files, tmp_path):
    _, paths = files
    source = {"big": random_tensor((16 * MIB,), seed=1)}
    flashpack.pack_to_file(source, tmp_path / "big.flashpack")
    stop = threading.Event()
    wrong = []

    def load():
        while not stop.is_set():
            loaded = flashpack.revert_from_file(tmp_path / "big.flashpack")["big"]
            if not same(loaded, source["big"]):
                wrong.append(loaded)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        context = multiprocessing.get_context("fork")
        for _ in range(10):
            child = context.Process(target=_exit_with_success, args=(paths[0],))
            child.start()
            child.join(60)
            assert child.exitcode == 0
    finally:
        stop.set()
        thread.join()
    assert wrong == []


@contextlib.contextmanager
def held_elsewhere(lock):
    """Within it, another thread has the lock, as it might at a fork."""
    taken, release = threading.Event(), threading.Event()

    def hold():
        with lock:
            taken.set()
            release.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    try:
        yield
    finally:
        release.set()
        thread.join()


def refuses(call, what):
    with pytest.raises(RuntimeError, match=f"{what} belongs to the process that started it"):
        call()


@IN_THREADS
def test_a_child_cannot_use_a_stream_of_its_parent_but_may_leave_it(files):
    _, paths = files
    stream = flashpack.stream_tensors(paths[0])
    next(stream)

    def use():
        refuses(lambda: next(stream), "a stream of tensors")
        with stream:
            pass
        return True

    with held_elsewhere(stream._turn):
        assert in_a_fork(use) is True
    assert list(stream) == []


@IN_THREADS
def test_a_stream_that_has_not_begun_can_be_used_in_a_child(files):
    sources, paths = files
    stream = flashpack.stream_tensors(paths[0])
    # torch's own threads do not exist in a child, so that numpy compares.
    assert in_a_fork(lambda: bits(dict(stream)["a"]) == bits(sources[0])) is True
    assert same(dict(stream)["a"], sources[0])


@IN_THREADS
def test_a_child_cannot_use_a_prefetch_loader_of_its_parent_but_may_leave_it(files):
    _, paths = files
    with flashpack.safetensors.safe_open(paths[0]) as file:
        loaders = [file.prefetch()]

    def use():
        for call in (lambda: loaders[0].take("a"), lambda: list(loaders[0])):
            refuses(call, "a prefetch loader")
        with loaders[0]:
            pass
        loaders.clear()
        return True

    with held_elsewhere(loaders[0]._landing._changed):
        assert in_a_fork(use) is True
    assert [name for name, _ in loaders[0]] == ["a"]


@IN_THREADS
@pytest.mark.parametrize("module", [_accelerate, _mapped_tensors])
def test_a_child_does_not_inherit_a_lock_that_another_thread_has(module):
    taken, forking = threading.Event(), threading.Event()
    os.register_at_fork(before=forking.set)  # The last that was registered is called first.

    def hold():
        with module._lock:
            taken.set()
            forking.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    assert in_a_fork(lambda: module._lock.acquire(timeout=0)) is True
    thread.join()
