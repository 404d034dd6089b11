from __future__ import annotations

import copy
import importlib.metadata
import inspect
import json
import pickle
from pathlib import Path
from typing import Any

import flashpack
import numpy as np
import pytest
import torch
from support import assert_bit_equal

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from diffusers import (  # noqa: E402
    AutoencoderKL,
    ConfigMixin,
    DDIMScheduler,
    FluxTransformer2DModel,
    ModelMixin,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.configuration_utils import register_to_config  # noqa: E402
from flashpack.integrations.diffusers import (  # noqa: E402
    AutoFlashPackModel,
    FlashPackDiffusersModelMixin,
    FlashPackDiffusionPipeline,
)
from flashpack.integrations.transformers import FlashPackTransformersModelMixin  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer  # noqa: E402

MODEL = "model.flashpack"


class FlashPackUNet2DConditionModel(UNet2DConditionModel, FlashPackDiffusersModelMixin):
    pass


class FlashPackAutoencoderKL(AutoencoderKL, FlashPackDiffusersModelMixin):
    pass


class FlashPackFlux(FluxTransformer2DModel, FlashPackDiffusersModelMixin):
    pass


class FlashPackSD3(SD3Transformer2DModel, FlashPackDiffusersModelMixin):
    pass


class FlashPackCLIPTextModel(CLIPTextModel, FlashPackTransformersModelMixin):
    pass


class FlashPackSD(StableDiffusionPipeline, FlashPackDiffusionPipeline):
    pass


class AnnotatedSD(StableDiffusionPipeline, FlashPackDiffusionPipeline):
    def __init__(
        self,
        vae: FlashPackAutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: FlashPackUNet2DConditionModel | None,
        scheduler: DDIMScheduler,
        safety_checker: None = None,
        feature_extractor: None = None,
        image_encoder: None = None,
        requires_safety_checker: bool = False,
    ) -> None:
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            requires_safety_checker=requires_safety_checker,
        )


class Counting(ModelMixin, ConfigMixin):
    """Buffers of all kinds, and a part that has to stay in float32."""

    _keep_in_fp32_modules = ("exact",)

    @register_to_config
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(width)
        self.exact = torch.nn.Linear(width, width)
        self.rough = torch.nn.Linear(width, width)
        self.register_buffer("table", torch.arange(width).float())
        self.register_buffer("scale", torch.ones(width), persistent=False)


class FlashPackCounting(Counting, FlashPackDiffusersModelMixin):
    pass


def make_unet(cls: type = FlashPackUNet2DConditionModel) -> Any:
    torch.manual_seed(0)
    return cls(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=4,
    ).eval()


def make_vae(cls: type = FlashPackAutoencoderKL) -> Any:
    torch.manual_seed(1)
    return cls(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=4,
    ).eval()


def make_flux(cls: type = FlashPackFlux) -> Any:
    torch.manual_seed(2)
    return cls(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ).eval()


def make_text_encoder(cls: type = FlashPackCLIPTextModel) -> Any:
    torch.manual_seed(3)
    return cls(
        CLIPTextConfig(
            vocab_size=5,
            hidden_size=16,
            intermediate_size=32,
            num_attention_heads=2,
            num_hidden_layers=1,
            max_position_embeddings=8,
            bos_token_id=3,
            eos_token_id=4,
            pad_token_id=4,
        )
    ).eval()


def make_tokenizer(directory: Path) -> CLIPTokenizer:
    directory.mkdir()
    vocabulary = ("a", "b</w>", "ab</w>", "<|startoftext|>", "<|endoftext|>")
    (directory / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    (directory / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    return CLIPTokenizer.from_pretrained(directory, model_max_length=8)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "files")


def make_pipeline(tokenizer: CLIPTokenizer, cls: type = FlashPackSD, **components: Any) -> Any:
    components = {"unet": make_unet, "vae": make_vae, "text_encoder": make_text_encoder} | components
    return cls(
        **{name: make() for name, make in components.items()},
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def plain_unet() -> Any:
    return make_unet(UNet2DConditionModel)


def plain_vae() -> Any:
    return make_vae(AutoencoderKL)


def plain_text_encoder() -> Any:
    return make_text_encoder(CLIPTextModel)


def make_plain_pipeline(tokenizer: CLIPTokenizer) -> Any:
    return make_pipeline(
        tokenizer, StableDiffusionPipeline, unet=plain_unet, vae=plain_vae, text_encoder=plain_text_encoder
    )


@pytest.fixture
def saved(tokenizer: CLIPTokenizer, tmp_path: Path) -> Path:
    """A pipeline of which all models are in flashpack files."""
    make_pipeline(tokenizer).save_pretrained_flashpack(tmp_path / "saved")
    return tmp_path / "saved"


def image(pipeline: Any) -> np.ndarray[Any, Any]:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline("ab", num_inference_steps=2, generator=generator, output_type="np", height=16, width=16).images


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def make_cache(directory: Path, cache: Path, repo_id: str) -> None:
    """What huggingface_hub leaves of a repository after it was downloaded."""
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / commit).symlink_to(directory, target_is_directory=True)


class Recorder:
    """Stands in for huggingface_hub.HfApi and notes what it is told."""

    calls: list[tuple[str, dict[str, Any]]]

    def __init__(self, **options: Any) -> None:
        self.calls.append(("HfApi", options))

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))

        class Answer:
            pass

        answer = Answer()
        answer.repo_id = f"somebody/{repo_id}"  # type: ignore[attr-defined]
        return answer

    def upload_folder(self, *, folder_path: str, **options: Any) -> None:
        files = sorted(str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file())
        self.calls.append(("upload_folder", {"files": files, **options}))


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    calls: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(Recorder, "calls", calls, raising=False)
    monkeypatch.setattr("huggingface_hub.HfApi", Recorder)
    return calls


def test_a_unet_returns_in_eval_mode_with_bit_equal_outputs(tmp_path):
    unet = make_unet()
    unet.save_pretrained_flashpack(tmp_path / "new" / "unet")
    loaded = FlashPackUNet2DConditionModel.from_pretrained_flashpack(tmp_path / "new" / "unet")
    assert_bit_equal(loaded.state_dict(), unet.state_dict())
    assert not loaded.training
    assert loaded.config.sample_size == 8
    inputs = (torch.randn(1, 4, 8, 8), 1, torch.randn(1, 3, 16))
    assert torch.equal(loaded(*inputs).sample, unet(*inputs).sample)


def test_a_flux_transformer_returns_with_bit_equal_outputs(tmp_path):
    flux = make_flux()
    flux.save_pretrained_flashpack(tmp_path)
    loaded = FlashPackFlux.from_pretrained_flashpack(str(tmp_path))
    inputs = {
        "hidden_states": torch.randn(1, 4, 4),
        "encoder_hidden_states": torch.randn(1, 3, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.rand(4, 3),
        "txt_ids": torch.zeros(3, 3),
    }
    assert torch.equal(loaded(**inputs).sample, flux(**inputs).sample)


def test_a_vae_returns_with_bit_equal_outputs(tmp_path):
    vae = make_vae()
    vae.save_pretrained_flashpack(tmp_path)
    loaded = FlashPackAutoencoderKL.from_pretrained_flashpack(tmp_path)
    assert torch.equal(loaded(torch.ones(1, 3, 16, 16)).sample, vae(torch.ones(1, 3, 16, 16)).sample)


def test_a_model_that_was_cast_returns_in_its_dtype_buffers_and_all(tmp_path):
    torch.manual_seed(4)
    model = FlashPackSD3(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
    )
    model = model.to(torch.bfloat16).eval()
    model.save_pretrained_flashpack(tmp_path)
    loaded = FlashPackSD3.from_pretrained_flashpack(tmp_path)
    assert_bit_equal(loaded.state_dict(), model.state_dict())
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.bfloat16}


def test_buffers_that_no_file_has_keep_their_values_and_get_the_dtype_of_the_model(tmp_path):
    model = FlashPackCounting().to(torch.bfloat16)
    model.save_pretrained_flashpack(tmp_path)
    loaded = FlashPackCounting.from_pretrained_flashpack(tmp_path)
    assert loaded.scale.tolist() == [1.0] * 4
    assert loaded.scale.dtype is torch.bfloat16
    assert torch.get_default_dtype() is torch.float32


def test_a_target_dtype_casts_numbers_and_leaves_counters(tmp_path):
    model = FlashPackCounting()
    model.norm.num_batches_tracked += 1_000_001
    model.save_pretrained_flashpack(tmp_path, target_dtype=torch.bfloat16)
    loaded = FlashPackCounting.from_pretrained_flashpack(tmp_path)
    assert loaded.norm.num_batches_tracked.item() == 1_000_001
    assert loaded.norm.running_mean.dtype is torch.bfloat16
    assert torch.equal(loaded.rough.weight, model.rough.weight.bfloat16())


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
def test_a_dtype_that_is_asked_for_is_given_but_for_what_must_stay_exact(tmp_path, argument):
    model = FlashPackCounting()
    model.save_pretrained_flashpack(tmp_path)
    loaded = FlashPackCounting.from_pretrained_flashpack(tmp_path, **{argument: torch.float16})
    assert torch.equal(loaded.rough.weight, model.rough.weight.half())
    assert torch.equal(loaded.exact.weight, model.exact.weight)
    assert loaded.table.dtype is loaded.scale.dtype is torch.float16
    assert loaded.norm.num_batches_tracked.dtype is torch.int64


def test_parameters_take_no_memory_while_a_model_is_built(tmp_path, monkeypatch):
    make_unet().save_pretrained_flashpack(tmp_path)
    seen = []
    original = UNet2DConditionModel.from_config.__func__

    def from_config(cls: Any, *args: Any, **kwargs: Any) -> Any:
        model = original(cls, *args, **kwargs)
        seen.extend(parameter.is_meta for parameter in model.parameters())
        return model

    monkeypatch.setattr(FlashPackUNet2DConditionModel, "from_config", classmethod(from_config))
    FlashPackUNet2DConditionModel.from_pretrained_flashpack(tmp_path)
    assert seen
    assert all(seen)


def test_other_ranks_write_nothing(tmp_path, tokenizer, uploads):
    make_unet().save_pretrained_flashpack(tmp_path / "unet", is_main_process=False, push_to_hub=True)
    make_pipeline(tokenizer).save_pretrained_flashpack(tmp_path / "all", is_main_process=False, push_to_hub=True)
    assert list(tmp_path.iterdir()) == []
    assert uploads == []


def test_a_save_directory_that_is_a_file_is_an_error_and_the_file_stays(tmp_path, tokenizer):
    (tmp_path / "file").write_text("precious")
    for thing in (make_unet(), make_pipeline(tokenizer)):
        with pytest.raises(flashpack.FlashPackError, match="file is not a directory"):
            thing.save_pretrained_flashpack(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"


def test_saving_over_a_model_keeps_the_old_file_when_it_fails(tmp_path):
    make_unet().save_pretrained_flashpack(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    broken = make_unet().to("meta")
    with pytest.raises(flashpack.FlashPackError, match="meta device"):
        broken.save_pretrained_flashpack(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_quantized_model_is_refused(tmp_path):
    unet = make_unet()
    unet.hf_quantizer = object()
    with pytest.raises(flashpack.FlashPackError, match="quantized"):
        unet.save_pretrained_flashpack(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Flashpack file .*model\.flashpack not found") as caught:
        FlashPackUNet2DConditionModel.from_pretrained_flashpack(tmp_path)
    assert caught.value.filename == str(tmp_path / MODEL)
    with pytest.raises(FileNotFoundError, match=r"Flashpack file .*absent/model\.flashpack not found"):
        FlashPackUNet2DConditionModel.from_pretrained_flashpack(tmp_path, subfolder="absent")
    make_unet().save_pretrained_flashpack(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(OSError, match=r"config\.json"):
        FlashPackUNet2DConditionModel.from_pretrained_flashpack(tmp_path)


def test_a_directory_that_does_not_exist_is_an_error(tmp_path):
    for cls in (FlashPackUNet2DConditionModel, FlashPackSD, AutoFlashPackModel):
        with pytest.raises(flashpack.FlashPackError, match="neither a directory nor the name of a repository"):
            cls.from_pretrained_flashpack(tmp_path / "absent" / "absent")


def test_a_model_is_found_in_a_subfolder(saved):
    loaded = FlashPackUNet2DConditionModel.from_pretrained_flashpack(saved, subfolder="unet")
    assert_bit_equal(loaded.state_dict(), make_unet().state_dict())


def test_keywords_override_the_config_and_others_are_logged(tmp_path, caplog):
    make_unet().save_pretrained_flashpack(tmp_path, nonsense=1)
    assert "save_flashpack does not take nonsense" in caplog.text
    loaded = FlashPackUNet2DConditionModel.from_pretrained_flashpack(tmp_path, sample_size=32, rubbish=1)
    assert loaded.config.sample_size == 32
    assert "does not take rubbish" in caplog.text
    config = FlashPackUNet2DConditionModel.load_config(tmp_path) | {"sample_size": 64}
    assert FlashPackUNet2DConditionModel.from_pretrained_flashpack(tmp_path, config=config).config.sample_size == 64


def test_class_attributes_name_what_to_ignore_and_an_argument_overrides_them(tmp_path):
    class Partial(FlashPackCounting):
        flashpack_ignore_prefixes = ["table"]  # noqa: RUF012

    model = FlashPackCounting()
    model.table.fill_(7)
    model.save_pretrained_flashpack(tmp_path)
    assert Partial.from_pretrained_flashpack(tmp_path).table.tolist() == [0, 1, 2, 3]
    assert Partial.from_pretrained_flashpack(tmp_path, ignore_prefixes=[]).table.tolist() == [7] * 4


def test_an_init_method_of_the_class_builds_the_model(tmp_path):
    class Built(FlashPackCounting):
        flashpack_init_method = "built"

        @classmethod
        def built(cls, config: dict[str, Any], **kwargs: Any) -> Any:
            model = cls.from_config(config, **kwargs)
            model.how = "built"
            return model

    FlashPackCounting().save_pretrained_flashpack(tmp_path)
    assert Built.from_pretrained_flashpack(tmp_path).how == "built"


def test_strict_flags_reach_the_load(tmp_path):
    class FlashPackMore(FlashPackCounting):
        @register_to_config
        def __init__(self, width: int = 4) -> None:
            super().__init__(width)
            self.register_buffer("more", torch.zeros(1))

    FlashPackCounting().save_pretrained_flashpack(tmp_path)
    assert FlashPackMore.from_pretrained_flashpack(tmp_path).more.tolist() == [0]
    with pytest.raises(ValueError, match="Missing 1 buffers"):
        FlashPackMore.from_pretrained_flashpack(tmp_path, strict_buffers=True)


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, {"": torch.device("cpu")}, "auto", "balanced"])
def test_a_device_map_of_one_device_is_a_device(tmp_path, device_map, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    FlashPackCounting().save_pretrained_flashpack(tmp_path)
    assert FlashPackCounting.from_pretrained_flashpack(tmp_path, device_map=device_map).device.type == "cpu"


def test_a_device_map_of_several_devices_is_an_error(tmp_path):
    FlashPackCounting().save_pretrained_flashpack(tmp_path)
    with pytest.raises(flashpack.FlashPackError, match="device_map must name one device"):
        FlashPackCounting.from_pretrained_flashpack(tmp_path, device_map={"norm": "cpu", "exact": "cpu"})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_everything_of_a_model_is_on_the_gpu(tmp_path, saved):
    FlashPackCounting().save_pretrained_flashpack(tmp_path / "model")
    loaded = FlashPackCounting.from_pretrained_flashpack(tmp_path / "model", device="cuda")
    assert {tensor.device.type for tensor in (*loaded.parameters(), *loaded.buffers())} == {"cuda"}
    pipeline = FlashPackSD.from_pretrained_flashpack(saved, device="cuda")
    assert {pipeline.unet.device.type, pipeline.vae.device.type, pipeline.text_encoder.device.type} == {"cuda"}


def test_a_loaded_model_says_where_it_came_from(tmp_path):
    make_unet().save_pretrained_flashpack(tmp_path)
    loaded = FlashPackUNet2DConditionModel.from_pretrained_flashpack(tmp_path)
    assert loaded.config._name_or_path == str(tmp_path)


def test_files_name_the_class_that_loads_without_flashpack(tmp_path):
    make_unet().save_pretrained_flashpack(tmp_path / "ours")
    assert read_json(tmp_path / "ours" / "config.json")["_class_name"] == "UNet2DConditionModel"
    make_unet().save_pretrained(tmp_path / "theirs")
    assert read_json(tmp_path / "theirs" / "config.json")["_class_name"] == "UNet2DConditionModel"
    assert type(diffusers.AutoModel.from_pretrained(str(tmp_path / "theirs"))) is UNet2DConditionModel


def test_a_class_of_ones_own_keeps_its_name(tmp_path):
    class Mine(FlashPackDiffusersModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

    class FlashPackMine(FlashPackDiffusersModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

    for cls in (Mine, FlashPackMine):
        cls().save_pretrained_flashpack(tmp_path)
        assert read_json(tmp_path / "config.json")["_class_name"] == cls.__name__
        assert cls.from_pretrained_flashpack(tmp_path).weight.tolist() == [1]


def test_configs_with_the_class_names_of_flashpack_0_4_5_load(tmp_path):
    make_unet().save_pretrained_flashpack(tmp_path)
    config = read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "FlashPackUNet2DConditionModel"}))
    loaded = FlashPackUNet2DConditionModel.from_pretrained_flashpack(tmp_path)
    assert loaded.config.sample_size == 8
    assert isinstance(AutoFlashPackModel.from_pretrained_flashpack(tmp_path), UNet2DConditionModel)


def test_a_pipeline_returns_with_bit_equal_images(saved, tokenizer):
    for component in ("unet", "vae", "text_encoder"):
        assert (saved / component / MODEL).is_file()
        assert not list((saved / component).glob("*.safetensors"))
    loaded = FlashPackSD.from_pretrained_flashpack(saved)
    assert np.array_equal(image(loaded), image(make_pipeline(tokenizer)))
    assert loaded.safety_checker is None
    assert not any(model.training for model in (loaded.unet, loaded.vae, loaded.text_encoder))
    assert loaded.config._name_or_path == str(saved)


def test_a_loaded_pipeline_can_be_saved_again(saved, tmp_path):
    loaded = FlashPackSD.from_pretrained_flashpack(saved)
    loaded.save_pretrained_flashpack(tmp_path / "again")
    for component in ("unet", "vae", "text_encoder"):
        assert (tmp_path / "again" / component / MODEL).read_bytes() == (saved / component / MODEL).read_bytes()


def test_the_index_of_a_pipeline_names_classes_that_load_without_flashpack(saved):
    index = read_json(saved / "model_index.json")
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    assert index["text_encoder"] == ["transformers", "CLIPTextModel"]
    assert "FlashPack" not in (saved / "model_index.json").read_text()


def test_models_without_the_mixin_are_saved_by_their_own_method(tokenizer, tmp_path):
    pipeline = make_pipeline(tokenizer, vae=plain_vae, text_encoder=plain_text_encoder)
    pipeline.save_pretrained_flashpack(tmp_path, variant="fp32")
    assert (tmp_path / "unet" / MODEL).is_file()
    assert (tmp_path / "vae" / "diffusion_pytorch_model.fp32.safetensors").is_file()
    assert (tmp_path / "text_encoder" / "model.fp32.safetensors").is_file()
    loaded = FlashPackSD.from_pretrained_flashpack(tmp_path, variant="fp32")
    assert type(loaded.vae) is AutoencoderKL
    assert np.array_equal(image(loaded), image(pipeline))


def test_a_constructor_says_which_components_are_to_have_the_mixin(tokenizer, tmp_path):
    plain = make_plain_pipeline(tokenizer)
    plain.save_pretrained(tmp_path / "plain")
    pipeline = AnnotatedSD.from_pretrained(tmp_path / "plain")
    assert type(pipeline.unet) is FlashPackUNet2DConditionModel
    pipeline.save_pretrained_flashpack(tmp_path / "flash", push_to_hub=False)
    assert (tmp_path / "flash" / "unet" / MODEL).is_file()
    assert (tmp_path / "flash" / "text_encoder" / "model.safetensors").is_file()
    loaded = AnnotatedSD.from_pretrained_flashpack(tmp_path / "flash")
    assert type(loaded.vae) is FlashPackAutoencoderKL
    assert np.array_equal(image(loaded), image(plain))


def test_components_that_are_passed_are_not_loaded(saved):
    unet = make_unet()
    (saved / "unet" / MODEL).write_bytes(b"damaged")
    loaded = FlashPackSD.from_pretrained_flashpack(saved, unet=unet, tokenizer=None)
    assert loaded.unet is unet
    assert loaded.tokenizer is None


def test_the_base_class_finds_the_class_of_the_pipeline(saved):
    loaded = FlashPackDiffusionPipeline.from_pretrained_flashpack(saved)
    assert isinstance(loaded, StableDiffusionPipeline)
    assert type(loaded).__name__ == "FlashPackStableDiffusionPipeline"
    (saved / "model_index.json").write_text(json.dumps(read_json(saved / "model_index.json") | {"_class_name": "No"}))
    with pytest.raises(flashpack.FlashPackError, match="no pipeline No"):
        FlashPackDiffusionPipeline.from_pretrained_flashpack(saved)


def test_a_target_dtype_may_differ_between_components(tokenizer, tmp_path):
    pipeline = make_pipeline(tokenizer)
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


def test_a_dtype_of_the_load_may_differ_between_components(saved):
    dtypes = {"unet": torch.float64, "default": torch.bfloat16}
    loaded = FlashPackSD.from_pretrained_flashpack(saved, torch_dtype=dtypes)
    assert (loaded.unet.dtype, loaded.vae.dtype, loaded.text_encoder.dtype) == (
        torch.float64,
        torch.bfloat16,
        torch.bfloat16,
    )
    assert FlashPackSD.from_pretrained_flashpack(saved, torch_dtype=torch.float16).unet.dtype is torch.float16


def test_an_error_says_which_component_it_was(saved):
    (saved / "vae" / MODEL).write_bytes(b"damaged")
    with pytest.raises(RuntimeError, match="Error loading vae from diffusers AutoencoderKL") as caught:
        FlashPackSD.from_pretrained_flashpack(saved)
    assert isinstance(caught.value.__cause__, flashpack.FlashPackError)


def test_a_model_without_any_weights_is_an_error_that_names_the_flashpack_file(saved):
    (saved / "unet" / MODEL).unlink()
    with pytest.raises(RuntimeError, match="Error loading unet from diffusers UNet2DConditionModel") as caught:
        FlashPackSD.from_pretrained_flashpack(saved)
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    assert "Flashpack file" in str(caught.value.__cause__)


def test_ignored_names_and_strict_flags_reach_every_component(saved):
    with pytest.warns(UserWarning, match=r"meta device.*conv_in\.bias"):
        loaded = FlashPackSD.from_pretrained_flashpack(saved, ignore_suffixes=["conv_in.bias"])
    assert loaded.unet.conv_in.bias.is_meta
    loaded = FlashPackSD.from_pretrained_flashpack(saved, keep_flash_ref_on_model=True)
    assert loaded.unet._flash_shared_storage_meta["index"]


def test_pipelines_with_the_class_names_of_flashpack_0_4_5_load(saved, tokenizer):
    index = read_json(saved / "model_index.json") | {
        "_class_name": "FlashPackStableDiffusionPipeline",
        "unet": ["flashpack.integrations.diffusers.auto_model", "FlashPackUNet2DConditionModel"],
        "vae": ["diffusers", "FlashPackAutoencoderKL"],
        "text_encoder": ["flashpack.integrations.transformers.patch", "FlashPackCLIPTextModel"],
    }
    (saved / "model_index.json").write_text(json.dumps(index))
    assert np.array_equal(image(FlashPackSD.from_pretrained_flashpack(saved)), image(make_pipeline(tokenizer)))
    loaded = FlashPackDiffusionPipeline.from_pretrained_flashpack(saved)
    assert loaded.config._name_or_path == str(saved)
    loaded.save_pretrained_flashpack(saved)
    assert "FlashPack" not in (saved / "model_index.json").read_text()


def test_a_file_cannot_make_a_module_be_imported(saved, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "payload_module.py").write_text("raise SystemExit('imported')")
    index = read_json(saved / "model_index.json") | {"unet": ["payload_module", "UNet2DConditionModel"]}
    (saved / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(RuntimeError, match="Error loading unet from payload_module UNet2DConditionModel"):
        FlashPackSD.from_pretrained_flashpack(saved)


def test_a_compiled_model_is_saved_as_what_it_was(tokenizer, tmp_path):
    pipeline = make_pipeline(tokenizer)
    pipeline.unet = torch.compile(pipeline.unet)
    pipeline.save_pretrained_flashpack(tmp_path)
    assert (tmp_path / "unet" / MODEL).is_file()
    assert read_json(tmp_path / "model_index.json")["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert_bit_equal(FlashPackSD.from_pretrained_flashpack(tmp_path).unet.state_dict(), make_unet().state_dict())


def test_a_model_is_loaded_from_the_cache_of_the_hub(saved, tmp_path):
    make_cache(saved, tmp_path / "cache", "somebody/model")
    options = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    loaded = FlashPackUNet2DConditionModel.from_pretrained_flashpack("somebody/model", subfolder="unet", **options)
    assert loaded.config._name_or_path == "somebody/model"
    auto = AutoFlashPackModel.from_pretrained_flashpack("somebody/model", subfolder="vae", **options)
    assert isinstance(auto, AutoencoderKL)


def test_a_pipeline_is_loaded_from_the_cache_of_the_hub(saved, tokenizer, tmp_path):
    make_cache(saved, tmp_path / "cache", "somebody/pipeline")
    loaded = FlashPackSD.from_pretrained_flashpack(
        "somebody/pipeline", cache_dir=tmp_path / "cache", local_files_only=True, proxies=None
    )
    assert np.array_equal(image(loaded), image(make_pipeline(tokenizer)))
    assert loaded.config._name_or_path == "somebody/pipeline"


def test_only_what_is_needed_is_downloaded(tokenizer, tmp_path, monkeypatch):
    pipeline = make_pipeline(tokenizer, text_encoder=plain_text_encoder)
    commit = tmp_path / "snapshots" / "c0ffee"
    pipeline.save_pretrained_flashpack(commit)
    asked = []

    def snapshot_download(repo_id: str, *, revision: Any, allow_patterns: list[str], **options: Any) -> str:
        asked.append((repo_id, revision, allow_patterns))
        return str(commit)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    FlashPackSD.from_pretrained_flashpack("somebody/pipeline", revision="branch")
    first, second = asked
    assert first[:2] == ("somebody/pipeline", "branch")
    assert not any("safetensors" in pattern or pattern.endswith("/*") for pattern in first[2])
    assert second == ("somebody/pipeline", "c0ffee", ["scheduler/*", "text_encoder/*", "tokenizer/*"])


def test_an_upload_has_all_files_and_the_arguments(tmp_path, tokenizer, uploads):
    make_pipeline(tokenizer).save_pretrained_flashpack(
        tmp_path / "name", push_to_hub=True, token="secret", private=True, create_pr=True, commit_message="why"
    )
    (_, made), (_, created), (_, uploaded) = uploads
    assert made["token"] == "secret"
    assert created == {"repo_id": "name", "private": True, "exist_ok": True}
    assert uploaded["repo_id"] == "somebody/name"
    assert (uploaded["create_pr"], uploaded["commit_message"]) == (True, "why")
    assert {"model_index.json", "unet/config.json", f"unet/{MODEL}", "tokenizer/tokenizer_config.json"} <= {
        *uploaded["files"]
    }


def test_the_upload_of_a_model_goes_to_the_repository_that_is_named(tmp_path, uploads):
    make_unet().save_pretrained_flashpack(str(tmp_path), push_to_hub=True, repo_id="other")
    assert uploads[1][1]["repo_id"] == "other"
    assert uploads[2][1]["files"] == ["config.json", MODEL]


def test_the_auto_class_finds_the_class_of_a_directory(saved):
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


def test_models_of_the_classes_that_are_made_can_be_pickled_and_copied(saved):
    loaded = AutoFlashPackModel.from_pretrained_flashpack(saved, subfolder="unet")
    for copied in (pickle.loads(pickle.dumps(loaded)), copy.deepcopy(loaded)):
        assert type(copied) is type(loaded)
        assert_bit_equal(copied.state_dict(), loaded.state_dict())


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> None:
    """patch_diffusers_auto_model(), undone after the test."""
    from flashpack.integrations.diffusers import patch_diffusers_auto_model

    for cls in (diffusers.AutoModel, diffusers.DiffusionPipeline):
        monkeypatch.setattr(cls, "from_pretrained", cls.__dict__["from_pretrained"])
    monkeypatch.setattr(diffusers.AutoModel, "from_pretrained_flashpack", None, raising=False)
    monkeypatch.delattr(diffusers.AutoModel, "from_pretrained_flashpack")
    patch_diffusers_auto_model()
    before = diffusers.AutoModel.__dict__["from_pretrained"]
    patch_diffusers_auto_model()
    assert diffusers.AutoModel.__dict__["from_pretrained"] is before


@pytest.mark.usefixtures("patched")
def test_a_patched_diffusers_loads_flashpack_files_and_makes_models_that_write_them(tmp_path, saved):
    from diffusers.models import AutoModel

    make_vae(AutoencoderKL).save_pretrained(tmp_path / "plain")
    model = AutoModel.from_pretrained(str(tmp_path / "plain"))
    assert isinstance(model, FlashPackDiffusersModelMixin)
    assert not model.training
    model.save_pretrained_flashpack(tmp_path / "flash")
    for loaded in (
        AutoModel.from_pretrained_flashpack(tmp_path / "flash"),
        AutoModel.from_pretrained(tmp_path / "flash", use_flashpack=True),
        AutoModel.from_pretrained(saved, subfolder="vae", use_flashpack=True, torch_dtype=torch.float32),
    ):
        assert isinstance(loaded, AutoencoderKL)
        assert not loaded.training
        assert_bit_equal(loaded.state_dict(), model.state_dict())


@pytest.mark.usefixtures("patched")
def test_pipelines_of_a_patched_diffusers_have_models_that_write_flashpack_files(tokenizer, tmp_path):
    make_plain_pipeline(tokenizer).save_pretrained(tmp_path / "plain")
    pipeline = FlashPackSD.from_pretrained(tmp_path / "plain")
    pipeline.save_pretrained_flashpack(tmp_path / "flash")
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
def test_the_native_flashpack_of_diffusers_and_ours_read_each_other(tmp_path):
    unet = make_unet()
    unet.save_pretrained(tmp_path / "theirs", use_flashpack=True)
    loaded = FlashPackUNet2DConditionModel.from_pretrained_flashpack(tmp_path / "theirs")
    assert_bit_equal(loaded.state_dict(), unet.state_dict())
    unet.save_pretrained_flashpack(tmp_path / "ours")
    native = UNet2DConditionModel.from_pretrained(tmp_path / "ours", use_flashpack=True)
    assert_bit_equal(native.state_dict(), unet.state_dict())


@native
def test_the_native_flashpack_of_diffusers_saves_and_loads_a_pipeline(tokenizer, tmp_path):
    pipeline = make_plain_pipeline(tokenizer)
    pipeline.save_pretrained(tmp_path, use_flashpack=True)
    assert (tmp_path / "unet" / MODEL).is_file()
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path, use_flashpack=True)
    assert np.array_equal(image(loaded), image(pipeline))


@native
def test_what_our_pipelines_save_loads_with_the_native_flashpack_of_diffusers(tokenizer, tmp_path):
    pipeline = make_pipeline(tokenizer, text_encoder=plain_text_encoder)
    pipeline.save_pretrained_flashpack(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path, use_flashpack=True)
    assert type(loaded) is StableDiffusionPipeline
    assert np.array_equal(image(loaded), image(pipeline))
