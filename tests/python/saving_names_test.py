"""save_file, save_model, load_model and safe_open: safetensors' names, for both formats."""

from __future__ import annotations

from collections import UserDict

import flashpack
import pytest
import safetensors.torch
import torch
from flashpack import FlashPackError
from flashpack.safetensors import SafetensorError
from support import assert_bit_equal, random_tensor

STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones((), dtype=torch.bfloat16)}


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(4, 3)
        self.head = torch.nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight


def test_each_name_has_one_meaning():
    for name in ("safe_open", "save_file", "save_model", "load_model"):
        assert getattr(flashpack, name) is getattr(flashpack.safetensors, name)


@pytest.mark.parametrize("name", ["a.flashpack", "a.FlashPack", "a.safetensors", "a.SAFETENSORS", "a"])
def test_the_name_of_a_file_decides_its_format(name, tmp_path):
    flashpack.save_file(STATE, tmp_path / name, metadata={"step": "3"})
    assert flashpack.is_flashpack_file(tmp_path / name) == (name.lower() == "a.flashpack")
    assert_bit_equal(flashpack.load_file(tmp_path / name, metadata=(metadata := {})), STATE)
    assert metadata == {"step": "3"}
    if name.lower() != "a.flashpack":
        assert_bit_equal(safetensors.torch.load_file(tmp_path / name), STATE)


@pytest.mark.parametrize("suffix", ["flashpack", "safetensors"])
def test_lazy_conjugates_are_written_as_the_values_that_they_have(suffix, tmp_path):
    values = torch.tensor([1 + 2j, 3 - 4j])
    path = tmp_path / f"a.{suffix}"
    flashpack.save_file({"a": values.conj(), "b": values.conj().imag}, path)
    assert_bit_equal(flashpack.load_file(path), {"a": values.conj_physical(), "b": torch.tensor([-2.0, 4.0])})


class Conjugated(torch.nn.Module):
    def __init__(self, values):
        super().__init__()
        self.register_buffer("plain", values.clone())
        self.register_buffer("conjugated", values.conj())
        self.register_buffer("negative", values.conj().imag)


@pytest.mark.parametrize("suffix", ["flashpack", "safetensors"])
def test_lazy_conjugates_of_a_model_are_written_as_the_values_that_they_have(suffix, tmp_path):
    path = str(tmp_path / f"a.{suffix}")
    values = torch.tensor([1 + 2j, 3 - 4j])
    flashpack.save_model(Conjugated(values), path)
    expected = {"plain": values, "conjugated": values.conj_physical(), "negative": torch.tensor([-2.0, 4.0])}
    assert_bit_equal(flashpack.load_file(path), expected)


class Holding(torch.nn.Module):
    def __init__(self, tensors):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


SAVE = {
    "save_file": flashpack.save_file,
    "save_model": lambda tensors, path: flashpack.save_model(Holding(tensors), path),
}


@pytest.mark.parametrize("save", SAVE.values(), ids=SAVE)
@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"__metadata__": torch.ones(1)}, r'tensor called "__metadata__", .*; a flashpack or .pt file can'),
        *(
            (
                {"a": torch.ones(2), "b": random_tensor((3,), dtype)},
                f'cannot have a tensor of {name} called "b"; a flashpack or .pt file can',
            )
            for dtype, name in ((torch.complex32, "complex32"), (torch.complex128, "complex128"))
        ),
        ({"b": torch.empty(2, dtype=torch.bits8)}, "Unsupported dtype for packing: bits8, of tensor 'b'$"),
    ],
)
def test_what_no_safetensors_file_can_hold_is_refused_by_name(save, tensors, message, tmp_path):
    path = str(tmp_path / "a.safetensors")
    with pytest.raises(FlashPackError, match=message) as caught:
        save(tensors, path)
    assert isinstance(caught.value, SafetensorError)
    assert not list(tmp_path.iterdir())
    if "flashpack or .pt file" in message:
        save(tensors, str(tmp_path / "a.flashpack"))
        assert_bit_equal(flashpack.load_file(tmp_path / "a.flashpack"), tensors)


def test_an_empty_checkpoint_is_a_safetensors_file(tmp_path):
    flashpack.save_file({}, tmp_path / "a.safetensors")
    assert flashpack.load_file(tmp_path / "a.safetensors") == {}
    with pytest.raises(FlashPackError, match=r"No tensors to pack\. .* a safetensors file can be empty"):
        flashpack.save_file({}, tmp_path / "a.flashpack")


def test_what_is_no_tensor_or_no_dict_is_refused_as_by_safetensors(tmp_path):
    with pytest.raises(ValueError, match="Key `a` is invalid"):
        flashpack.save_file({"a": 1}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="Expected a dict"):
        flashpack.save_file([torch.ones(1)], tmp_path / "a.safetensors")
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        flashpack.save_file({"a": torch.ones(1, device="meta")}, tmp_path / "a.safetensors")


def test_what_safetensors_before_0_8_cannot_check_without_a_copy_is_refused_all_the_same(tmp_path, monkeypatch):
    monkeypatch.delattr(safetensors.torch, "_evaluate_tensors_for_save")
    whole = torch.ones(2)
    for tensors, message in (
        ({"a": 1}, "'a': it is a int, not a tensor"),
        ([whole], "a dictionary of tensors is saved, not a list"),
        ({"a": whole, "b": whole}, "'a' and 'b' share memory"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            flashpack.save_file(tensors, tmp_path / "a.safetensors")


@pytest.mark.parametrize("suffix", ["flashpack", "safetensors"])
def test_any_mapping_is_saved(suffix, tmp_path):
    flashpack.save_file(UserDict({"a": torch.ones(1)}), tmp_path / f"a.{suffix}")
    assert_bit_equal(flashpack.load_file(tmp_path / f"a.{suffix}"), {"a": torch.ones(1)})


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
