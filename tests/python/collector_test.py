"""The pause of Python's garbage collector while a load makes many objects."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator

import flashpack
import pytest
import torch
from flashpack._native import CollectorPause

OURS = 123


def threshold() -> int:
    return gc.get_threshold()[0]


def is_paused() -> bool:
    return threshold() > 1_000_000_000


@pytest.fixture(autouse=True)
def _thresholds() -> Iterator[None]:
    before = threshold()
    gc.set_threshold(OURS)
    yield
    gc.set_threshold(before)


def in_child(holds: Callable[[], bool]) -> bool:
    """Whether it holds in a forked child, which never goes on as a second run of the tests."""
    if (child := os.fork()) == 0:
        status = 1
        try:
            status = 0 if holds() else 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


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
        assert is_paused()
    assert threshold() == OURS


def test_it_is_as_before_after_an_error():
    with pytest.raises(KeyboardInterrupt), CollectorPause():
        raise KeyboardInterrupt
    assert threshold() == OURS


@pytest.mark.parametrize("first", [0, 1])
def test_it_runs_again_when_the_last_of_overlapping_pauses_has_ended(first):
    pauses = [CollectorPause(), CollectorPause()]
    for pause in pauses:
        pause.__enter__()
    pauses[first].__exit__(None, None, None)
    assert is_paused()
    pauses[1 - first].__exit__(None, None, None)
    assert threshold() == OURS


def test_a_pause_that_nobody_ends_ends_with_its_object():
    CollectorPause().__enter__()  # An interrupt may come between the two, so that no block is entered.
    assert threshold() == OURS


def test_a_collector_that_the_caller_disables_meanwhile_stays_disabled():
    with CollectorPause():
        gc.disable()
    try:
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize("value", [0, 7])
def test_a_threshold_that_the_caller_sets_meanwhile_stays(value):
    with CollectorPause():
        gc.set_threshold(value)
    assert threshold() == value


def test_a_collector_that_never_runs_stays_so():
    gc.set_threshold(0)
    with CollectorPause(), CollectorPause():
        assert threshold() == 0
    assert threshold() == 0


def test_a_child_that_is_forked_within_another_threads_pause_collects(paused_in_another_thread):
    assert is_paused()
    assert in_child(lambda: threshold() == OURS)
    assert is_paused()


def test_a_child_that_is_forked_within_a_pause_collects_after_it(paused_in_another_thread):
    pause = CollectorPause()
    pause.__enter__()

    def collects_after_it() -> bool:
        paused = is_paused()
        pause.__exit__(None, None, None)
        return paused and threshold() == OURS

    assert in_child(collects_after_it)
    pause.__exit__(None, None, None)


def test_loads_leave_it_as_it_was(pack):
    path = pack({"weight": torch.ones(2, 3), "bias": torch.zeros(2)})
    model = torch.nn.Linear(3, 2)
    for in_place in (False, True):
        flashpack.assign_from_file(model, path, in_place=in_place)
        assert threshold() == OURS
    flashpack.load_file(path)
    assert threshold() == OURS
