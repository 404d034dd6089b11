from __future__ import annotations

import json
import sys
from typing import Any

import flashpack
import numpy as np
import pytest
import torch
from support import assert_bit_equal, run_python

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel  # noqa: E402
from diffusers_models import (  # noqa: E402
    MODEL,
    AnnotatedSD,
    FlashPackAutoencoderKL,
    FlashPackSD,
    FlashPackUNet2DConditionModel,
    image,
    make_pipeline,
    make_plain_pipeline,
    make_unet,
    plain_text_encoder,
    plain_unet,
    plain_vae,
    read_json,
    save_pipeline,
)
from flashpack.integrations.diffusers import (  # noqa: E402
    FlashPackDiffusersModelMixin,
    FlashPackDiffusionPipeline,
)


def test_a_pipeline_returns_with_bit_equal_images(tmp_path):
    saved = save_pipeline(tmp_path / "saved")
    for component in ("unet", "vae", "text_encoder"):
        assert (saved / component / MODEL).is_file()
        assert not list((saved / component).glob("*.safetensors"))
    loaded = FlashPackSD.from_pretrained_flashpack(saved)
    assert np.array_equal(image(loaded), image(make_pipeline()))
    assert loaded.safety_checker is None
    assert not any(model.training for model in (loaded.unet, loaded.vae, loaded.text_encoder))
    assert loaded.config._name_or_path == str(saved)


def test_a_loaded_pipeline_can_be_saved_again(tmp_path):
    saved = save_pipeline(tmp_path / "saved")
    loaded = FlashPackSD.from_pretrained_flashpack(saved)
    loaded.save_pretrained_flashpack(tmp_path / "again")
    for component in ("unet", "vae", "text_encoder"):
        assert (tmp_path / "again" / component / MODEL).read_bytes() == (saved / component / MODEL).read_bytes()


def test_the_index_of_a_pipeline_names_classes_that_load_without_flashpack(tmp_path):
    saved = save_pipeline(tmp_path / "saved")
    index = read_json(saved / "model_index.json")
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    assert index["text_encoder"] == ["transformers", "CLIPTextModel"]
    assert "FlashPack" not in (saved / "model_index.json").read_text()


def test_models_without_the_mixin_are_saved_by_their_own_method(tmp_path):
    pipeline = make_pipeline(vae=plain_vae, text_encoder=plain_text_encoder)
    pipeline.save_pretrained_flashpack(tmp_path, variant="fp32")
    assert (tmp_path / "unet" / MODEL).is_file()
    assert (tmp_path / "vae" / "diffusion_pytorch_model.fp32.safetensors").is_file()
    assert (tmp_path / "text_encoder" / "model.fp32.safetensors").is_file()
    loaded = FlashPackSD.from_pretrained_flashpack(tmp_path, variant="fp32")
    assert type(loaded.vae) is AutoencoderKL
    assert np.array_equal(image(loaded), image(pipeline))


def test_a_component_saved_by_its_own_method_takes_the_place_of_an_older_flashpack_file(tmp_path):
    saved = save_pipeline(tmp_path / "saved")
    text_encoder = plain_text_encoder().to(torch.bfloat16)
    make_pipeline(text_encoder=lambda: text_encoder).save_pretrained_flashpack(saved)
    assert not (saved / "text_encoder" / MODEL).exists()
    loaded = FlashPackSD.from_pretrained_flashpack(saved, torch_dtype=torch.bfloat16)
    assert_bit_equal(loaded.text_encoder.state_dict(), text_encoder.state_dict())


def test_what_quantization_does_not_reach_is_logged(tmp_path, caplog):
    saved = save_pipeline(tmp_path / "saved")
    configuration = diffusers.PipelineQuantizationConfig(quant_mapping={"unet": diffusers.QuantoConfig("int8")})
    FlashPackSD.from_pretrained_flashpack(saved, quantization_config=configuration)
    assert "quantization_config has no effect on text_encoder, unet, vae" in caplog.text


def test_a_constructor_says_which_components_are_to_have_the_mixin(tmp_path):
    plain = make_plain_pipeline()
    plain.save_pretrained(tmp_path / "plain")
    pipeline = AnnotatedSD.from_pretrained(tmp_path / "plain")
    assert type(pipeline.unet) is FlashPackUNet2DConditionModel
    pipeline.save_pretrained_flashpack(tmp_path / "flash", push_to_hub=False)
    assert (tmp_path / "flash" / "unet" / MODEL).is_file()
    assert (tmp_path / "flash" / "text_encoder" / "model.safetensors").is_file()
    assert read_json(tmp_path / "flash" / "model_index.json")["_class_name"] == "StableDiffusionPipeline"
    loaded = AnnotatedSD.from_pretrained_flashpack(tmp_path / "flash")
    assert type(loaded.vae) is FlashPackAutoencoderKL
    assert np.array_equal(image(loaded), image(plain))


def test_a_component_that_is_passed_stands_for_a_class_that_nobody_has(tmp_path):
    saved = save_pipeline(tmp_path / "saved")
    index = read_json(saved / "model_index.json") | {"unet": ["script_of_long_ago", "FlashPackMyUNet"]}
    (saved / "model_index.json").write_text(json.dumps(index))
    for unet in (make_unet(), plain_unet()):
        assert FlashPackSD.from_pretrained_flashpack(saved, unet=unet).unet is unet
    assert FlashPackSD.from_pretrained_flashpack(saved, unet=None).unet is None


class OtherUNet(UNet2DConditionModel, FlashPackDiffusersModelMixin):
    """A component's class of one's own, which its base cannot stand for."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class FlashPackOtherUNet(OtherUNet):
    pass


@pytest.mark.parametrize("base", [FlashPackSD, FlashPackDiffusionPipeline])
@pytest.mark.parametrize("saved", [OtherUNet, FlashPackOtherUNet])
def test_a_component_of_a_class_that_changes_its_base_returns_as_that_class(tmp_path, base, saved):
    pipeline = make_pipeline(unet=lambda: make_unet(saved))
    pipeline.save_pretrained_flashpack(tmp_path)
    assert read_json(tmp_path / "model_index.json")["unet"] == [__name__, "OtherUNet"]
    loaded = base.from_pretrained_flashpack(tmp_path)
    assert type(loaded.unet) is OtherUNet
    assert np.array_equal(image(loaded), image(pipeline))


SAVES_A_PIPELINE = """
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers_models import make_pipeline, make_text_encoder, make_unet, make_vae
from flashpack.integrations.diffusers import FlashPackDiffusersModelMixin, FlashPackDiffusionPipeline
from flashpack.integrations.transformers import FlashPackTransformersModelMixin
from transformers import CLIPTextModel

class FPUNet(UNet2DConditionModel, FlashPackDiffusersModelMixin):
    flashpack_ignore_prefixes = ["extra"]

    def count(self):
        return self.num_parameters()

class Vae(AutoencoderKL):
    pass

class MyVae(Vae, FlashPackDiffusersModelMixin):
    '''With words of its own.'''

class FlashPackEncoder(CLIPTextModel, FlashPackTransformersModelMixin):
    pass

class Pipe(StableDiffusionPipeline, FlashPackDiffusionPipeline):
    pass

makers = {"unet": lambda: make_unet(FPUNet), "vae": lambda: make_vae(MyVae)}
pipeline = make_pipeline(Pipe, text_encoder=lambda: make_text_encoder(FlashPackEncoder), **makers)
pipeline.save_pretrained_flashpack(DIRECTORY)
"""


def test_a_saved_pipeline_loads_in_another_process_whatever_its_classes_are_called(tmp_path):
    run_python(f"import sys\nsys.path[:] = {sys.path!r}\nDIRECTORY = {str(tmp_path)!r}\n{SAVES_A_PIPELINE}")
    index = read_json(tmp_path / "model_index.json")
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    assert index["text_encoder"] == ["transformers", "CLIPTextModel"]
    assert read_json(tmp_path / "unet" / "config.json")["_class_name"] == "UNet2DConditionModel"
    assert read_json(tmp_path / "text_encoder" / "config.json")["architectures"] == ["CLIPTextModel"]
    loaded = FlashPackDiffusionPipeline.from_pretrained_flashpack(tmp_path)
    assert np.array_equal(image(loaded), image(make_pipeline()))


def test_components_that_are_passed_are_not_loaded(tmp_path):
    saved = save_pipeline(tmp_path / "saved")
    unet = make_unet()
    (saved / "unet" / MODEL).write_bytes(b"damaged")
    loaded = FlashPackSD.from_pretrained_flashpack(saved, unet=unet, tokenizer=None)
    assert loaded.unet is unet
    assert loaded.tokenizer is None


def test_the_base_class_finds_the_class_of_the_pipeline(tmp_path):
    saved = save_pipeline(tmp_path / "saved")
    loaded = FlashPackDiffusionPipeline.from_pretrained_flashpack(saved)
    assert isinstance(loaded, StableDiffusionPipeline)
    assert type(loaded).__name__ == "FlashPackStableDiffusionPipeline"
    (saved / "model_index.json").write_text(json.dumps(read_json(saved / "model_index.json") | {"_class_name": "No"}))
    with pytest.raises(flashpack.FlashPackError, match="no pipeline No"):
        FlashPackDiffusionPipeline.from_pretrained_flashpack(saved)


def test_a_target_dtype_may_differ_between_components(tmp_path):
    pipeline = make_pipeline()
    pipeline.save_pretrained_flashpack(tmp_path, target_dtype={"unet": torch.bfloat16, "vae": torch.float16})
    loaded = FlashPackSD.from_pretrained_flashpack(tmp_path)
    assert (loaded.unet.dtype, loaded.vae.dtype, loaded.text_encoder.dtype) == (
        torch.bfloat16,
        torch.float16,
        torch.float32,
    )
    assert pipeline.unet.dtype is torch.float32
    with pytest.raises(flashpack.FlashPackError, match="no component: unett"):
        pipeline.save_pretrained_flashpack(tmp_path, target_dtype={"unett": torch.bfloat16})
    pipeline.save_pretrained_flashpack(tmp_path, target_dtype=torch.bfloat16)
    assert FlashPackSD.from_pretrained_flashpack(tmp_path).text_encoder.dtype is torch.bfloat16


def test_a_dtype_of_the_load_may_differ_between_components(tmp_path):
    saved = save_pipeline(tmp_path / "saved")
    dtypes = {"unet": torch.float64, "default": torch.bfloat16}
    loaded = FlashPackSD.from_pretrained_flashpack(saved, torch_dtype=dtypes)
    assert (loaded.unet.dtype, loaded.vae.dtype, loaded.text_encoder.dtype) == (
        torch.float64,
        torch.bfloat16,
        torch.bfloat16,
    )
    assert FlashPackSD.from_pretrained_flashpack(saved, torch_dtype=torch.float16).unet.dtype is torch.float16


def test_the_ranks_of_a_group_load_a_pipeline_together(tmp_path, monkeypatch):
    saved = save_pipeline(tmp_path / "saved")
    places = {"rank": 0, "local_rank": 0, "world_size": 1}
    seen = []
    original = flashpack.mixin.assign

    def assign(model: Any, path: Any, options: Any) -> None:
        seen.append(options.keywords())
        original(model, path, options)

    monkeypatch.setattr(flashpack.mixin, "assign", assign)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        loaded = FlashPackSD.from_pretrained_flashpack(saved, use_distributed_loading=True, **places)
    finally:
        torch.distributed.destroy_process_group()
    assert seen[0].items() >= {"use_distributed_loading": True, **places}.items()
    assert np.array_equal(image(loaded), image(make_pipeline()))


def test_an_error_says_which_component_it_was(tmp_path):
    saved = save_pipeline(tmp_path / "saved")
    (saved / "vae" / MODEL).write_bytes(b"damaged")
    with pytest.raises(RuntimeError, match="Error loading vae from diffusers AutoencoderKL") as caught:
        FlashPackSD.from_pretrained_flashpack(saved)
    assert isinstance(caught.value.__cause__, flashpack.FlashPackError)


def test_a_model_without_any_weights_is_an_error_that_names_the_flashpack_file(tmp_path):
    saved = save_pipeline(tmp_path / "saved")
    (saved / "unet" / MODEL).unlink()
    with pytest.raises(RuntimeError, match="Error loading unet from diffusers UNet2DConditionModel") as caught:
        FlashPackSD.from_pretrained_flashpack(saved)
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    assert "Flashpack file" in str(caught.value.__cause__)


def test_ignored_names_and_strict_flags_reach_every_component(tmp_path):
    saved = save_pipeline(tmp_path / "saved")
    with pytest.warns(UserWarning, match=r"meta device.*conv_in\.bias"):
        loaded = FlashPackSD.from_pretrained_flashpack(saved, ignore_suffixes=iter(["conv_in.bias"]))
    assert loaded.unet.conv_in.bias.is_meta
    loaded = FlashPackSD.from_pretrained_flashpack(saved, keep_flash_ref_on_model=True)
    assert loaded.unet._flash_shared_storage_meta["index"]


def test_pipelines_with_the_class_names_of_flashpack_0_4_5_load(tmp_path):
    saved = save_pipeline(tmp_path / "saved")
    index = read_json(saved / "model_index.json") | {
        "_class_name": "FlashPackStableDiffusionPipeline",
        "unet": ["flashpack.integrations.diffusers.auto_model", "FlashPackUNet2DConditionModel"],
        "vae": ["diffusers", "FlashPackAutoencoderKL"],
        "text_encoder": ["flashpack.integrations.transformers.patch", "FlashPackCLIPTextModel"],
    }
    (saved / "model_index.json").write_text(json.dumps(index))
    assert np.array_equal(image(FlashPackSD.from_pretrained_flashpack(saved)), image(make_pipeline()))
    loaded = FlashPackDiffusionPipeline.from_pretrained_flashpack(saved)
    assert loaded.config._name_or_path == str(saved)
    loaded.save_pretrained_flashpack(saved)
    assert "FlashPack" not in (saved / "model_index.json").read_text()


def test_a_file_cannot_make_a_module_be_imported(tmp_path, monkeypatch):
    saved = save_pipeline(tmp_path / "saved")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "payload_module.py").write_text("raise SystemExit('imported')")
    index = read_json(saved / "model_index.json") | {"unet": ["payload_module", "UNet2DConditionModel"]}
    (saved / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(RuntimeError, match="Error loading unet from payload_module UNet2DConditionModel"):
        FlashPackSD.from_pretrained_flashpack(saved)


def test_a_compiled_model_is_saved_as_what_it_was(tmp_path):
    pipeline = make_pipeline()
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    pipeline.save_pretrained_flashpack(tmp_path)
    assert (tmp_path / "unet" / MODEL).is_file()
    assert read_json(tmp_path / "model_index.json")["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert_bit_equal(FlashPackSD.from_pretrained_flashpack(tmp_path).unet.state_dict(), make_unet().state_dict())
