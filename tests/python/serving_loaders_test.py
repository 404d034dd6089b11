"""Behaviour that the loaders for vLLM and SGLang share."""

from __future__ import annotations

from collections.abc import Iterator

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
