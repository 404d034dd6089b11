"""Behaviour that the loaders for vLLM and SGLang share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import flashpack
import pytest
import torch
from serving_models import (
    FORMATS,
    STATE,
    save_sharded,
    save_whole,
    sglang_loader,
    stand_ins,
    vllm_loader,
    weights_of,
)
from support import assert_bit_equal, bits


@pytest.fixture(autouse=True)
def hosts() -> Iterator[None]:
    with stand_ins():
        yield


@pytest.fixture(params=[vllm_loader, sglang_loader], ids=["vllm", "sglang"])
def loader(request):
    return request.param()


@pytest.mark.parametrize("save", [save_whole, save_sharded])
@pytest.mark.parametrize("suffix", FORMATS)
def test_weights_of_either_format_are_those_of_the_model_and_not_of_files_that_its_index_omits(
    tmp_path, save, suffix, loader
):
    assert_bit_equal(weights_of(save(tmp_path / "model", suffix), loader), STATE)


# vLLM sorts the files by the numbers in their names, SGLang by their letters.
@pytest.mark.parametrize(("make_loader", "last"), [(vllm_loader, "10"), (sglang_loader, "91")], ids=["vllm", "sglang"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_of_tensors_with_one_name_the_last_stays_where_there_is_no_index(tmp_path, suffix, make_loader, last):
    for name, value in (("9", 1), (last, 2)):
        save_whole(tmp_path, suffix, {"a": torch.full((2,), value), name: torch.ones(2)})
        (tmp_path / f"model.{suffix}").rename(tmp_path / f"part-{name}.{suffix}")
    loader = make_loader()
    loaded = list(loader._get_weights_iterator(loader.Source(str(tmp_path))))
    assert sorted(name for name, _ in loaded) == sorted(["9", last, "a", "a"])
    assert bits(dict(loaded)["a"]) == bits(torch.full((2,), 2))


def test_a_damaged_file_is_named_where_there_is_no_index(tmp_path, loader):
    save_whole(tmp_path, "safetensors")
    (tmp_path / "part.safetensors").write_bytes(b"nonsense")
    with pytest.raises(flashpack.FlashPackError, match=r"part\.safetensors"):
        weights_of(tmp_path, loader)


def save_as(directory: Path, name: str, state: dict[str, torch.Tensor]) -> None:
    """Saves a flashpack file of any name into a directory that may have a model.flashpack."""
    flashpack.pack_to_file(state, directory / f"{name}.flashpack")


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("save", [save_whole, save_sharded])
@pytest.mark.parametrize(
    "names", [["model-00001-of-00002"], ["adapter_model"], ["model-00001-of-00002", "model-00001-of-00003"]]
)
def test_flashpack_files_that_are_no_whole_checkpoint_do_not_hide_safetensors_files(
    tmp_path, loader, save, names, caplog
):
    save(tmp_path, "safetensors")
    if save is save_sharded:
        (tmp_path / "model.safetensors").unlink()
    for name in names:
        save_as(tmp_path, name, {"lm_head.weight": torch.zeros(40, 8)})
    for _ in range(2):
        assert_bit_equal(weights_of(tmp_path, loader), STATE)
    (warning,) = warnings_of(caplog)
    assert all(str(tmp_path / f"{name}.flashpack") in warning for name in names)
    assert "loading" in warning
    assert ".safetensors" in warning


@pytest.mark.parametrize("beside", [None, "safetensors"])
def test_shards_are_loaded_without_an_index_if_their_names_say_that_all_are_there(tmp_path, loader, beside):
    if beside:
        save_whole(tmp_path, beside, {"old": torch.zeros(2)})
    items = list(STATE.items())
    for number, part in enumerate((items[:2], items[2:]), start=1):
        save_as(tmp_path, f"model-0000{number}-of-00002", dict(part))
    assert_bit_equal(weights_of(tmp_path, loader), STATE)


@pytest.mark.parametrize("names", [["model-00001-of-00002"], ["model-00001-of-00001", "other-00001-of-00001"]])
def test_shards_that_are_no_whole_checkpoint_are_an_error_where_there_is_nothing_else(tmp_path, loader, names):
    for name in names:
        save_as(tmp_path, name, STATE)
    with pytest.raises(flashpack.FlashPackError, match=rf"{names[0]}\.flashpack.*not just all shards.*index\.json"):
        weights_of(tmp_path, loader)


def test_of_flashpack_files_without_an_index_the_whole_one_is_the_checkpoint(tmp_path, loader, caplog):
    save_as(tmp_path, "adapter_model", {"lora": torch.zeros(2)})
    assert_bit_equal(weights_of(save_whole(tmp_path, "flashpack"), loader), STATE)
    (warning,) = warnings_of(caplog)
    assert f"{tmp_path / 'adapter_model.flashpack'}: not loaded" in warning


def test_safetensors_files_that_are_newer_than_what_is_loaded_are_told_once(tmp_path, loader, caplog):
    old, new = save_whole(tmp_path, "flashpack") / "model.flashpack", tmp_path / "model.safetensors"
    save_whole(tmp_path, "safetensors")
    os.utime(old, (2000, 2000))
    os.utime(new, (2000, 2000))
    assert_bit_equal(weights_of(tmp_path, loader), STATE)
    assert warnings_of(caplog) == []
    os.utime(new, (2001, 2001))
    for _ in range(2):
        assert_bit_equal(weights_of(tmp_path, loader), STATE)
    (warning,) = warnings_of(caplog)
    assert f"{old} is loaded, but {new} is newer" in warning


def test_a_link_to_a_file_that_is_gone_stops_no_load(tmp_path, loader):
    save_whole(tmp_path, "flashpack")
    (tmp_path / "model-00001-of-00002.safetensors").symlink_to("gone")
    assert_bit_equal(weights_of(tmp_path, loader), STATE)
