"""safe_open.prefetch() of flashpack.safetensors: tensors that are loaded in the background."""

from __future__ import annotations

import gc
import pickle
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from flashpack import _prefetch_loader
from flashpack.safetensors import PrefetchLoader, SafetensorError, safe_open
from safetensors.torch import save_file
from support import assert_bit_equal, random_tensor

TENSORS = {
    "matrix": random_tensor((6, 4)),
    "bytes": random_tensor((7,), torch.uint8),
    "scalar": torch.tensor(7.5),
    "empty": torch.empty((0, 5), dtype=torch.float16),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


@pytest.fixture
def held_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Nothing lands until the test calls this."""
    allowed = threading.Event()
    stream = _prefetch_loader._stream

    @contextmanager
    def held(*args):
        allowed.wait()
        with stream(*args) as tensors:
            yield tensors

    monkeypatch.setattr(_prefetch_loader, "_stream", held)
    yield allowed.set
    allowed.set()


def test_iterating_yields_every_tensor_once(path):
    with safe_open(path, "pt") as file, file.prefetch() as loader:
        assert loader.names() == file.offset_keys()
        assert len(loader) == len(TENSORS)
        assert_bit_equal(dict(loader), TENSORS)
        assert list(loader) == []


def test_a_tensor_is_taken_by_name_once(path):
    with safe_open(path, "pt") as file, file.prefetch() as loader:
        assert torch.equal(loader.take("matrix"), TENSORS["matrix"])
        with pytest.raises(SafetensorError, match="matrix was already delivered"):
            loader.take("matrix")
        assert set(dict(loader)) == TENSORS.keys() - {"matrix"}
        with pytest.raises(SafetensorError, match="nope is not in the prefetch plan"):
            loader.take("nope")


def test_a_plan_says_which_tensors_and_which_of_their_rows_are_loaded(path):
    plan = {"matrix": slice(1, -2), "bytes": slice(3, None), "scalar": None}
    with safe_open(path, "pt") as file, file.prefetch(plan) as loader:
        assert set(loader.names()) == set(plan)
        expected = {"matrix": TENSORS["matrix"][1:-2], "bytes": TENSORS["bytes"][3:], "scalar": TENSORS["scalar"]}
        assert_bit_equal(dict(loader), expected)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"nope": None}, "does not contain tensor nope"),
        ({"nope": slice(1)}, "does not contain tensor nope"),
        ({"matrix": slice(0, 3, 2)}, "step 1"),
        ({"matrix": slice(0, 7)}, "7 in the prefetch plan for matrix is out of range"),
        ({"matrix": slice(-7, 3)}, "out of range"),
        ({"scalar": slice(0, 1)}, "0-d"),
        ({"matrix": 3}, "None or a slice"),
        ({}, "selects no tensors"),
    ],
)
def test_a_plan_that_does_not_fit_the_file_is_refused_at_once(path, plan, message):
    with safe_open(path, "pt") as file, pytest.raises(SafetensorError, match=message):
        file.prefetch(plan)


def test_tensors_and_the_loader_outlive_the_file_and_tensors_outlive_the_loader(path):
    with safe_open(path, "pt") as file:
        loader = file.prefetch()
    tensors = dict(loader)
    loader.close()
    assert_bit_equal(tensors, TENSORS)


def test_closing_wakes_who_waits(path, held_back):
    with safe_open(path, "pt") as file:
        loader = file.prefetch()
    errors: list[BaseException] = []

    def wait() -> None:
        with pytest.raises(SafetensorError, match="closed") as caught:
            loader.take("matrix")
        errors.append(caught.value)

    waiting = threading.Thread(target=wait)
    waiting.start()
    loader.close()
    waiting.join()
    assert len(errors) == 1
    with pytest.raises(SafetensorError, match="closed"):
        next(iter(loader))


def test_dropping_the_loader_ends_its_thread_early(path, held_back):
    before = set(threading.enumerate())
    with safe_open(path, "pt") as file:
        loader = file.prefetch()
    (thread,) = set(threading.enumerate()) - before
    landing = loader._landing
    del loader
    gc.collect()
    held_back()
    thread.join()
    assert landing._landed == {}


def test_an_error_reaches_who_waits(path, held_back):
    with safe_open(path, "pt") as file:
        loader = file.prefetch()
    with path.open("r+b") as raw:
        raw.truncate(path.stat().st_size - 1)
    held_back()
    for wait in (lambda: loader.take("matrix"), lambda: next(iter(loader))):
        with pytest.raises(OSError, match=r"a\.safetensors"):
            wait()


def test_each_take_raises_the_error_with_where_it_came_from_and_no_frames_of_the_takes_before(path, held_back):
    with safe_open(path, "pt") as file:
        loader = file.prefetch()
    path.write_bytes(b"")
    held_back()
    frames = []
    for _ in range(3):
        with pytest.raises(OSError, match=r"a\.safetensors") as caught:
            loader.take("matrix")
        frames.append([frame.f_code.co_name for frame, _ in traceback.walk_tb(caught.value.__traceback__)])
    assert frames[0] == frames[1] == frames[2]
    assert "_land" in frames[0]


def test_a_loader_refuses_to_be_pickled(path):
    with safe_open(path, "pt") as file, file.prefetch() as loader:
        assert isinstance(loader, PrefetchLoader)
        with pytest.raises(TypeError, match="cannot pickle"):
            pickle.dumps(loader)


def test_tensors_are_loaded_on_the_cuda_stream_of_the_caller(path, streams_of_threads, monkeypatch):
    seen = []
    stream = _prefetch_loader._stream
    monkeypatch.setattr(
        _prefetch_loader, "_stream", lambda *args: seen.append(streams_of_threads.stream) or stream(*args)
    )
    streams_of_threads.stream = "mine"
    with safe_open(path, "pt") as file, file.prefetch() as loader:
        assert_bit_equal(dict(loader), TENSORS)
    assert seen == ["mine"]
