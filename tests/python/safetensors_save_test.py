"""Safetensors files that save_file and save_model write: their bytes, and the care for what is there."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import flashpack
import pytest
import safetensors.torch
import torch
from flashpack import FlashPackError
from support import random_tensor

SAVABLE = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    *(torch.bool, torch.complex64),
]


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}])
def test_the_bytes_are_those_that_safetensors_writes(metadata, tmp_path):
    tensors = {str(dtype): random_tensor((3, 5), dtype) for dtype in SAVABLE}
    tensors |= {"none": torch.empty(0, 4), "scalar": torch.tensor(2.5), "large": random_tensor((3 << 20,))}
    safetensors.torch.save_file(tensors, tmp_path / "theirs", metadata)
    flashpack.save_file(tensors, tmp_path / "ours", metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_model_with_tied_weights_has_the_bytes_that_safetensors_writes(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model.register_buffer("transposed", torch.ones(2, 3).t())
    safetensors.torch.save_model(model, str(tmp_path / "theirs"))
    flashpack.save_model(model, str(tmp_path / "ours"))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.fixture(params=["a.safetensors", "a.flashpack"])
def path(request, tmp_path) -> Path:
    return tmp_path / request.param


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_file_has_the_mode_that_the_umask_leaves(path):
    before = os.umask(0o027)
    try:
        flashpack.save_file({"a": torch.ones(3)}, path)
    finally:
        os.umask(before)
    assert mode_of(path) == 0o640


def test_a_file_that_is_replaced_keeps_its_mode(path):
    path.touch(0o600)
    path.chmod(0o604)
    flashpack.save_file({"a": torch.ones(3)}, path)
    assert mode_of(path) == 0o604
    assert flashpack.load_file(path)["a"].tolist() == [1, 1, 1]


def test_a_link_is_followed(path):
    target = path.with_name("target" + path.suffix)
    target.touch()
    path.symlink_to(target)
    flashpack.save_file({"a": torch.ones(3)}, path)
    assert path.is_symlink()
    assert flashpack.load_file(target)["a"].tolist() == [1, 1, 1]


def test_what_is_no_regular_file_stays_what_it_is(path):
    os.mkfifo(path)
    with pytest.raises(FlashPackError, match="a FIFO or pipe, not a regular file"):
        flashpack.save_file({"a": torch.ones(3)}, path)
    assert path.is_fifo()


def test_a_directory_that_is_missing_is_made(path):
    flashpack.save_file({"a": torch.ones(3)}, path.parent / "new" / "er" / path.name)
    assert flashpack.load_file(path.parent / "new" / "er" / path.name)["a"].tolist() == [1, 1, 1]


def test_a_save_that_fails_leaves_the_old_file(path):
    flashpack.save_file({"a": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="sparse"):
        flashpack.save_file({"a": torch.zeros(3), "b": torch.ones(3).to_sparse()}, path)
    assert flashpack.load_file(path)["a"].tolist() == [1, 1, 1]
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_parts_of_a_tensor_are_refused_in_a_safetensors_file(tmp_path):
    whole = torch.ones(4, 4)
    with pytest.raises(FlashPackError, match="'a' is not contiguous"):
        flashpack.save_file({"a": whole[:, 1]}, tmp_path / "a.safetensors")
    with pytest.raises(RuntimeError, match="share memory"):
        flashpack.save_file({"a": whole, "b": whole}, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
