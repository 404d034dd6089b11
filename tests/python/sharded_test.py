"""Checkpoints of several files, and directories."""

from __future__ import annotations

import json
from pathlib import Path

import flashpack
import flashpack.safetensors
import pytest
import safetensors.torch
import torch
from flashpack import _native
from flashpack._checkpoint import open_checkpoint as opened_checkpoint
from support import assert_bit_equal, bits, random_tensor

NAMES = [f"layers.{i}.weight" for i in range(6)]
READERS = [
    flashpack.load_file,
    flashpack.revert_from_file,
    lambda path: dict(flashpack.stream_tensors(path)),
    lambda path: flashpack.load_file(path, mmap=True),
    lambda path: opened(path),
]


def opened(path: Path) -> dict[str, torch.Tensor]:
    with flashpack.open_file(path) as file:
        return {name: file[name] for name in file}


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {name: random_tensor((7 + i, 1001), seed=i) for i, name in enumerate(NAMES)}


def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    if path.suffix == ".flashpack":
        flashpack.pack_to_file(tensors, path, metadata={"author": "somebody"})
    else:
        safetensors.torch.save_file(tensors, path, metadata={"author": "somebody"})


@pytest.fixture(params=["safetensors", "flashpack"])
def directory(request, tensors, tmp_path) -> Path:
    """Three files and their index."""
    weight_map = {}
    for i in range(3):
        file = tmp_path / f"model-0000{i + 1}-of-00003.{request.param}"
        part = {name: tensors[name] for name in NAMES[i::3]}
        save(part, file)
        weight_map |= dict.fromkeys(part, file.name)
    index = tmp_path / f"model.{request.param}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return tmp_path


def index_of(directory: Path) -> Path:
    [index] = directory.glob("*.index.json")
    return index


def files_in(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.suffix != ".json")


@pytest.mark.parametrize("read", READERS)
def test_a_directory_and_an_index_are_read_as_one_checkpoint(read, directory, tensors):
    assert_bit_equal(read(directory), tensors)
    assert_bit_equal(read(index_of(directory)), tensors)


def test_several_files_are_one_load(directory, monkeypatch):
    started = []
    start = flashpack._transfers.start
    monkeypatch.setattr(flashpack._transfers, "start", lambda *args: started.append(args) or start(*args))
    flashpack.load_file(directory)
    assert len(started) == 1


def test_a_model_is_assigned_from_all_files(directory, tensors):
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(torch.nn.Linear(1001, 7 + i, bias=False) for i in range(6))
    report = flashpack.assign_from_file(model, directory)
    assert sorted(report.assigned) == NAMES
    assert_bit_equal(dict(model.state_dict()), tensors)


def test_slices_are_read_from_the_file_that_has_the_tensor(directory, tensors):
    with flashpack.open_file(directory) as file:
        for name in NAMES:
            assert bits(file.get_slice(name)[2:5, ::3]) == bits(tensors[name][2:5, ::3])


def test_text_of_the_files_is_kept(directory):
    kept: dict[str, str] = {}
    flashpack.load_file(directory, metadata=kept)
    assert kept == {"author": "somebody"}


def test_a_file_of_the_index_that_is_absent_is_named(directory):
    gone = files_in(directory)[1]
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=gone.name):
        flashpack.load_file(directory)


def test_a_tensor_that_is_not_where_the_index_says_is_named(directory):
    index = index_of(directory)
    listed = json.loads(index.read_text())
    listed["weight_map"]["absent"] = files_in(directory)[0].name
    index.write_text(json.dumps(listed))
    with pytest.raises(flashpack.FlashPackError, match=r'"absent" is in model-00001.* but it is not'):
        flashpack.load_file(directory)


def test_an_index_cannot_lead_out_of_its_directory(directory):
    index_of(directory).write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(flashpack.FlashPackError, match="which is no file beside it"):
        flashpack.load_file(directory)


def test_a_file_that_changes_after_it_was_opened_is_an_error(directory):
    with flashpack.open_file(directory) as file:
        changed = files_in(directory)[2]
        changed.write_bytes(changed.read_bytes() + b"x")
        assert file[NAMES[0]].shape == (7, 1001)
        with pytest.raises(OSError, match="changed") as caught:
            file.get(NAMES[2])
        assert caught.value.filename == str(changed)


def test_what_needs_one_footer_refuses_several_files(directory):
    for call in (flashpack.get_flashpack_file_metadata, flashpack.read_flashpack_file):
        with pytest.raises(flashpack.FlashPackError, match="a checkpoint of several files"):
            call(directory)
    assert not flashpack.is_flashpack_file(directory)


def test_files_with_checksums_are_verified(directory):
    if list(directory.glob("*.safetensors")):
        with pytest.raises(flashpack.FlashPackError, match="no checksums"):
            flashpack.verify_file(directory)
        return
    assert flashpack.verify_file(directory)["corrupt"] == []
    damaged = files_in(directory)[1]
    raw = bytearray(damaged.read_bytes())
    raw[100] ^= 1
    damaged.write_bytes(raw)
    assert [names for _, _, names in flashpack.verify_file(directory)["corrupt"]]
    with pytest.raises(flashpack.FlashPackError, match=damaged.name):
        flashpack.load_file(directory)


def test_a_directory_of_one_file_is_that_file_and_of_several_without_an_index_is_an_error(tensors, tmp_path):
    save(tensors, tmp_path / "a.safetensors")
    assert_bit_equal(flashpack.load_file(tmp_path), tensors)
    save(tensors, tmp_path / "b.safetensors")
    with pytest.raises(flashpack.FlashPackError, match=r"several checkpoints.*a\.safetensors, b\.safetensors"):
        flashpack.load_file(tmp_path)


@pytest.mark.parametrize("number", [6, 1 << 40, -1])
def test_a_number_that_no_tensor_or_file_has_is_an_error_and_no_read(directory, number):
    with opened_checkpoint(directory) as checkpoint:
        with pytest.raises((IndexError, TypeError), match=r"no such tensor|incompatible"):
            checkpoint.native.plan([0, number], False)
        for of_file in (
            lambda engine: engine.load(checkpoint.native, [(number, 0, 0, 0)]),
            lambda engine: engine.verify(checkpoint.native, number),
        ):
            with pytest.raises((IndexError, TypeError), match=r"no such file|incompatible"):
                of_file(_native.Engine())


def test_a_tensor_cannot_be_planned_twice(directory):
    with opened_checkpoint(directory) as checkpoint, pytest.raises(flashpack.FlashPackError, match="wanted twice"):
        checkpoint.native.plan([1, 2, 1], False)


def test_offsets_are_counted_from_the_header_where_an_index_leaves_out_the_first_tensor(tmp_path):
    first = {"a": torch.ones(3), "b": torch.ones(2)}
    files = {"1.safetensors": first, "2.safetensors": {"a": torch.ones(3)}}
    for name, tensors in files.items():
        safetensors.torch.save_file(tensors, tmp_path / name)
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"b": "1.safetensors", "a": "2.safetensors"}}))
    with flashpack.safetensors.safe_open(path) as file:
        assert file.get_tensor_meta("b").data_offsets == (12, 20)
