"""What a file of very many tensors may cost beside its tensors."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import flashpack
import pytest
import torch
from flashpack import _checkpoint
from flashpack.deserialization import assign_from_file, revert_from_file, verify_file

COUNT = 20_000


@pytest.fixture
def collections() -> Iterator[list[str]]:
    """Grows with each run of the garbage collector, which looks at more objects the more there are."""
    runs: list[str] = []

    def note(phase: str, _: object) -> None:
        runs.append(phase)

    gc.callbacks.append(note)
    yield runs
    gc.callbacks.remove(note)


@pytest.mark.parametrize(
    "made",
    [_checkpoint.Checkpoint.entries, lambda checkpoint: checkpoint.metadata, flashpack.load_file],
    ids=["entries", "metadata", "tensors"],
)
def test_the_garbage_collector_does_not_run_while_what_a_footer_says_becomes_objects(made: Callable, pack, collections):
    path = pack({f"layers.{i}": torch.ones(i % 2) for i in range(COUNT)})
    with _checkpoint.open_checkpoint(path) as checkpoint:
        gc.collect()
        collections.clear()
        result = made(checkpoint)
        runs = len(collections)
    assert result
    assert runs <= 10  # Starts and stops of the few runs before and after; without the pause there are dozens.
    assert gc.isenabled()


def test_a_garbage_collector_that_is_off_stays_off(pack):
    path = pack({"a": torch.ones(1)})
    gc.disable()
    try:
        flashpack.get_flashpack_file_metadata(path)
        flashpack.open_file(path).close()
        assert not gc.isenabled()
        flashpack.load_file(path)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_no_dict_for_each_tensor_is_made_unless_the_metadata_is_asked_for(pack, monkeypatch):
    path = pack({"weight": torch.ones(2, 3), "bias": torch.zeros(2)})
    expected = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}

    def refuse(checkpoint: _checkpoint.Checkpoint) -> None:
        raise AssertionError(f"the dict of {checkpoint} was made")

    monkeypatch.setattr(_checkpoint.Checkpoint, "metadata", property(refuse))
    with flashpack.open_file(path) as file:
        opened = {name: file.get(name) for name in file}
    kept: dict[str, str] = {}
    model = torch.nn.Linear(3, 2)
    assign_from_file(model, path)
    for tensors in (opened, flashpack.load_file(path, metadata=kept), revert_from_file(path), model.state_dict()):
        assert set(tensors) == set(expected)
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert verify_file(path)["corrupt"] == []
