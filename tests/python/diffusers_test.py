from __future__ import annotations

import json
import re
from typing import Any, ClassVar

import flashpack
import pytest
import torch
from support import assert_bit_equal

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from diffusers import ConfigMixin, UNet2DConditionModel  # noqa: E402
from diffusers.configuration_utils import register_to_config  # noqa: E402
from diffusers_models import (  # noqa: E402
    MODEL,
    FlashPackAutoencoderKL,
    FlashPackCounting,
    FlashPackFlux,
    FlashPackSD,
    FlashPackSD3,
    FlashPackUNet2DConditionModel,
    make_flux,
    make_pipeline,
    make_unet,
    make_vae,
    read_json,
    save_pipeline,
)
from flashpack.integrations.diffusers import AutoFlashPackModel, FlashPackDiffusersModelMixin  # noqa: E402


def test_a_unet_returns_in_eval_mode_with_bit_equal_outputs(tmp_path):
    unet = make_unet()
    unet.save_pretrained_flashpack(tmp_path / "new" / "unet")
    loaded = FlashPackUNet2DConditionModel.from_pretrained_flashpack(tmp_path / "new" / "unet")
    assert_bit_equal(loaded.state_dict(), unet.state_dict())
    assert not loaded.training
    assert loaded.config.sample_size == 8
    inputs = (torch.randn(1, 4, 8, 8), 1, torch.randn(1, 3, 16))
    assert torch.equal(loaded(*inputs).sample, unet(*inputs).sample)


def test_a_file_that_is_replaced_while_it_is_loaded_is_loaded_to_its_end(tmp_path, after_the_footer):
    unet, path, other = make_unet(), tmp_path / "unet", tmp_path / "other"
    unet.save_pretrained_flashpack(path)
    make_unet().apply(lambda module: [p.data.zero_() for p in module.parameters()]).save_pretrained_flashpack(other)
    after_the_footer(lambda: (other / MODEL).replace(path / MODEL))
    assert_bit_equal(FlashPackUNet2DConditionModel.from_pretrained_flashpack(path).state_dict(), unet.state_dict())


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


@pytest.mark.parametrize("ignored", [[], ["encoder.mid_block.attentions.0.key.bias"]], ids=["all of it", "a part"])
def test_older_names_of_attention_are_those_that_the_model_has_today(ignored, tmp_path):
    vae = make_vae()
    vae.save_pretrained_flashpack(tmp_path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = vae.state_dict()
    for name in [name for name in state if ".attentions.0.to_" in name]:
        *lead, now, kind = re.split(r"\.(to_q|to_k|to_v|to_out\.0)\.", name)
        state[f"{lead[0]}.{old[now]}.{kind}"] = state.pop(name).to(torch.float64)
    assert len(state.keys() - vae.state_dict().keys()) == 16
    flashpack.pack_to_file(state, tmp_path / MODEL)
    loaded = FlashPackAutoencoderKL.from_pretrained_flashpack(tmp_path, ignore_names=ignored, strict=not ignored)
    left_out = {name.replace(".key.", ".to_k.") for name in ignored}
    for name, tensor in vae.state_dict().items():
        assert loaded.state_dict()[name].is_meta == (name in left_out)
        if name not in left_out:
            assert loaded.state_dict()[name].dtype is (torch.float64 if ".attentions.0.to_" in name else torch.float32)
            assert loaded.state_dict()[name].equal(tensor), name


def test_tensors_that_a_class_passes_over_are_no_error_in_its_files(tmp_path):
    class FlashPackForgiving(FlashPackAutoencoderKL):
        _keys_to_ignore_on_load_unexpected: ClassVar = ["norm_added", "conv_in"]

    vae = make_vae()
    vae.save_pretrained_flashpack(tmp_path)
    flashpack.pack_to_file(vae.state_dict() | {"encoder.norm_added_q": torch.ones(2)}, tmp_path / MODEL)
    loaded = FlashPackForgiving.from_pretrained_flashpack(tmp_path, strict=True)
    assert_bit_equal(loaded.state_dict(), vae.state_dict())
    with pytest.raises(flashpack.FlashPackError, match="norm_added_q"):
        FlashPackAutoencoderKL.from_pretrained_flashpack(tmp_path)


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


def test_a_save_directory_that_is_a_file_is_an_error_and_the_file_stays(tmp_path):
    (tmp_path / "file").write_text("precious")
    for thing in (make_unet(), make_pipeline()):
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


def test_a_model_is_found_in_a_subfolder(tmp_path):
    saved = save_pipeline(tmp_path / "saved")
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


@pytest.mark.parametrize(
    "device_map", ["cpu", {"": "cpu"}, {"norm": torch.device("cpu"), "": "cpu"}, "auto", "balanced"]
)
def test_a_device_map_of_one_device_is_a_device(tmp_path, device_map, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    FlashPackCounting().save_pretrained_flashpack(tmp_path)
    assert FlashPackCounting.from_pretrained_flashpack(tmp_path, device_map=device_map).device.type == "cpu"


def test_a_model_that_is_split_over_gpus_is_loaded_and_left_to_accelerate(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr("accelerate.dispatch_model", lambda model, **options: given.append(options) or model)
    FlashPackCounting().save_pretrained_flashpack(tmp_path)
    device_map = {"norm": 0, "": 1}
    assert FlashPackCounting.from_pretrained_flashpack(tmp_path, device_map=device_map).device.type == "cpu"
    assert [options["device_map"] for options in given] == [device_map]
    with pytest.raises(flashpack.FlashPackError, match="must be of one kind"):
        FlashPackCounting.from_pretrained_flashpack(tmp_path, device_map={"norm": 0, "": "cpu"})
    with pytest.raises(flashpack.FlashPackError, match="a pipeline goes to one device"):
        FlashPackSD.from_pretrained_flashpack(tmp_path, device_map={"unet": 0, "vae": 1})


@pytest.mark.gpu
def test_everything_of_a_model_is_on_the_gpu(tmp_path):
    saved = save_pipeline(tmp_path / "saved")
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
