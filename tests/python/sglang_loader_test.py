from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import entry_points

import flashpack
import pytest
import torch
from serving_models import STATE, save_sharded, save_whole, sglang_loader, stand_ins, weights_of
from support import assert_bit_equal


@pytest.fixture(autouse=True)
def sglang() -> Iterator[None]:
    with stand_ins():
        yield


def test_the_entry_point_registers_the_load_format_however_often_it_is_called():
    (entry_point,) = entry_points(group="sglang.srt.plugins", name="flashpack")
    entry_point.load()()
    entry_point.load()()
    choices = sys.modules["sglang.srt.arg_groups.choices"].LOAD_FORMAT_CHOICES
    assert choices.count("flashpack") == 1


def test_other_load_formats_are_checked_by_sglang_as_before():
    from sglang.srt.configs.load_config import LoadConfig, LoadFormat

    sglang_loader()
    assert LoadConfig(load_format="SafeTensors").load_format is LoadFormat.SAFETENSORS
    with pytest.raises(ValueError, match="flashpacks"):
        LoadConfig(load_format="flashpacks")


def test_converted_weights_are_taken_where_both_formats_are(tmp_path):
    save_sharded(tmp_path, "safetensors")
    save_whole(tmp_path, "flashpack", {"new": torch.ones(2)})
    assert_bit_equal(weights_of(tmp_path, sglang_loader()), {"new": torch.ones(2)})


def test_names_get_the_prefix_of_their_source_and_patterns_are_those_of_the_source(tmp_path):
    save_whole(tmp_path, "flashpack")
    save_whole(tmp_path, "safetensors", {"a": torch.ones(2)})
    loaded = weights_of(tmp_path, sglang_loader(), prefix="p.", allow_patterns_overrides=["*.safetensors"])
    assert_bit_equal(loaded, {"p.a": torch.ones(2)})


def test_files_that_sglang_has_chosen_before_are_loaded_whether_or_not_it_has_prefetched_them(tmp_path):
    directory = save_sharded(tmp_path, "flashpack")
    loader = sglang_loader()
    resolved = loader.ResolvedSource((str(directory / "model-00002-of-00002.flashpack"),))
    for prefetch in (False, True):
        weights = loader._get_weights_iterator(
            loader.Source(str(directory)), resolved_source=resolved, prefetch=prefetch
        )
        assert_bit_equal(dict(weights), dict(list(STATE.items())[2:]))


def test_options_may_come_as_json(tmp_path):
    directory = save_whole(tmp_path, "safetensors")
    with pytest.raises(flashpack.FlashPackError, match="checksums"):
        weights_of(directory, sglang_loader(model_loader_extra_config='{"verify": "always", "device": "cpu"}'))


@pytest.mark.parametrize("extra", ['{"num_threads": 8}', {"enable_multithread_load": True}])
def test_options_of_other_loaders_are_errors(extra):
    with pytest.raises(
        flashpack.FlashPackError, match=r"load format flashpack knows verify, window_bytes, device, lazy$"
    ):
        sglang_loader(model_loader_extra_config=extra)


def test_no_options_at_all_are_fine():
    assert sglang_loader(model_loader_extra_config=None).load_config.model_loader_extra_config == {}


def test_a_directory_without_weights_is_sglangs_error_also_where_it_would_fall_back_to_pickles(tmp_path):
    torch.save(STATE, tmp_path / "model.pt")
    with pytest.raises(RuntimeError, match="Cannot find any model weights"):
        weights_of(tmp_path, sglang_loader())


def test_sglang_has_its_own_functions_again_afterwards_also_after_an_error(tmp_path):
    from sglang.srt.model_loader import loader

    before = dict(vars(loader))
    weights_of(save_whole(tmp_path / "model", "flashpack"), sglang_loader())
    with pytest.raises(RuntimeError):
        weights_of(tmp_path, sglang_loader())
    assert dict(vars(loader)) == before


def test_a_sglang_that_loads_in_another_way_is_an_error_and_not_a_load_without_flashpack(tmp_path, monkeypatch):
    from sglang.srt.model_loader import loader as module

    directory = save_whole(tmp_path, "safetensors")
    loader = sglang_loader()
    monkeypatch.setattr(module.DefaultModelLoader, "_get_weights_iterator", lambda loader, source: iter([]))
    with pytest.raises(flashpack.FlashPackError, match="this version of SGLang"):
        weights_of(directory, loader)
