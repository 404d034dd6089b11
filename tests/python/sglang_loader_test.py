from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import flashpack
import pytest
import torch
from serving_models import FORMATS, STATE, save_sharded, save_whole, stand_ins
from support import assert_bit_equal, bits


@pytest.fixture(autouse=True)
def sglang() -> Iterator[None]:
    with stand_ins():
        yield


def loader_of(**options: Any) -> Any:
    """What SGLang makes of the load format, which may be written in any case."""
    from flashpack.integrations.sglang import register
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_loader.loader import get_model_loader

    register()
    return get_model_loader(LoadConfig(load_format="FlashPack", **options))


def weights_of(directory: Path, loader: Any = None, **source: Any) -> dict[str, torch.Tensor]:
    loader = loader or loader_of()
    return dict(loader._get_weights_iterator(loader.Source(str(directory), **source)))


def test_the_entry_point_registers_the_load_format_however_often_it_is_called():
    (entry_point,) = entry_points(group="sglang.srt.plugins", name="flashpack")
    entry_point.load()()
    entry_point.load()()
    choices = sys.modules["sglang.srt.arg_groups.choices"].LOAD_FORMAT_CHOICES
    assert choices.count("flashpack") == 1


def test_other_load_formats_are_checked_by_sglang_as_before():
    from sglang.srt.configs.load_config import LoadConfig, LoadFormat

    loader_of()
    assert LoadConfig(load_format="SafeTensors").load_format is LoadFormat.SAFETENSORS
    with pytest.raises(ValueError, match="flashpacks"):
        LoadConfig(load_format="flashpacks")


@pytest.mark.parametrize("save", [save_whole, save_sharded])
@pytest.mark.parametrize("suffix", FORMATS)
def test_weights_of_either_format_are_those_of_the_model_and_not_of_files_that_its_index_omits(tmp_path, save, suffix):
    assert_bit_equal(weights_of(save(tmp_path / "model", suffix)), STATE)


@pytest.mark.parametrize("suffix", FORMATS)
def test_of_tensors_with_one_name_the_last_stays_where_there_is_no_index(tmp_path, suffix):
    for name, value in (("9", 1), ("91", 2)):
        save_whole(tmp_path, suffix, {"a": torch.full((2,), value), name: torch.ones(2)})
        (tmp_path / f"model.{suffix}").rename(tmp_path / f"part-{name}.{suffix}")
    loader = loader_of()
    loaded = list(loader._get_weights_iterator(loader.Source(str(tmp_path))))
    assert sorted(name for name, _ in loaded) == ["9", "91", "a", "a"]
    assert bits(dict(loaded)["a"]) == bits(torch.full((2,), 2))


def test_a_damaged_file_is_named_where_there_is_no_index(tmp_path):
    save_whole(tmp_path, "safetensors")
    (tmp_path / "part.safetensors").write_bytes(b"nonsense")
    with pytest.raises(flashpack.FlashPackError, match=r"part\.safetensors"):
        weights_of(tmp_path)


def test_converted_weights_are_taken_where_both_formats_are(tmp_path):
    save_sharded(tmp_path, "safetensors")
    assert_bit_equal(weights_of(save_whole(tmp_path, "flashpack", {"new": torch.ones(2)})), {"new": torch.ones(2)})


def test_names_get_the_prefix_of_their_source_and_patterns_are_those_of_the_source(tmp_path):
    save_whole(tmp_path, "flashpack")
    save_whole(tmp_path, "safetensors", {"a": torch.ones(2)})
    loaded = weights_of(tmp_path, prefix="p.", allow_patterns_overrides=["*.safetensors"])
    assert_bit_equal(loaded, {"p.a": torch.ones(2)})


def test_files_that_sglang_has_chosen_before_are_loaded_whether_or_not_it_has_prefetched_them(tmp_path):
    directory = save_sharded(tmp_path, "flashpack")
    loader = loader_of()
    resolved = loader.ResolvedSource((str(directory / "model-00002-of-00002.flashpack"),))
    for prefetch in (False, True):
        weights = loader._get_weights_iterator(
            loader.Source(str(directory)), resolved_source=resolved, prefetch=prefetch
        )
        assert_bit_equal(dict(weights), dict(list(STATE.items())[2:]))


def test_options_may_come_as_json(tmp_path):
    directory = save_whole(tmp_path, "safetensors")
    with pytest.raises(flashpack.FlashPackError, match="checksums"):
        weights_of(directory, loader_of(model_loader_extra_config='{"verify": "always", "device": "cpu"}'))


@pytest.mark.parametrize("extra", ['{"num_threads": 8}', {"enable_multithread_load": True}])
def test_options_of_other_loaders_are_errors(extra):
    with pytest.raises(
        flashpack.FlashPackError, match=r"load format flashpack knows verify, window_bytes, device, lazy$"
    ):
        loader_of(model_loader_extra_config=extra)


def test_no_options_at_all_are_fine():
    assert loader_of(model_loader_extra_config=None).load_config.model_loader_extra_config == {}


def test_a_directory_without_weights_is_sglangs_error_also_where_it_would_fall_back_to_pickles(tmp_path):
    torch.save(STATE, tmp_path / "model.pt")
    with pytest.raises(RuntimeError, match="Cannot find any model weights"):
        weights_of(tmp_path)


def test_sglang_has_its_own_functions_again_afterwards_also_after_an_error(tmp_path):
    from sglang.srt.model_loader import loader

    before = dict(vars(loader))
    weights_of(save_whole(tmp_path / "model", "flashpack"))
    with pytest.raises(RuntimeError):
        weights_of(tmp_path)
    assert dict(vars(loader)) == before


def test_a_sglang_that_loads_in_another_way_is_an_error_and_not_a_load_without_flashpack(tmp_path, monkeypatch):
    from sglang.srt.model_loader import loader as module

    directory = save_whole(tmp_path, "safetensors")
    loader = loader_of()
    monkeypatch.setattr(module.DefaultModelLoader, "_get_weights_iterator", lambda loader, source: iter([]))
    with pytest.raises(flashpack.FlashPackError, match="this version of SGLang"):
        weights_of(directory, loader)
