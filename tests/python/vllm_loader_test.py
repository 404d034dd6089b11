from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any

import flashpack
import pytest
import torch
from flashpack._stream import TensorStream, stream_tensors
from flashpack.integrations import _serving
from flashpack.integrations._lazy import LazyTensor
from serving_models import FORMATS, STATE, save_sharded, save_whole, stand_ins, vllm_loader, weights_of
from support import assert_bit_equal, run_python


@pytest.fixture(autouse=True)
def vllm() -> Iterator[None]:
    with stand_ins():
        yield


def test_the_entry_point_registers_the_load_format_however_often_it_is_called():
    (entry_point,) = entry_points(group="vllm.general_plugins", name="flashpack")
    entry_point.load()()
    entry_point.load()()
    assert "flashpack" in sys.modules["vllm.model_executor.model_loader"].loaders


def test_importing_the_integrations_does_not_import_the_programs_that_they_are_for():
    code = """
import sys, flashpack.integrations.vllm, flashpack.integrations.sglang
print({"vllm", "sglang"} & set(sys.modules))
"""
    assert run_python(code) == "set()\n"


def test_converted_weights_are_taken_where_both_formats_are(tmp_path):
    save_whole(tmp_path, "safetensors", {"old": torch.zeros(2)})
    assert_bit_equal(weights_of(save_sharded(tmp_path, "flashpack"), vllm_loader()), STATE)


def test_names_get_the_prefix_of_their_source_and_folders_and_patterns_are_those_of_the_source(tmp_path):
    (tmp_path / "part").mkdir()
    save_whole(tmp_path / "part", "flashpack")
    save_whole(tmp_path / "part", "safetensors", {"a": torch.ones(2)})
    loaded = weights_of(
        tmp_path, vllm_loader(), subfolder="part", prefix="p.", allow_patterns_overrides=["*.safetensors"]
    )
    assert_bit_equal(loaded, {"p.a": torch.ones(2)})


@pytest.mark.parametrize("suffix", FORMATS)
def test_experts_of_other_ranks_are_not_read(tmp_path, suffix):
    loader = vllm_loader()
    loader.local_expert_ids = {0}
    loaded = weights_of(save_sharded(tmp_path, suffix), loader)
    assert_bit_equal(loaded, {name: each for name, each in STATE.items() if not name.endswith("1.up_proj.weight")})


@pytest.mark.parametrize("suffix", FORMATS)
def test_files_that_have_only_unused_weights_are_not_read(tmp_path, suffix):
    directory = save_sharded(tmp_path, suffix)
    loaded = weights_of(directory, vllm_loader(), is_unused_weight=lambda name: "embed" in name or "experts.0" in name)
    assert_bit_equal(loaded, dict(list(STATE.items())[2:]))
    assert_bit_equal(weights_of(directory, vllm_loader(), is_unused_weight=lambda name: True), STATE)


def test_an_index_is_not_applied_to_files_that_the_source_names_by_patterns(tmp_path):
    save_sharded(tmp_path, "flashpack")
    loaded = weights_of(tmp_path, vllm_loader(), allow_patterns_overrides=["model.flashpack"])
    assert set(loaded) == {"of another program"}


@pytest.mark.parametrize("suffix", FORMATS)
def test_lazy_weights_are_read_when_they_are_used_and_the_filters_have_their_effect(tmp_path, suffix):
    loader = vllm_loader(model_loader_extra_config={"lazy": True})
    loader.local_expert_ids = {1}
    loaded = weights_of(save_sharded(tmp_path, suffix), loader)
    assert {type(tensor) for tensor in loaded.values()} == {LazyTensor}
    expected = {name: each for name, each in STATE.items() if "experts.0" not in name}
    assert_bit_equal({name: tensor.clone() for name, tensor in loaded.items()}, expected)


@pytest.mark.parametrize("tied", [True, False])
def test_an_lm_head_in_a_flashpack_file_unties_the_embeddings_as_one_in_a_safetensors_file_does(tmp_path, tied):
    from vllm.config import ModelConfig, VllmConfig

    save_whole(tmp_path, "flashpack", {name: each for name, each in STATE.items() if not tied or "lm_head" not in name})
    config = ModelConfig(str(tmp_path))
    vllm_loader().load_model(VllmConfig(), config)
    assert config.tie_word_embeddings is tied


def test_the_bytes_are_verified_as_the_user_asks_and_vllm_gets_its_own_option(tmp_path):
    directory = save_whole(tmp_path, "safetensors")
    loader = vllm_loader(model_loader_extra_config={"verify": "always", "enable_weights_track": False})
    assert loader.load_config.model_loader_extra_config == {"enable_weights_track": False}
    with pytest.raises(flashpack.FlashPackError, match="checksums"):
        weights_of(directory, loader)


@pytest.mark.parametrize("suffix", FORMATS)
def test_weights_are_a_stream_with_the_window_that_the_user_asks_for(tmp_path, monkeypatch, suffix):
    state = {f"{number:02}": torch.full((256,), number, dtype=torch.float32) for number in range(20)}
    directory = save_whole(tmp_path, suffix, state)
    streams: list[TensorStream] = []

    def noted(*arguments: Any, **options: Any) -> TensorStream:
        assert options["window_bytes"] == 6 << 10
        streams.append(stream_tensors(*arguments, **options))
        return streams[-1]

    monkeypatch.setattr(_serving, "stream_tensors", noted)
    loader = vllm_loader(model_loader_extra_config={"window_bytes": 6 << 10})
    weights = loader._get_weights_iterator(loader.Source(str(directory)))
    assert streams == []
    loaded = dict(next(weights) for _ in range(4))
    weights.close()
    assert list(streams[0]) == []
    assert_bit_equal(loaded, dict(list(state.items())[:4]))


@pytest.mark.parametrize(
    ("platform", "of_load", "option", "expected"),
    [
        ("cpu", None, None, "cpu"),
        ("tpu", None, None, "cpu"),
        ("cuda", None, None, "cuda:3"),
        ("cuda", "cpu", None, "cpu"),
        ("cpu", "cuda:1", None, "cuda:1"),
        ("cuda", None, "cpu", "cpu"),
    ],
)
def test_weights_go_to_the_device_of_the_platform_unless_the_user_names_another(
    tmp_path, monkeypatch, platform, of_load, option, expected
):
    from vllm.platforms import current_platform

    asked = []
    monkeypatch.setattr(_serving, "_read_weights", lambda files, device, *_: asked.append(device) or (x for x in ()))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(current_platform, "device_type", platform)
    extra = {} if option is None else {"device": option}
    weights_of(save_whole(tmp_path, "flashpack"), vllm_loader(device=of_load, model_loader_extra_config=extra))
    assert asked == [torch.device(expected)]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"num_threads": 8, "chunks": 1}, "has chunks, num_threads; load format flashpack knows verify, window_bytes"),
        ({"verify": "sometimes"}, "verify must be auto, always or never"),
        ({"window_bytes": "64 MB"}, "window_bytes of model_loader_extra_config must be a positive integer"),
        ({"window_bytes": 0}, "must be a positive integer"),
        ({"window_bytes": True}, "must be a positive integer"),
        ({"device": "mps"}, "Unsupported device: mps"),
        ({"lazy": "yes"}, "lazy of model_loader_extra_config must be true or false"),
        ("verify", "must be an object"),
    ],
)
def test_options_that_are_unknown_or_wrong_are_errors_when_the_loader_is_made(extra, message):
    with pytest.raises(flashpack.FlashPackError, match=message):
        vllm_loader(model_loader_extra_config=extra)


def test_a_directory_without_weights_is_vllms_error(tmp_path):
    with pytest.raises(RuntimeError, match="Cannot find any model weights"):
        weights_of(tmp_path, vllm_loader())


def test_an_index_that_lists_a_missing_file_is_an_error_that_names_both(tmp_path):
    save_sharded(tmp_path, "flashpack")
    (tmp_path / "model-00002-of-00002.flashpack").unlink()
    with pytest.raises(FileNotFoundError, match=r"index\.json lists a file.*model-00002-of-00002\.flashpack"):
        weights_of(tmp_path, vllm_loader())


def test_vllm_has_its_own_functions_again_afterwards_also_after_an_error(tmp_path):
    from vllm.model_executor.model_loader import default_loader

    before = dict(vars(default_loader))
    weights_of(save_whole(tmp_path / "model", "flashpack"), vllm_loader())
    with pytest.raises(RuntimeError):
        weights_of(tmp_path, vllm_loader())
    assert dict(vars(default_loader)) == before


def test_a_vllm_that_loads_in_another_way_is_an_error_and_not_a_load_without_flashpack(tmp_path, monkeypatch):
    from vllm.model_executor.model_loader import default_loader

    directory = save_whole(tmp_path, "safetensors")
    loader = vllm_loader()
    other_way = lambda loader, source: iter([("a", torch.ones(1))])  # noqa: E731
    monkeypatch.setattr(default_loader.DefaultModelLoader, "_get_weights_iterator", other_way)
    with pytest.raises(flashpack.FlashPackError, match="this version of vLLM"):
        weights_of(directory, loader)
    monkeypatch.delattr(default_loader, "safetensors_weights_iterator")
    with pytest.raises(flashpack.FlashPackError, match=r"has no safetensors_weights_iterator; .* for vLLM 0\.32"):
        weights_of(directory, loader)


def test_checkpoints_of_torchao_are_left_to_vllm_and_refused_as_flashpack_files(tmp_path):
    loader = vllm_loader(safetensors_load_strategy="torchao")
    directory = save_whole(tmp_path, "safetensors")
    assert weights_of(directory, loader) == {"as vLLM reads it": [str(directory / "model.safetensors")]}
    save_whole(tmp_path, "flashpack")
    with pytest.raises(flashpack.FlashPackError, match="torchao"):
        weights_of(directory, loader)
