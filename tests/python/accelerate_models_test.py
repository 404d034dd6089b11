"""transformers, diffusers and accelerate, unmodified, under flashpack.accelerate()."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate
import flashpack
import numpy as np
import pytest
import torch
import transformers
import transformers_models as models
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers_models import image, make_plain_pipeline, plain_unet
from flashpack import _accelerate
from support import assert_bit_equal


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were opened through this package."""
    names: list[str] = []
    original = flashpack.safetensors.torch.open_file

    def noted(path: Any, *args: Any, **options: Any) -> Any:
        names.append(Path(path).name)
        return original(path, *args, **options)

    monkeypatch.setattr(flashpack.safetensors.torch, "open_file", noted)
    return names


@pytest.mark.parametrize("name", models.MODELS)
def test_a_transformers_model_is_the_same(name, tmp_path, opened):
    models.make(name).save_pretrained(tmp_path)
    model_class = type(models.make(name))
    expected = model_class.from_pretrained(tmp_path)
    with flashpack.accelerate():
        actual = model_class.from_pretrained(tmp_path)
    assert "model.safetensors" in opened
    models.assert_same_model(actual, expected)
    models.assert_same_outputs(name, actual, expected)


@pytest.mark.parametrize(
    "options", [{"dtype": torch.bfloat16}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}}], ids=str
)
def test_options_of_from_pretrained_keep_their_meaning(tmp_path, options, opened):
    models.make("llama").save_pretrained(tmp_path)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    with flashpack.accelerate():
        actual = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    assert opened
    models.assert_same_model(actual, expected)


def test_a_sharded_checkpoint_is_loaded_shard_by_shard(tmp_path, opened):
    models.make("mixtral").save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with flashpack.accelerate():
        actual = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert set(opened) == set(shards)
    models.assert_same_outputs("mixtral", actual, expected)


def test_weights_that_are_offloaded_to_the_disk_come_back_through_this_package(tmp_path, opened):
    models.make("llama").save_pretrained(tmp_path)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with accelerate.init_empty_weights():
        model = transformers.LlamaForCausalLM(expected.config)
    with flashpack.accelerate():
        device_map = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
        device_map["model.rotary_emb"] = "cpu"
        accelerate.load_checkpoint_and_dispatch(
            model, tmp_path, device_map=device_map, offload_folder=tmp_path / "offloaded"
        )
        models.assert_same_outputs("llama", model.eval(), expected)
    assert opened


def test_a_diffusers_model_and_a_pipeline_are_the_same(tmp_path, opened):
    plain_unet().save_pretrained(tmp_path / "unet")
    make_plain_pipeline().save_pretrained(tmp_path / "pipeline")
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    with flashpack.accelerate():
        again = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
        assert opened == ["diffusion_pytorch_model.safetensors"]
        pipeline_again = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert_bit_equal(again.state_dict(), unet.state_dict())
    assert np.array_equal(image(pipeline_again), image(pipeline))
    assert len(opened) >= 4  # Old versions open a file several times.


_BESIDE_PATCHES = """
import sys
from pathlib import Path
import flashpack
import transformers
import transformers_models as models
folder = sys.argv[1]
flashpack.patch_integrations()
model = models.make("llama")
models.save(model, Path(folder, "ours"))
model.save_pretrained(folder + "/theirs")
with flashpack.accelerate():
    ours = transformers.AutoModelForCausalLM.from_pretrained(folder + "/ours", use_flashpack=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder + "/theirs")
models.assert_same_outputs("llama", ours, model)
models.assert_same_outputs("llama", theirs, model)
"""


def test_the_integrations_of_flashpack_files_work_beside_it(tmp_path):
    # The patches stay, so that this has a process of its own.
    folder = Path(__file__).parent
    subprocess.run([sys.executable, "-c", _BESIDE_PATCHES, str(tmp_path)], cwd=folder, check=True, timeout=120)


@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="this transformers reads whole tensors")
def test_what_goes_to_a_gpu_is_read_straight_to_it_by_transformers(tmp_path, opened, monkeypatch):
    """The CPU stands for a GPU here."""
    models.make("mixtral").save_pretrained(tmp_path)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    moved: list[str] = []
    original = flashpack.safetensors.PySafeSlice.on

    def noted(part: Any, device: Any) -> Any:
        moved.append(part._entry.name)
        return original(part, device)

    monkeypatch.setattr(flashpack.safetensors.PySafeSlice, "on", noted)
    monkeypatch.setattr(flashpack.safetensors.torch, "is_gpu", lambda device: True)
    loading = transformers.core_model_loading
    before = loading._materialize_copy
    with flashpack.accelerate() as acceleration:
        actual = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert "transformers.core_model_loading._materialize_copy" in acceleration.patched()
    assert loading._materialize_copy is before
    assert sorted(moved) == sorted(flashpack.load_file(tmp_path / "model.safetensors"))
    models.assert_same_model(actual, expected)


def test_without_a_gpu_slices_stay_where_they_are(tmp_path, opened):
    part = flashpack.safetensors.PySafeSlice.__new__(flashpack.safetensors.PySafeSlice)
    for device in (None, "cpu", torch.device("cpu"), "meta"):
        assert _accelerate._on_device(part, device) is part
