"""save_file, save_model, load_model: safetensors' names, for both formats."""

from __future__ import annotations

import flashpack
import pytest
import safetensors.torch
import torch
from flashpack import FlashPackError
from flashpack.safetensors import SafetensorError
from support import assert_bit_equal

STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones((), dtype=torch.bfloat16)}


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(4, 3)
        self.head = torch.nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight


def test_each_name_has_one_meaning():
    for name in ("save_file", "save_model", "load_model"):
        assert getattr(flashpack, name) is getattr(flashpack.safetensors, name)


@pytest.mark.parametrize("name", ["a.flashpack", "a.safetensors", "a"])
def test_the_name_of_a_file_decides_its_format(name, tmp_path):
    flashpack.save_file(STATE, tmp_path / name, metadata={"step": "3"})
    assert flashpack.is_flashpack_file(tmp_path / name) == (name == "a.flashpack")
    assert_bit_equal(flashpack.load_file(tmp_path / name, metadata=(metadata := {})), STATE)
    assert metadata == {"step": "3"}
    if name != "a.flashpack":
        assert_bit_equal(safetensors.torch.load_file(tmp_path / name), STATE)


@pytest.mark.parametrize("suffix", ["flashpack", "safetensors"])
def test_lazy_conjugates_are_written_as_the_values_that_they_have(suffix, tmp_path):
    values = torch.tensor([1 + 2j, 3 - 4j])
    path = tmp_path / f"a.{suffix}"
    flashpack.save_file({"a": values.conj(), "b": values.conj().imag}, path)
    assert_bit_equal(flashpack.load_file(path), {"a": values.conj_physical(), "b": torch.tensor([-2.0, 4.0])})


@pytest.mark.parametrize("suffix", ["flashpack", "safetensors"])
def test_a_model_comes_back_with_its_ties(suffix, tmp_path):
    path = str(tmp_path / f"a.{suffix}")
    model, again = Tied(), Tied()
    flashpack.save_model(model, path, metadata={"step": "3"})
    assert flashpack.load_model(again, path) == (set(), [])
    assert torch.equal(again.head.weight, model.embed.weight)
    assert again.head.weight is again.embed.weight
    flashpack.load_file(path, metadata=(metadata := {}))
    assert metadata["step"] == "3"


def test_what_a_flashpack_file_lacks_or_has_too_much_is_told_as_by_safetensors(tmp_path):
    flashpack.save_file({"embed.weight": torch.ones(4, 3), "other": torch.ones(1)}, tmp_path / "a.flashpack")
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(4, 3), "norm": torch.nn.LayerNorm(3, bias=False)})
    missing, unexpected = flashpack.load_model(model, tmp_path / "a.flashpack", strict=False)
    assert (set(missing), unexpected) == ({"norm.weight"}, ["other"])
    with pytest.raises(RuntimeError, match="other"):
        flashpack.load_model(model, tmp_path / "a.flashpack")


def test_errors_are_of_either_library(tmp_path):
    for kind in (FlashPackError, SafetensorError):
        with pytest.raises(kind, match="cannot pack 'a': it is a int"):
            flashpack.save_file({"a": 1}, tmp_path / "a.flashpack")
