"""The pause of Python's garbage collector while a load makes many objects."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator

import flashpack
import pytest
import torch
from flashpack._native import CollectorPause

OURS = (123, 4, 5)


@pytest.fixture(autouse=True)
def _thresholds() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(*OURS)
    yield
    gc.set_threshold(*before)


def status_of_child(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def paused_in_another_thread() -> Iterator[None]:
    begun, over = threading.Event(), threading.Event()

    def pause() -> None:
        with CollectorPause():
            begun.set()
            over.wait()

    thread = threading.Thread(target=pause)
    thread.start()
    begun.wait()
    yield
    over.set()
    thread.join()


def test_it_does_not_run_within_a_pause_and_is_as_before_after_it():
    with CollectorPause():
        assert gc.get_threshold()[0] == 0
    assert gc.get_threshold() == OURS


def test_it_is_as_before_after_an_error():
    with pytest.raises(KeyboardInterrupt), CollectorPause():
        raise KeyboardInterrupt
    assert gc.get_threshold() == OURS


@pytest.mark.parametrize("first", [0, 1])
def test_it_runs_again_when_the_last_of_overlapping_pauses_has_ended(first):
    pauses = [CollectorPause(), CollectorPause()]
    for pause in pauses:
        pause.__enter__()
    pauses[first].__exit__(None, None, None)
    assert gc.get_threshold()[0] == 0
    pauses[1 - first].__exit__(None, None, None)
    assert gc.get_threshold() == OURS


def test_a_pause_that_nobody_ends_ends_with_its_object():
    CollectorPause().__enter__()  # An interrupt may come between the two, so that no block is entered.
    assert gc.get_threshold() == OURS


def test_what_the_caller_does_meanwhile_stays():
    with CollectorPause():
        gc.disable()
    try:
        assert not gc.isenabled()
    finally:
        gc.enable()
    with CollectorPause():
        gc.set_threshold(7, 8, 9)
    assert gc.get_threshold() == (7, 8, 9)
    gc.set_threshold(0)
    with CollectorPause():
        pass
    assert gc.get_threshold()[0] == 0


def test_a_child_that_is_forked_within_another_threads_pause_collects(paused_in_another_thread):
    assert gc.get_threshold()[0] == 0
    if (child := os.fork()) == 0:
        os._exit(0 if gc.get_threshold() == OURS else 1)
    assert status_of_child(child) == 0
    assert gc.get_threshold()[0] == 0


def test_a_child_that_is_forked_within_a_pause_collects_after_it(paused_in_another_thread):
    pause = CollectorPause()
    pause.__enter__()
    if (child := os.fork()) == 0:
        paused = gc.get_threshold()[0] == 0
        pause.__exit__(None, None, None)
        os._exit(0 if paused and gc.get_threshold() == OURS else 1)
    pause.__exit__(None, None, None)
    assert status_of_child(child) == 0


def test_loads_leave_it_as_it_was(pack):
    path = pack({"weight": torch.ones(2, 3), "bias": torch.zeros(2)})
    model = torch.nn.Linear(3, 2)
    for in_place in (False, True):
        flashpack.assign_from_file(model, path, in_place=in_place)
        assert gc.get_threshold() == OURS
    flashpack.load_file(path)
    assert gc.get_threshold() == OURS
