"""What a file of very many tensors may cost beside its tensors."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import flashpack
import pytest
import torch
from flashpack import _checkpoint
from flashpack.deserialization import assign_from_file, revert_from_file, verify_file
from support import run_python

COUNT = 20_000
MANY = 100_000

# Each way to open a file has a fork of a process that has imported everything, so that imports do not count. The fork
# opens a file of few tensors first. A small tensor that is cached is read by os.preadv, and others by the engine.
OPENS = r"""
import json, os, sys
import flashpack, flashpack.safetensors

few, many, trace = sys.argv[1:]
preads = []
preadv = os.preadv
os.preadv = lambda *args: preads.append(args) or preadv(*args)


def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def reads_by_engine():
    with open(os.environ["FLASHPACK_TRACE"]) as file:
        events = json.loads(file.read().rstrip().removesuffix("]") + "]")
    return sum(event["name"].startswith("read") for event in events)


def reads_of(get, name):
    before = len(preads), reads_by_engine()
    value = get(name)[0].item()
    return [value, len(preads) - before[0], reads_by_engine() - before[1]]


def measure(open_file, method):
    os.environ["FLASHPACK_TRACE"] = trace + open_file.__name__
    with open_file(few) as file:
        getattr(file, method)("large")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    begin = status("VmRSS")
    with open_file(many) as file:
        reads = [reads_of(getattr(file, method), name) for name in ("small", "large")]
    return {"grown": status("VmHWM") - begin, "reads": reads}


for arguments in ((flashpack.open_file, "get"), (flashpack.safetensors.safe_open, "get_tensor")):
    child = os.fork()
    if child == 0:
        print(json.dumps(measure(*arguments)), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


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


@pytest.mark.parametrize("in_place", [False, True], ids=["new tensors", "in place"])
def test_the_garbage_collector_does_not_run_while_a_load_to_a_module_is_planned(in_place, pack, collections):
    model = torch.nn.ParameterDict({f"part_{i}": torch.zeros(1) for i in range(COUNT)})
    path = pack({f"part_{i}": torch.ones(1) for i in range(COUNT)})
    gc.collect()
    collections.clear()
    assign_from_file(model, path, in_place=in_place)
    runs = len(collections)
    assert all(parameter.item() == 1 for parameter in model.values())
    assert runs <= 20  # Starts and stops of the few runs between the parts of a load; without a pause there are dozens.


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


def save_by_hand(path: Path, count: int) -> Path:
    """Writes a safetensors file of `count` tensors of 4 bytes, then "small" of one 1.0, then "large" of many 2.0."""
    part = '"dtype":"F32","shape":[{}],"data_offsets":[{},{}]'
    entries = {f"model.layers.{i}.mlp.weight": part.format(1, 4 * i, 4 * i + 4) for i in range(count)}
    end, large = 4 * count + 4, 1 << 17
    entries |= {"small": part.format(1, end - 4, end), "large": part.format(large, end, end + 4 * large)}
    header = "{" + ",".join(f'"{name}":{{{entry}}}' for name, entry in entries.items()) + "}"
    payload = torch.cat([torch.zeros(count), torch.ones(1), torch.full((large,), 2.0)]).numpy().tobytes()
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + payload)
    return path


def test_a_file_of_very_many_tensors_opens_in_little_memory_and_a_tensor_of_it_is_one_read(tmp_path):
    few, many = (save_by_hand(tmp_path / f"{count}.safetensors", count) for count in (0, MANY))
    opened = [json.loads(line) for line in run_python(OPENS, few, many, tmp_path / "trace.").splitlines()]
    assert [each["reads"] for each in opened] == [[[1.0, 1, 0], [2.0, 0, 1]]] * 2
    for each in opened:
        assert each["grown"] < 200_000_000
