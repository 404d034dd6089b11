from __future__ import annotations

import json
import os
import shutil

import flashpack
import pytest
import safetensors.torch
import torch
from checkpoints import STATE, halves, names_in, save_index
from flashpack import FlashPackError, commands
from support import assert_bit_equal


def write_model(directory, weights, config=None):
    directory.mkdir(parents=True)
    companions = ("config.json", "tokenizer.json", "vocab.txt", "generation_config.json", "model.py", "README.md")
    for name in companions:
        (directory / name).write_text(json.dumps(config or {}) if name == "config.json" else "{}")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tools.jinja").write_text("")
    for name, tensors in weights.items():
        safetensors.torch.save_file(tensors, directory / name)
    copied = [name for name in companions if name != "model.py"]
    return sorted([*copied, "additional_chat_templates/tools.jinja", "model.flashpack"])


def test_a_model_directory_converts_to_one_with_all_but_the_old_weights(tmp_path):
    expected = write_model(tmp_path / "model", {"model.safetensors": STATE})
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"other weights")
    (tmp_path / "model" / "runs").mkdir()
    (tmp_path / "model" / "runs" / "log.txt").write_text("")
    result = commands.convert_to_flashpack(tmp_path / "model", tmp_path / "new" / "out")
    assert result == os.fspath(tmp_path / "new" / "out")
    assert names_in(tmp_path / "new" / "out") == expected
    assert_bit_equal(flashpack.revert_from_file(tmp_path / "new" / "out" / "model.flashpack"), STATE)


def test_code_is_copied_only_when_that_is_asked_for(tmp_path, caplog):
    expected = write_model(tmp_path / "model", {"model.safetensors": STATE})
    commands.convert_to_flashpack(tmp_path / "model", tmp_path / "without")
    assert "model.py" in caplog.text
    commands.convert_to_flashpack(tmp_path / "model", tmp_path / "with", copy_code=True)
    assert names_in(tmp_path / "without") == expected
    assert names_in(tmp_path / "with") == sorted([*expected, "model.py"])


def test_a_directory_is_its_own_default_destination(tmp_path):
    write_model(tmp_path / "model", {"diffusion_pytorch_model.safetensors": STATE})
    before = names_in(tmp_path / "model")
    assert commands.convert_to_flashpack(os.fspath(tmp_path / "model")) == os.fspath(tmp_path / "model")
    assert names_in(tmp_path / "model") == sorted([*before, "model.flashpack"])
    with pytest.raises(FlashPackError, match=r"model\.flashpack exists already.*--force \(in Python: force=True\)"):
        commands.convert_to_flashpack(tmp_path / "model")
    commands.convert_to_flashpack(tmp_path / "model", tmp_path / "model")


def test_shards_and_variants_of_a_directory_are_found(tmp_path):
    plain, variant = halves()
    write_model(tmp_path / "model", {"model.fp16.safetensors": variant})
    first = {"model-00001-of-00001.safetensors": plain}
    save_index(tmp_path / "model" / "model.safetensors.index.json", first)
    for name, expected in ((None, plain), ("fp16", variant)):
        commands.convert_to_flashpack(tmp_path, tmp_path / "out", subfolder="model", variant=name)
        assert_bit_equal(flashpack.revert_from_file(tmp_path / "out" / "model.flashpack"), expected)
        assert "model.safetensors.index.json" not in names_in(tmp_path / "out")
    with pytest.raises(FlashPackError, match="no weights of variant 'bf16'"):
        commands.convert_to_flashpack(tmp_path / "model", tmp_path / "none", variant="bf16")
    (tmp_path / "model" / "model.safetensors.index.json").rename(
        tmp_path / "model" / "model.safetensors.index.fp8.json"
    )
    commands.convert_to_flashpack(tmp_path / "model", tmp_path / "out", variant="fp8")
    assert_bit_equal(flashpack.revert_from_file(tmp_path / "out" / "model.flashpack"), plain)


def test_other_files_of_the_destination_are_replaced_by_force_alone(tmp_path):
    expected = write_model(tmp_path / "model", {"model.safetensors": STATE})
    out = tmp_path / "out"
    commands.convert_to_flashpack(tmp_path / "model", out)
    commands.convert_to_flashpack(tmp_path / "model", out)  # The same files are no loss.
    others = {out / "config.json": "of another model", out / "README.md": "notes", out / "model.flashpack": "weights"}
    for path, text in others.items():
        path.write_text(text)
    (out / "diary.txt").write_text("stays in any case")
    with pytest.raises(
        FlashPackError, match=r"out has other files .*: README\.md, config\.json; .*--force.*force=True"
    ):
        commands.convert_to_flashpack(tmp_path / "model", out)
    assert {path: path.read_text() for path in others} == others
    assert names_in(out) == sorted([*expected, "diary.txt"])
    commands.convert_to_flashpack(tmp_path / "model", out, force=True)
    assert ((out / "config.json").read_text(), (out / "diary.txt").read_text()) == ("{}", "stays in any case")
    assert_bit_equal(flashpack.revert_from_file(out / "model.flashpack"), STATE)


def test_a_cast_is_told_to_the_configuration_so_that_transformers_loads_what_was_asked_for(tmp_path):
    quantised = {"quant_method": "x", "dtype": "float32"}
    config = {"model_type": "llama", "torch_dtype": "float32", "text_config": {"dtype": "torch.float16"}}
    config |= {"vision_config": {"dtype": "auto"}, "quantization_config": quantised, "dtype_name": "float32"}
    config["parts"] = [{"dtype": "float64"}]
    write_model(tmp_path / "model", {"model.safetensors": STATE}, config)
    out = tmp_path / "out"
    for dtype in ("bfloat16", "bfloat16", "float16", None):  # The result of an earlier conversion is no other file.
        commands.convert_to_flashpack(tmp_path / "model", out, dtype=dtype)
        told = {"torch_dtype": dtype, "text_config": {"dtype": dtype}, "parts": [{"dtype": dtype}]}
        assert json.loads((out / "config.json").read_text()) == config | (told if dtype else {})
    for dtype in (None, "float8_e4m3fn"):
        commands.convert_to_flashpack(tmp_path / "model", tmp_path / str(dtype), dtype=dtype)
        assert (tmp_path / str(dtype) / "config.json").read_bytes() == (tmp_path / "model/config.json").read_bytes()
    (tmp_path / "model/config.json").write_text("[" * 5000)
    commands.convert_to_flashpack(tmp_path / "model", tmp_path / "odd", dtype="bfloat16")
    assert (tmp_path / "odd/config.json").read_text() == "[" * 5000


def test_code_in_the_destination_is_looked_at_only_if_code_is_copied(tmp_path):
    write_model(tmp_path / "model", {"model.safetensors": STATE})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.py").write_text("mine")
    commands.convert_to_flashpack(tmp_path / "model", tmp_path / "out")
    with pytest.raises(FlashPackError, match=r"other files .*: model\.py;"):
        commands.convert_to_flashpack(tmp_path / "model", tmp_path / "out", copy_code=True)
    assert (tmp_path / "out" / "model.py").read_text() == "mine"


SINGLE, SHARDS = halves()


@pytest.mark.parametrize("dot", ["", ".fp16"])
@pytest.mark.parametrize(
    ("stem", "expected"), [("model.safetensors", SINGLE), ("diffusion_pytorch_model.safetensors", SHARDS)]
)
def test_of_a_whole_file_and_shards_that_which_the_library_loads_is_converted(stem, expected, dot, tmp_path):
    name, suffix = stem.split(".")
    write_model(tmp_path / "model", {f"{name}{dot}.{suffix}": SINGLE})
    save_index(tmp_path / "model" / f"{stem}.index{dot}.json", {f"{name}{dot}-00001-of-00001.{suffix}": SHARDS})
    commands.convert_to_flashpack(tmp_path / "model", tmp_path / "out", variant=dot[1:] or None)
    assert_bit_equal(flashpack.revert_from_file(tmp_path / "out" / "model.flashpack"), expected)


def test_transformers_and_diffusers_load_of_both_what_is_converted(tmp_path):
    model = small_bert(tmp_path / "bert")
    unet = small_pipeline(tmp_path / "pipeline")
    stems = {tmp_path / "bert": "model", tmp_path / "pipeline" / "unet": "diffusion_pytorch_model"}
    for directory, stem in stems.items():
        tensors = safetensors.torch.load_file(directory / f"{stem}.safetensors")
        shard = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        save_index(directory / f"{stem}.safetensors.index.json", {f"{stem}-00001-of-00001.safetensors": shard})
        commands.convert_to_flashpack(directory, directory.with_name("out"))
        loaded = type(model if stem == "model" else unet).from_pretrained(directory).state_dict()
        converted = flashpack.revert_from_file(directory.with_name("out") / "model.flashpack")
        assert {name: tensor.any() for name, tensor in converted.items()} == {
            name: loaded[name].any() for name in converted
        }


@pytest.mark.parametrize(
    ("config", "expected"),
    [({"_class_name": "UNet2DModel"}, SHARDS), ({"model_type": "bert"}, SINGLE), ({"architectures": []}, SINGLE)],
)
def test_a_directory_with_files_of_two_libraries_is_of_that_which_its_configuration_names(config, expected, tmp_path):
    write_model(tmp_path / "model", {"diffusion_pytorch_model.safetensors": SHARDS})
    torch.save(SINGLE, tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    commands.convert_to_flashpack(tmp_path / "model", tmp_path / "out")
    assert_bit_equal(flashpack.revert_from_file(tmp_path / "out" / "model.flashpack"), expected)


def test_a_variant_that_no_component_has_is_an_error(tmp_path):
    write_pipeline(tmp_path / "source")
    with pytest.raises(FlashPackError, match=r"no weights of variant 'bf16' in .*unet, .*text_encoder"):
        commands.convert_to_flashpack(tmp_path / "source", tmp_path / "out", variant="bf16")
    assert os.listdir(tmp_path) == ["source"]


def test_a_directory_without_weights_or_a_destination_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FlashPackError, match=r"no safetensors or torch weights in .*empty"):
        commands.convert_to_flashpack(tmp_path / "empty", tmp_path / "out")
    write_model(tmp_path / "model", {"anything.safetensors": STATE})
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(NotADirectoryError, match="file"):
        commands.convert_to_flashpack(tmp_path / "model", tmp_path / "file")
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "model"]
    commands.convert_to_flashpack(tmp_path / "model", tmp_path / "out")


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["a.safetensors", "b.safetensors"], "a.safetensors, b.safetensors,"),
        (["lone.pth"], "lone.pth,"),
        (["1.pt", "2.pt", "3.pt", "4.pt"], "1.pt, 2.pt, 3.pt, ...,"),
    ],
)
def test_weights_of_a_directory_that_are_not_taken_are_named_with_those_that_would_be(names, shown, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(FlashPackError) as error:
        commands.convert_to_flashpack(tmp_path, tmp_path / "out")
    assert f"no safetensors or torch weights in {tmp_path} are called" in str(error.value)
    assert f"there are {shown} but model.safetensors," in str(error.value)


def test_weights_in_a_folder_of_their_own_are_named_with_what_converts_them(tmp_path):
    (tmp_path / "0_Transformer").mkdir()
    (tmp_path / "0_Transformer" / "model.safetensors").write_bytes(b"")
    with pytest.raises(FlashPackError, match=r"itself: there are 0_Transformer/model\.safetensors, which can be conv"):
        commands.convert_to_flashpack(tmp_path, tmp_path / "out")


def test_an_adapter_beside_a_model_takes_no_models_place(tmp_path, caplog):
    (tmp_path / "lora").mkdir()
    safetensors.torch.save_file(STATE, tmp_path / "lora" / "adapter_model.safetensors")
    (tmp_path / "out").mkdir()
    safetensors.torch.save_file(STATE, tmp_path / "out" / "model.safetensors")
    commands.convert_to_flashpack(tmp_path / "lora", tmp_path / "out")
    assert not [record for record in caplog.records if "older" in record.getMessage()]


def test_a_directory_converts_to_a_single_file_if_the_destination_is_called_like_one(tmp_path):
    write_model(tmp_path / "model", {"model.safetensors": STATE})
    file = tmp_path / "out.flashpack"
    assert commands.convert_to_flashpack(tmp_path / "model", file) == os.fspath(file)
    assert_bit_equal(flashpack.revert_from_file(file), STATE)
    (tmp_path / "directory.flashpack").mkdir()
    commands.convert_to_flashpack(tmp_path / "model", tmp_path / "directory.flashpack")
    assert (tmp_path / "directory.flashpack" / "config.json").is_file()
    write_pipeline(tmp_path / "pipeline")
    with pytest.raises(FlashPackError, match="a pipeline converts to a directory"):
        commands.convert_to_flashpack(tmp_path / "pipeline", tmp_path / "pipeline.flashpack")
    assert not (tmp_path / "pipeline.flashpack").exists()


def write_pipeline(directory, weights=None):
    """Two models, one with a variant, and a scheduler."""
    plain, other = halves()
    write_model(directory / "unet", {"diffusion_pytorch_model.safetensors": plain})
    write_model(
        directory / "text_encoder",
        weights or {"model.safetensors": other, "model.fp16.safetensors": {"f": plain["bias"]}},
    )
    (directory / "scheduler").mkdir()
    (directory / "scheduler" / "scheduler_config.json").write_text("{}")
    (directory / "unused").mkdir()
    (directory / "unused" / "config.json").write_text("{}")
    index = {
        "_class_name": "SomePipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
        "text_encoder": ["transformers", "BertModel"],
        "safety_checker": [None, None],
        "../outside": ["diffusers", "UNet2DModel"],
        "guidance": 7,
    }
    (directory / "model_index.json").write_text(json.dumps(index))


def test_a_pipeline_converts_to_one_file_for_each_of_its_models(tmp_path):
    write_pipeline(tmp_path / "source")
    write_model(tmp_path / "outside", {"model.safetensors": STATE})
    commands.convert_to_flashpack(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "outside" / "model.flashpack").exists()
    found = names_in(tmp_path / "out")
    assert [name for name in found if name.endswith((".flashpack", "config.json")) and "generation" not in name] == [
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.flashpack",
        "unet/config.json",
        "unet/model.flashpack",
    ]
    assert "model_index.json" in found
    assert not [name for name in found if name.endswith(".safetensors") or name.startswith(("unused", "."))]
    plain, other = halves()
    assert_bit_equal(flashpack.revert_from_file(tmp_path / "out" / "unet" / "model.flashpack"), plain)
    assert_bit_equal(flashpack.revert_from_file(tmp_path / "out" / "text_encoder" / "model.flashpack"), other)

    commands.convert_to_flashpack(tmp_path / "source", tmp_path / "out", variant="fp16")
    assert_bit_equal(flashpack.revert_from_file(tmp_path / "out" / "unet" / "model.flashpack"), plain)
    assert list(flashpack.revert_from_file(tmp_path / "out" / "text_encoder" / "model.flashpack")) == ["f"]


def test_a_pipeline_that_fails_halfway_leaves_nothing_behind(tmp_path):
    write_pipeline(tmp_path / "source", {"model.safetensors": {"f": torch.ones(1)}})
    (tmp_path / "source" / "text_encoder" / "model.safetensors").write_bytes(b"404 not found")
    with pytest.raises(FlashPackError, match="it is a text"):
        commands.convert_to_flashpack(tmp_path / "source", tmp_path / "new" / "out")
    assert os.listdir(tmp_path) == ["source"]
    before = names_in(tmp_path)
    with pytest.raises(FlashPackError, match="it is a text"):
        commands.convert_to_flashpack(tmp_path / "source")
    assert names_in(tmp_path) == before
    (tmp_path / "source" / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(FlashPackError, match=r"no safetensors or torch weights in .*text_encoder"):
        commands.convert_to_flashpack(tmp_path / "source", tmp_path / "out")


class Hub:
    """A cache as huggingface_hub keeps it, of one repository."""

    def __init__(self, cache_dir):
        self.cache_dir = cache_dir
        repository = cache_dir / "models--some--model"
        self.snapshot = repository / "snapshots" / ("0" * 40)
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)

    def convert(self, destination, **kwargs):
        return commands.convert_to_flashpack(
            "some/model", destination, cache_dir=self.cache_dir, local_files_only=True, **kwargs
        )


def test_a_repository_of_the_hub_converts_from_its_cache(tmp_path):
    hub = Hub(tmp_path / "cache")
    expected = write_model(hub.snapshot, {"model.safetensors": STATE})
    assert hub.convert(tmp_path / "out") == os.fspath(tmp_path / "out")
    assert names_in(tmp_path / "out") == expected
    assert_bit_equal(flashpack.revert_from_file(tmp_path / "out" / "model.flashpack"), STATE)
    with pytest.raises(FlashPackError, match="no safetensors or torch weights"):
        hub.convert(tmp_path / "none", subfolder="additional_chat_templates")


def test_of_a_repository_one_set_of_weights_is_downloaded(tmp_path, monkeypatch):
    # Stands in for a repository that has everything, of which each call brings what it asks for.
    whole = {
        "model_index.json",
        *("unet/config.json", "text_encoder/config.json", "tokenizer/vocab.txt", "onnx/model.onnx"),
        *("unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"),
        *("unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin", "text_encoder/flax_model.msgpack"),
        *("text_encoder/pytorch_model.fp16.bin", "all.safetensors"),
    }
    folder = tmp_path / "repository"

    def bring(repo_id, *, allow_patterns, **rest):
        from huggingface_hub.utils import filter_repo_objects

        for name in filter_repo_objects(whole, allow_patterns=allow_patterns):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            listed = {"unet": ["diffusers", "A"], "text_encoder": ["transformers", "B"], "tokenizer": ["t", "C"]}
            path.write_text(json.dumps(listed))
        return folder

    monkeypatch.setattr("huggingface_hub.snapshot_download", bring)
    monkeypatch.setattr(commands, "find_checkpoints", lambda *args: {})
    commands.convert_to_flashpack("some/model", tmp_path / "out")

    def weights():
        return [name for name in names_in(folder) if not name.endswith((".json", ".txt"))]

    plain = ["text_encoder/pytorch_model.bin", "unet/diffusion_pytorch_model.safetensors"]
    assert weights() == plain
    commands.convert_to_flashpack("some/model", tmp_path / "out", variant="fp16")
    # That the others are there already does not stand in for the variant.
    variant = ["text_encoder/pytorch_model.fp16.bin", "unet/diffusion_pytorch_model.fp16.safetensors"]
    assert weights() == sorted(plain + variant)
    shutil.rmtree(folder)
    commands.convert_to_flashpack("some/model", tmp_path / "out", variant="bf16")
    assert weights() == []
    whole.remove("text_encoder/pytorch_model.fp16.bin")
    commands.convert_to_flashpack("some/model", tmp_path / "out", variant="fp16")
    assert weights() == ["text_encoder/pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors"]


def small_bert(directory, heads="BertForSequenceClassification", **config):
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 32, "num_hidden_layers": 1}
    model = getattr(transformers, heads)(transformers.BertConfig(**shape, num_attention_heads=2, **config))
    model.to(torch.float16).save_pretrained(directory)
    return model


def test_transformers_builds_the_model_that_the_directory_is_of(tmp_path):
    model = small_bert(tmp_path / "model", "BertForMaskedLM")
    commands.convert_to_flashpack(tmp_path / "model", tmp_path / "plain")
    plain = flashpack.revert_from_file(tmp_path / "plain" / "model.flashpack")
    assert_bit_equal(plain, safetensors.torch.load_file(tmp_path / "model" / "model.safetensors"))

    destination = os.fspath(tmp_path / "built")
    assert (
        commands.convert_to_flashpack_from_transformers_repo_id_or_dir(tmp_path / "model", destination) == destination
    )
    built = flashpack.revert_from_file(tmp_path / "built" / "model.flashpack")
    assert_bit_equal(built, dict(model.state_dict()))
    # The checkpoint has one of two tied names, the module both.
    assert set(plain) < set(built)
    assert names_in(tmp_path / "built") == ["config.json", "model.flashpack"]


def test_ignored_names_and_dtypes_apply_to_models_that_are_built(tmp_path):
    small_bert(tmp_path / "model")
    commands.convert_to_flashpack(
        tmp_path / "model", tmp_path / "out", "bfloat16", ignore_prefixes=["bert."], use_transformers=True
    )
    built = flashpack.revert_from_file(tmp_path / "out" / "model.flashpack")
    assert {name: tensor.dtype for name, tensor in built.items()} == {
        "classifier.weight": torch.bfloat16,
        "classifier.bias": torch.bfloat16,
    }


def test_tensors_that_a_library_would_make_up_are_not_packed(tmp_path):
    small_bert(tmp_path / "model", "BertModel")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(
        json.dumps({**config, "architectures": ["BertForSequenceClassification"]})
    )
    with pytest.raises(FlashPackError, match=r"lacks 2 tensors.*classifier\.bias.*random"):
        commands.convert_to_flashpack(tmp_path / "model", tmp_path / "out", use_transformers=True)
    assert os.listdir(tmp_path) == ["model"]


def small_pipeline(directory):
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(32,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    diffusers.DDPMPipeline(unet.to(torch.bfloat16), diffusers.DDPMScheduler()).save_pretrained(directory)
    return unet


def test_diffusers_builds_models_and_the_models_of_pipelines(tmp_path):
    unet = small_pipeline(tmp_path / "pipeline")
    destination = os.fspath(tmp_path / "out")
    for source, path in [
        (tmp_path / "pipeline", tmp_path / "out" / "unet" / "model.flashpack"),
        (tmp_path / "pipeline" / "unet", tmp_path / "out" / "model.flashpack"),
    ]:
        assert commands.convert_to_flashpack_from_diffusers_repo_id_or_dir(source, destination) == destination
        assert_bit_equal(flashpack.revert_from_file(path), dict(unet.state_dict()))


def test_a_converted_pipeline_is_loaded_by_diffusers_itself(tmp_path):
    unet = small_pipeline(tmp_path / "pipeline")
    import diffusers

    commands.convert_to_flashpack(tmp_path / "pipeline", tmp_path / "out")
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "out", use_flashpack=True, device_map="cpu")
    assert_bit_equal(dict(pipeline.unet.state_dict()), dict(unet.state_dict()))


def test_modules_of_other_libraries_are_not_imported_for_a_pipeline(tmp_path):
    pytest.importorskip("diffusers")
    write_pipeline(tmp_path / "source")
    index = json.loads((tmp_path / "source" / "model_index.json").read_text())
    (tmp_path / "source" / "model_index.json").write_text(json.dumps({**index, "unet": ["antigravity", "geohash"]}))
    with pytest.raises(FlashPackError, match="geohash of antigravity"):
        commands.convert_to_flashpack(tmp_path / "source", tmp_path / "out", use_diffusers=True)


def test_the_weights_that_a_configuration_of_transformers_names_are_converted(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9, n_positions=4)
    )
    model.save_pretrained(tmp_path)
    names = names_in(tmp_path)
    shutil.copyfile(tmp_path / "model.safetensors", tmp_path / "named.safetensors")
    safetensors.torch.save_file({"other": torch.ones(1)}, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())

    def naming(name):
        (tmp_path / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))
        return tmp_path

    commands.convert_to_flashpack(naming("named.safetensors"))
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).state_dict()
    converted = flashpack.load_file(tmp_path / "model.flashpack")
    assert_bit_equal(converted, {name: loaded[name] for name in converted})
    assert "transformer.wte.weight" in converted
    for name in ("../named.safetensors", ["named.safetensors"], "/etc/passwd", ""):
        with pytest.raises(FlashPackError, match=r"config\.json names .*, which is no file beside it"):
            commands.convert_to_flashpack(naming(name), tmp_path / "out")
    with pytest.raises(FlashPackError, match=r"no safetensors .* are called missing\.safetensors, as its config\.json"):
        commands.convert_to_flashpack(naming("missing.safetensors"), tmp_path / "out")
    assert names_in(tmp_path) == sorted([*names, "named.safetensors", "model.flashpack"])
