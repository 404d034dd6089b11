"""Small tensors whose bytes are in the page cache: they are read without a transfer."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import flashpack
import pytest
import torch
from flashpack import _file
from safetensors.torch import save_file
from support import bits, random_tensor

TENSORS = {"a": random_tensor((4, 3)), "b": torch.tensor(True), "c": random_tensor((2,), torch.complex64)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


@pytest.fixture
def transfers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of tensors that the engine reads."""
    names: list[str] = []
    read_tensors = _file.read_tensors

    def noted(wanted, *args):
        names.extend(entry.name for entry in wanted.entries)
        return read_tensors(wanted, *args)

    monkeypatch.setattr(_file, "read_tensors", noted)
    return names


def test_they_need_no_transfer(path, transfers):
    with flashpack.open_file(path) as file:
        for name, tensor in TENSORS.items():
            assert bits(file[name]) == bits(tensor)
            assert file[name].shape == tensor.shape
    assert transfers == []


@pytest.mark.parametrize("checksums", [True, False])
def test_they_need_one_in_a_flashpack_file_only_if_it_has_checksums_to_verify(tmp_path, transfers, checksums):
    flashpack.pack_to_file(TENSORS, tmp_path / "a.flashpack", checksum=checksums)
    with flashpack.open_file(tmp_path / "a.flashpack") as file:
        assert bits(file["a"]) == bits(TENSORS["a"])
    assert transfers == (["a"] if checksums else [])


def test_what_is_not_cached_is_read_by_the_engine(path, transfers, monkeypatch):
    # The kernel itself may start the read when it is asked, and find it done.
    def not_cached(*args):
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "preadv", not_cached)
    with flashpack.open_file(path) as file:
        assert bits(file["a"]) == bits(TENSORS["a"])
    assert transfers == ["a"]


def test_a_file_that_was_changed_is_an_error(path):
    with flashpack.open_file(path) as file:
        os.utime(path, ns=(0, 0))
        with pytest.raises(OSError, match=r"a\.safetensors") as caught:
            file.get("a")
    assert caught.value.errno == errno.ESTALE


def test_a_file_with_checksums_is_still_verified(pack):
    path = pack({"a": torch.ones(8)})
    with path.open("r+b") as file:
        file.write(b"\1")
    with flashpack.open_file(path) as opened, pytest.raises(flashpack.FlashPackError, match="checksum"):
        opened.get("a")


def test_the_tensor_may_be_written_to_and_takes_part_in_autograd(path):
    with flashpack.open_file(path) as file, torch.inference_mode():
        tensor = file.get("a")
    tensor.add_(1).requires_grad_().sum().backward()
    assert tensor.grad is not None
