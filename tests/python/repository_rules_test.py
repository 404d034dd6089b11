"""The rules of docs/downloaded_repositories.md, one by one."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import flashpack
import pytest
from checkpoints import STATE, halves, save_index
from flashpack import FlashPackError, commands
from flashpack._links import check_inside
from flashpack._parts import OPTIONS, components_of
from flashpack._repository import check_model_config, open_regular
from hub_cache import COMMIT, make_hub_cache
from safetensors.torch import save_file
from support import assert_bit_equal

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from diffusers_models import FlashPackSD, read_json, save_pipeline  # noqa: E402
from flashpack.integrations.diffusers import FlashPackDiffusionPipeline  # noqa: E402
from transformers_models import load, make, save  # noqa: E402


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("pipeline") / "saved")


@pytest.fixture
def saved(pipeline: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pipeline, tmp_path / "saved"))


def edit(path: Path, /, **fields: Any) -> None:
    path.write_text(json.dumps(read_json(path) | fields))


@pytest.mark.parametrize("name", ["../outside", "a/../../outside", "/etc", "..", "a\0", 7, ["1_Pooling"]])
def test_a_module_of_sentence_transformers_is_a_folder_of_the_directory(name, tmp_path):
    for folder in ("model", "outside"):
        (tmp_path / folder).mkdir()
        save_file(STATE, tmp_path / folder / "model.safetensors")
    (tmp_path / "model" / "modules.json").write_text(json.dumps([{"path": ""}, {"path": name}]))
    with pytest.raises(FlashPackError, match=r"modules\.json names .*, which is no folder beside it"):
        commands.convert_to_flashpack(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_of_modules_may_be_written_as_paths_are(tmp_path):
    names = {"./1_Pooling": "1_Pooling", "2_Dense/": "2_Dense", "more/3_Dense": "more/3_Dense", ".": ".", "": "."}
    for folder in names.values():
        (tmp_path / "model" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / folder / "config.json").write_text("{}")
    save_file(STATE, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "modules.json").write_text(json.dumps([{"path": name} for name in names]))
    commands.convert_to_flashpack(tmp_path / "model", tmp_path / "out")
    for folder in names.values():
        assert (tmp_path / "out" / folder / "config.json").is_file()


@pytest.mark.parametrize("name", ["trust_remote_code", "custom_pipeline", "use_flashpack", "device_map", "variant"])
def test_a_component_that_is_called_like_an_option_is_an_error(saved, name):
    shutil.copytree(saved / "unet", saved / name)
    edit(saved / "model_index.json", **{name: ["diffusers", "UNet2DConditionModel"]})
    with pytest.raises(FlashPackError, match=rf"model_index\.json has a component '{name}', which is an option"):
        FlashPackSD.from_pretrained_flashpack(saved)


def test_the_list_of_options_is_complete_for_the_diffusers_that_is_installed():
    sources = map(
        inspect.getsource, (diffusers.DiffusionPipeline.from_pretrained, diffusers.DiffusionPipeline.download)
    )
    options = {name for source in sources for name in re.findall(r'kwargs\.pop\(\s*"(\w+)"', source)}
    assert "trust_remote_code" in options
    assert options <= OPTIONS


def test_what_is_no_parameter_of_the_constructor_is_passed_over(saved):
    (saved / "extra").mkdir()
    (saved / "extra" / "model.flashpack").write_bytes(b"never looked at")
    names = ("extra", "../unet", "/unet", "unet\0", "")
    edit(saved / "model_index.json", **{name: ["diffusers", "UNet2DConditionModel"] for name in names})
    loaded = FlashPackSD.from_pretrained_flashpack(saved)
    assert not set(names) & set(loaded.components)


def test_code_beside_a_component_runs_only_when_it_is_trusted(saved, monkeypatch, tmp_path):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    (saved / "scheduler" / "brought.py").write_text(
        f"import pathlib; pathlib.Path({os.fspath(tmp_path / 'ran')!r}).touch()\n"
        "from diffusers import DDIMScheduler\nclass Brought(DDIMScheduler): pass\n"
    )
    edit(saved / "model_index.json", scheduler=["brought", "Brought"])
    with pytest.raises(FlashPackError, match=r"scheduler is Brought of code that comes with it.*trust_remote_code"):
        FlashPackSD.from_pretrained_flashpack(saved)
    assert not (tmp_path / "ran").exists()
    loaded = FlashPackSD.from_pretrained_flashpack(saved, trust_remote_code=True)
    assert type(loaded.scheduler).__name__ == "Brought"
    assert (tmp_path / "ran").exists()


def test_code_as_the_class_of_the_pipeline_is_an_error_of_a_type(saved):
    (saved / "brought.py").write_text("raise SystemExit")
    edit(saved / "model_index.json", _class_name=["brought", "Brought"])
    for cls in (FlashPackSD, FlashPackDiffusionPipeline):
        with pytest.raises(FlashPackError, match=r"model_index\.json: _class_name is a list, not a string"):
            cls.from_pretrained_flashpack(saved)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (["subprocess", "Popen"], "Popen of subprocess, which is no component"),
        (["diffusers", "AutoModel"], "AutoModel of diffusers, which is no component"),
        (["a_module_that_nobody_imported", "Thing"], "has not been imported"),
        (["../brought", "Brought"], "cannot be a library and a class"),
        (["diffusers", 7], "scheduler is a list, not a library and a class"),
        (7, "scheduler is a number, not a library and a class"),
    ],
)
def test_a_component_has_a_class_that_can_be_one(saved, entry, message):
    edit(saved / "model_index.json", scheduler=entry)
    with pytest.raises(FlashPackError, match=message) as caught:
        FlashPackSD.from_pretrained_flashpack(saved)
    assert "model_index.json" in str(caught.value) or "imported" in message


def test_a_flashpack_file_has_the_class_of_a_model(saved):
    edit(saved / "model_index.json", unet=["diffusers", "DDIMScheduler"])
    with pytest.raises(FlashPackError, match="DDIMScheduler is not a model") as caught:
        FlashPackSD.from_pretrained_flashpack(saved)
    assert isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize("file", ["unet", "unet/config.json", "unet/model.flashpack", "scheduler"])
def test_a_link_that_leads_out_of_a_pipeline_is_an_error(saved, tmp_path, file):
    (saved / file).rename(tmp_path / "outside")
    (saved / file).symlink_to(tmp_path / "outside")
    with pytest.raises(FlashPackError, match=rf"{file} is a link that leads out of .*saved, to .*outside"):
        FlashPackSD.from_pretrained_flashpack(saved)
    # Whatever is in the directory, the caller may reach it through links.
    (tmp_path / "outside").rename(saved / "inside")
    (saved / file).unlink()
    (saved / file).symlink_to(saved / "inside")
    (tmp_path / "link").symlink_to(saved)
    FlashPackSD.from_pretrained_flashpack(tmp_path / "link")


@pytest.mark.parametrize("shared", [False, True], ids=["blobs", "blobs that are links"])
def test_the_links_of_a_hub_cache_lead_nowhere_else(pipeline, tmp_path, shared):
    files = {str(path.relative_to(pipeline)): path.read_bytes() for path in pipeline.rglob("*") if path.is_file()}
    cache = make_hub_cache(tmp_path / "cache", files)
    if shared:
        for blob in list((cache / "models--x--y" / "blobs").iterdir()):
            blob.rename(tmp_path / blob.name)
            blob.symlink_to(tmp_path / blob.name)
    snapshot = cache / "models--x--y" / "snapshots" / COMMIT
    FlashPackSD.from_pretrained_flashpack(snapshot)
    (snapshot / "unet" / "config.json").unlink()
    (snapshot / "unet" / "config.json").symlink_to(pipeline / "unet" / "config.json")
    with pytest.raises(FlashPackError, match="leads out"):
        FlashPackSD.from_pretrained_flashpack(snapshot)


def write_model(directory: Path) -> Path:
    directory.mkdir()
    save_file(STATE, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    return directory


@pytest.mark.parametrize("name", ["config.json", "notes.txt", "model.safetensors"])
def test_a_conversion_reads_and_copies_nothing_through_a_link_that_leads_out(tmp_path, name):
    directory = write_model(tmp_path / "model")
    (tmp_path / "secret").write_bytes((directory / "model.safetensors").read_bytes())
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to("../secret")
    with pytest.raises(FlashPackError, match=f"{name} is a link that leads out"):
        commands.convert_to_flashpack(directory, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["model", "secret"]


@pytest.mark.parametrize("of_whom", ["the Hub's cache", "the user"])
def test_the_files_that_an_index_lists_may_be_links_for_a_load_and_only_those_of_the_cache_for_a_conversion(
    tmp_path, of_whom
):
    (tmp_path / "made").mkdir()
    shards = dict(zip(("1.safetensors", "2.safetensors"), halves(), strict=True))
    save_index(tmp_path / "made" / "model.safetensors.index.json", shards)
    files = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    if of_whom == "the user":
        directory = tmp_path / "model"
        directory.mkdir()
        for name in files:
            (directory / name).symlink_to(f"../made/{name}")
    else:
        directory = make_hub_cache(tmp_path / "cache", files) / "models--x--y" / "snapshots" / COMMIT
        for link in directory.iterdir():  # The Hub's own are relative.
            blob = link.readlink()
            link.unlink()
            link.symlink_to(f"../../blobs/{blob.name}")
    for path in (directory, directory / "model.safetensors.index.json"):
        assert_bit_equal(flashpack.load_file(path), STATE)
        assert_bit_equal(dict(flashpack.stream_tensors(path)), STATE)
    if of_whom == "the user":
        with pytest.raises(FlashPackError, match=r"safetensors(\.index\.json)? is a link that leads out"):
            commands.convert_to_flashpack(directory, tmp_path / "out")
    else:
        commands.convert_to_flashpack(directory, tmp_path / "out")
        assert_bit_equal(flashpack.load_file(tmp_path / "out"), STATE)


def test_a_link_in_an_index_that_leads_to_something_else_is_an_error_that_says_what_it_is(tmp_path):
    (tmp_path / "secret").write_text("no weights\n" * 10)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "1.safetensors").symlink_to("../secret")
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors"}}))
    with pytest.raises(FlashPackError, match=r"1\.safetensors.*it is a text"):
        flashpack.load_file(index)


@pytest.mark.parametrize("target", ["..", "../model", "loop", "../model2/a", "sub/../.."])
def test_no_way_around_is_taken_for_one_that_stays_inside(tmp_path, target):
    (tmp_path / "model" / "sub").mkdir(parents=True)
    (tmp_path / "model2").mkdir()
    link = tmp_path / "model" / "loop"
    link.symlink_to(target)
    if target == "../model":
        check_inside(tmp_path / "model", [link])
    else:
        with pytest.raises(FlashPackError, match="leads out"):
            check_inside(tmp_path / "model", [link])


@pytest.mark.parametrize("name", ["../b.safetensors", "/b.safetensors", "..", "b\0", "\ud800", 7, None, ["b"]])
def test_a_shard_is_a_file_beside_its_index(tmp_path, name):
    index = tmp_path / "a.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(FlashPackError, match=r"which is no file beside it|not the index of a sharded") as caught:
        commands.convert_to_flashpack(index)
    assert str(index) in str(caught.value)


def test_a_fifo_is_an_error_and_not_a_wait(tmp_path):
    os.mkfifo(tmp_path / "shard.safetensors")
    os.mkfifo(tmp_path / "model.bin")
    index = tmp_path / "a.safetensors.index.json"
    for shard in ("shard.safetensors", "model.bin"):
        index.write_text(json.dumps({"weight_map": {"a": shard}}))
        with pytest.raises(FlashPackError, match=f"{shard} is not a regular file"):
            commands.convert_to_flashpack(index, tmp_path / "out.flashpack")
    for source in (tmp_path / "shard.safetensors", tmp_path / "model.bin"):
        with pytest.raises(FlashPackError, match=f"{source} is not a regular file"):
            commands.convert_to_flashpack(source)
    with pytest.raises(FlashPackError, match="not a regular file"):
        open_regular(tmp_path / "model.bin")
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": "BertModel"}, "architectures is a string, not a list of strings"),
        ({"architectures": [7]}, "architectures is a list, not a list of strings"),
        ({"model_type": ["bert"]}, "model_type is a list, not a string"),
        ({"_class_name": {}}, "_class_name is an object, not a string"),
        ({"auto_map": 7}, "auto_map is a number, not an object"),
        ({"auto_map": {"AutoModel": True}}, r"auto_map\['AutoModel'\] is a boolean, not a string"),
        ({"configuration_files": ["../config.4.0.0.json"]}, "which is no file beside it"),
        ({"_attn_implementation_internal": "some/kernel"}, "_attn_implementation_internal names 'some/kernel'"),
        ({"part": [{"experts_implementation": {"": "some/kernel"}}]}, "only the caller may ask for that"),
    ],
)
def test_a_field_of_the_wrong_type_is_an_error_that_names_it(tmp_path, fields, message):
    model = make("bert")
    save(model, tmp_path)
    edit(tmp_path / "config.json", **fields)
    with pytest.raises(FlashPackError, match=message) as caught:
        load(type(model), tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_what_a_library_stumbles_over_is_an_error_that_names_the_directory(tmp_path):
    model = make("bert")
    save(model, tmp_path)
    edit(tmp_path / "config.json", hidden_size="many")
    with pytest.raises(FlashPackError, match=re.escape(str(tmp_path))) as caught:
        load(type(model), tmp_path)
    assert caught.value.__cause__ is not None


def test_implementations_without_a_repository_and_auto_maps_of_every_kind_are_harmless(tmp_path):
    config = {
        "_attn_implementation": "sdpa",
        "auto_map": {"AutoModel": "code.Model", "AutoTokenizer": ["code.Slow", None], "AutoProcessor": None},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert check_model_config(tmp_path) == config
    assert check_model_config(tmp_path / "nowhere") == {}


def test_the_settings_of_a_pipeline_are_no_components(tmp_path):
    index = {"a": ["x", "Y"], "b": [None, None], "c": [1, 2], "d": True, "e": ["x", "Y", "Z"], "_f": ["x", "Y"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert components_of(tmp_path) == {"a": ("x", "Y")}
    assert components_of(tmp_path / "nowhere") == {}


def test_the_code_of_a_repository_is_not_downloaded_unless_it_is_trusted(saved, tmp_path, monkeypatch):
    asked: list[Any] = []

    def resolve(path: Any, download: Any, allow_patterns: Any) -> Path:
        asked.extend(allow_patterns)
        return saved

    monkeypatch.setattr("flashpack.integrations.diffusers.pipeline.resolve_directory", resolve)
    FlashPackSD.from_pretrained_flashpack("x/y")
    assert not [pattern for pattern in asked if pattern.endswith(".py")]
    FlashPackSD.from_pretrained_flashpack("x/y", trust_remote_code=True)
    assert "*.py" in asked


def test_pickles_run_nothing(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "a.bin").write_bytes(pickle.dumps({"a": Evil()}))
    with pytest.raises(FlashPackError, match=r"a\.bin is not a file that torch\.save wrote.*unpickling can run code"):
        flashpack.commands.convert_to_flashpack(tmp_path / "a.bin")
    assert not (tmp_path / "ran").exists()
