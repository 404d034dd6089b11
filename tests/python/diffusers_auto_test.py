from __future__ import annotations

import copy
import importlib.metadata
import inspect
import json
import pickle
import sys

import flashpack
import numpy as np
import pytest
import torch
from support import assert_bit_equal

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from diffusers import AutoencoderKL, FluxTransformer2DModel, StableDiffusionPipeline, UNet2DConditionModel  # noqa: E402
from diffusers_models import (  # noqa: E402
    MODEL,
    Counting,
    FlashPackCounting,
    FlashPackSD,
    FlashPackUNet2DConditionModel,
    image,
    make_flux,
    make_pipeline,
    make_plain_pipeline,
    make_unet,
    make_vae,
    plain_text_encoder,
    read_json,
    save_pipeline,
)
from flashpack.integrations.diffusers import (  # noqa: E402
    AutoFlashPackModel,
    FlashPackDiffusersModelMixin,
    FlashPackDiffusionPipeline,
    patch_diffusers_auto_model,
)
from transformers import CLIPTextModel  # noqa: E402

OWN_MODEL = """
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config


class OwnModel(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, width: int = 4):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(width))
"""


def test_the_auto_class_finds_the_class_of_a_directory(tmp_path):
    saved = save_pipeline(tmp_path / "saved")
    for subfolder, base in (("unet", UNet2DConditionModel), ("text_encoder", CLIPTextModel)):
        for arguments in ((saved, subfolder), (saved / subfolder, None)):
            loaded = AutoFlashPackModel.from_pretrained_flashpack(arguments[0], subfolder=arguments[1])
            assert isinstance(loaded, base)
            assert type(loaded).__name__ == f"FlashPack{base.__name__}"
    loaded = AutoFlashPackModel.from_pretrained(saved, subfolder="unet", use_flashpack=True)
    assert_bit_equal(loaded.state_dict(), make_unet().state_dict())


def test_the_auto_class_adds_the_mixin_to_what_diffusers_loads(tmp_path):
    make_unet(UNet2DConditionModel).save_pretrained(tmp_path / "plain")
    loaded = AutoFlashPackModel.from_pretrained(str(tmp_path / "plain"))
    assert isinstance(loaded, FlashPackDiffusersModelMixin)
    loaded.save_pretrained_flashpack(tmp_path / "flash")
    assert read_json(tmp_path / "flash" / "config.json")["_class_name"] == "UNet2DConditionModel"


def test_the_auto_class_has_no_instances_and_names_what_a_config_lacks(tmp_path):
    with pytest.raises(OSError, match="from_pretrained"):
        AutoFlashPackModel()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(flashpack.FlashPackError, match="does not say which class"):
        AutoFlashPackModel.from_pretrained_flashpack(tmp_path)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(flashpack.FlashPackError, match="not a JSON file"):
        AutoFlashPackModel.from_pretrained_flashpack(tmp_path)


def test_code_that_a_model_brings_along_runs_only_when_it_is_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    directory = tmp_path / "model"
    FlashPackCounting().save_pretrained_flashpack(directory)
    (directory / "own_model.py").write_text(OWN_MODEL)
    config = read_json(directory / "config.json") | {
        "_class_name": "OwnModel",
        "auto_map": {"AutoModel": "own_model.OwnModel"},
    }
    (directory / "config.json").write_text(json.dumps(config))
    flashpack.pack_to_file({"weight": torch.full((4,), 7.0)}, directory / MODEL)
    with pytest.raises(flashpack.FlashPackError, match="diffusers has no class OwnModel"):
        AutoFlashPackModel.from_pretrained_flashpack(directory)
    loaded = AutoFlashPackModel.from_pretrained_flashpack(directory, trust_remote_code=True)
    assert loaded.weight.tolist() == [7] * 4
    assert type(loaded).__name__ == "FlashPackOwnModel"


def test_models_of_the_classes_that_are_made_can_be_pickled_and_copied(tmp_path):
    saved = save_pipeline(tmp_path / "saved")
    loaded = AutoFlashPackModel.from_pretrained_flashpack(saved, subfolder="unet")
    for copied in (pickle.loads(pickle.dumps(loaded)), copy.deepcopy(loaded)):
        assert type(copied) is type(loaded)
        assert_bit_equal(copied.state_dict(), loaded.state_dict())


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> None:
    """patch_diffusers_auto_model(), undone after the test."""

    for cls in (diffusers.AutoModel, diffusers.DiffusionPipeline):
        monkeypatch.setattr(cls, "from_pretrained", cls.__dict__["from_pretrained"])
    for cls in (diffusers.AutoModel, diffusers.ModelMixin, transformers.PreTrainedModel):
        for name in ("from_pretrained_flashpack", "save_pretrained_flashpack", "save_flashpack"):
            monkeypatch.setattr(cls, name, None, raising=False)
            monkeypatch.delattr(cls, name)
    patch_diffusers_auto_model()
    before = diffusers.AutoModel.__dict__["from_pretrained"]
    patch_diffusers_auto_model()
    assert diffusers.AutoModel.__dict__["from_pretrained"] is before


@pytest.mark.usefixtures("patched")
def test_a_patched_diffusers_loads_flashpack_files_and_makes_models_that_write_them(tmp_path):
    saved = save_pipeline(tmp_path / "saved")
    from diffusers.models import AutoModel

    make_vae(AutoencoderKL).save_pretrained(tmp_path / "plain")
    model = AutoModel.from_pretrained(str(tmp_path / "plain"))
    assert not model.training
    model.save_pretrained_flashpack(tmp_path / "flash")
    for loaded in (
        AutoModel.from_pretrained_flashpack(tmp_path / "flash"),
        AutoModel.from_pretrained(tmp_path / "flash", use_flashpack=True),
        AutoModel.from_pretrained(saved, subfolder="vae", use_flashpack=True, torch_dtype=torch.float32),
        AutoencoderKL.from_pretrained_flashpack(tmp_path / "flash"),
    ):
        assert type(loaded) is type(model) is AutoencoderKL
        assert not loaded.training
        assert_bit_equal(loaded.state_dict(), model.state_dict())


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("cls", [StableDiffusionPipeline, FlashPackSD])
def test_pipelines_of_a_patched_diffusers_have_models_of_their_own_classes_that_write_flashpack_files(tmp_path, cls):
    make_plain_pipeline().save_pretrained(tmp_path / "plain")
    pipeline = cls.from_pretrained(tmp_path / "plain")
    classes = [type(model) for model in (pipeline.unet, pipeline.vae, pipeline.text_encoder)]
    assert classes == [UNet2DConditionModel, AutoencoderKL, CLIPTextModel]
    pipeline.text_encoder.save_pretrained_flashpack(tmp_path)
    FlashPackSD(**pipeline.components).save_pretrained_flashpack(tmp_path / "flash")
    for component in ("unet", "vae", "text_encoder"):
        assert (tmp_path / "flash" / component / MODEL).is_file()
    assert np.array_equal(image(FlashPackSD.from_pretrained_flashpack(tmp_path / "flash")), image(pipeline))


SIGNATURES = {
    FlashPackDiffusersModelMixin.save_pretrained_flashpack: "self save_directory is_main_process push_to_hub "
    "target_dtype align_bytes silent num_workers commit_message create_pr token repo_id private",
    FlashPackDiffusersModelMixin.from_pretrained_flashpack: "pretrained_model_name_or_path device silent strict "
    "strict_params strict_buffers keep_flash_ref_on_model num_streams chunk_bytes ignore_names ignore_prefixes "
    "ignore_suffixes subfolder revision local_dir local_dir_use_symlinks local_files_only cache_dir token "
    "force_download proxies use_distributed_loading distributed_sharded distributed_shard_strategy rank local_rank "
    "world_size coerce_dtype",
    FlashPackDiffusionPipeline.save_pretrained_flashpack: "self save_directory safe_serialization variant "
    "max_shard_size push_to_hub commit_message create_pr token repo_id private is_main_process align_bytes silent "
    "num_workers target_dtype",
    FlashPackDiffusionPipeline.from_pretrained_flashpack: "pretrained_model_name_or_path device num_streams "
    "chunk_bytes ignore_names ignore_prefixes silent use_distributed_loading distributed_sharded "
    "distributed_shard_strategy coerce_dtype",
}
DEFAULTS = {
    "align_bytes": 128,
    "chunk_bytes": 4 << 20,
    "is_main_process": True,
    "num_streams": 4,
    "num_workers": 32,
    "safe_serialization": True,
    "silent": True,
    "strict_params": True,
}
FALSE = (
    "coerce_dtype create_pr distributed_sharded force_download keep_flash_ref_on_model local_dir_use_symlinks "
    "local_files_only push_to_hub strict_buffers use_distributed_loading"
)


@pytest.mark.parametrize("method", SIGNATURES, ids=lambda method: method.__qualname__)
def test_signatures_begin_as_those_of_flashpack_0_4_5(method):
    names = SIGNATURES[method].split()
    parameters = list(inspect.signature(method).parameters.values())
    assert [parameter.name for parameter in parameters[: len(names)]] == names
    assert parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    for parameter in parameters[: len(names)]:
        if parameter.name not in ("self", "save_directory", "pretrained_model_name_or_path"):
            default = False if parameter.name in FALSE.split() else DEFAULTS.get(parameter.name)
            assert parameter.default == default, parameter.name


def test_the_modules_of_0_4_5_exist():
    from flashpack.integrations.diffusers import auto_model, model, patch, pipeline

    assert auto_model.AutoFlashPackModel is AutoFlashPackModel
    assert model.FlashPackDiffusersModelMixin is FlashPackDiffusersModelMixin
    assert pipeline.FlashPackDiffusionPipeline is FlashPackDiffusionPipeline
    assert callable(patch.patch_diffusers_auto_model)
    assert FlashPackDiffusersModelMixin.flashpack_init_method == "from_config"


def installed() -> bool:
    try:
        return importlib.metadata.version("flashpack") == flashpack.__version__
    except importlib.metadata.PackageNotFoundError:
        return False


native = pytest.mark.skipif(not installed(), reason="diffusers looks for the metadata of an installed flashpack")


@native
@pytest.mark.parametrize("make, base", [(make_unet, UNet2DConditionModel), (make_flux, FluxTransformer2DModel)])
def test_the_native_flashpack_of_diffusers_saves_and_loads_models(make, base, tmp_path):
    model = make(base)
    model.save_pretrained(tmp_path, use_flashpack=True)
    assert (tmp_path / MODEL).is_file()
    for options in ({}, {"device_map": {"": "cpu"}}, {"flashpack_kwargs": {"strict_buffers": True}}):
        loaded = base.from_pretrained(tmp_path, use_flashpack=True, **options)
        assert type(loaded) is base
        assert_bit_equal(loaded.state_dict(), model.state_dict())


@native
def test_the_native_flashpack_of_diffusers_keeps_counters(tmp_path):
    model = Counting().eval()
    model.norm.num_batches_tracked += 1_000_001
    model.save_pretrained(tmp_path, use_flashpack=True)
    assert_bit_equal(Counting.from_pretrained(tmp_path, use_flashpack=True).state_dict(), model.state_dict())


@native
def test_the_native_flashpack_of_diffusers_and_ours_read_each_other(tmp_path):
    unet = make_unet()
    unet.save_pretrained(tmp_path / "theirs", use_flashpack=True)
    loaded = FlashPackUNet2DConditionModel.from_pretrained_flashpack(tmp_path / "theirs")
    assert_bit_equal(loaded.state_dict(), unet.state_dict())
    unet.save_pretrained_flashpack(tmp_path / "ours")
    native = UNet2DConditionModel.from_pretrained(tmp_path / "ours", use_flashpack=True)
    assert_bit_equal(native.state_dict(), unet.state_dict())


@native
def test_the_native_flashpack_of_diffusers_saves_and_loads_a_pipeline(tmp_path):
    pipeline = make_plain_pipeline()
    pipeline.save_pretrained(tmp_path, use_flashpack=True)
    assert (tmp_path / "unet" / MODEL).is_file()
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path, use_flashpack=True)
    assert np.array_equal(image(loaded), image(pipeline))


@native
def test_what_our_pipelines_save_loads_with_the_native_flashpack_of_diffusers(tmp_path):
    pipeline = make_pipeline(text_encoder=plain_text_encoder)
    pipeline.save_pretrained_flashpack(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path, use_flashpack=True)
    assert type(loaded) is StableDiffusionPipeline
    assert np.array_equal(image(loaded), image(pipeline))
