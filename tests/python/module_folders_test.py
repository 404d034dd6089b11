"""Directories of sentence-transformers, whose modules after the model itself have folders of their own."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import flashpack
import pytest
import safetensors.torch
import torch
from checkpoints import STATE, names_in, save_index
from flashpack import FlashPackError, commands
from support import assert_bit_equal

MODULES = ["", "1_Pooling", "2_Dense", "3_Normalize"]
DENSE = {"linear.weight": torch.eye(3)}
COMPANIONS = ["1_Pooling/config.json", "2_Dense/config.json", "config.json", "modules.json"]


def write(directory: Path, modules: Any = MODULES) -> Path:
    """`modules`: folders, or all of modules.json."""
    if isinstance(modules, list) and all(isinstance(path, str) for path in modules):
        kinds = [path.partition("_")[2] or "Transformer" for path in modules]
        modules = [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(zip(modules, kinds, strict=True))
        ]
    for folder in ("1_Pooling", "2_Dense"):
        (directory / folder).mkdir(parents=True)
        (directory / folder / "config.json").write_text("{}")
    (directory / "config.json").write_text("{}")
    (directory / "modules.json").write_text(json.dumps(modules))
    safetensors.torch.save_file(STATE, directory / "model.safetensors")
    safetensors.torch.save_file(DENSE, directory / "2_Dense" / "model.safetensors")
    return directory


def test_modules_come_along_with_their_weights_as_they_are_there_and_back(tmp_path, caplog):
    source = write(tmp_path / "model")
    commands.convert_to_flashpack(source, tmp_path / "packed", dtype="float16")
    modules = [*COMPANIONS, "2_Dense/model.safetensors"]
    assert names_in(tmp_path / "packed") == sorted([*modules, "model.flashpack"])
    commands.revert_from_flashpack(tmp_path / "packed", tmp_path / "back")
    assert names_in(tmp_path / "back") == sorted([*modules, "model.safetensors"])
    for result in ("packed", "back"):
        assert_bit_equal(safetensors.torch.load_file(tmp_path / result / "2_Dense" / "model.safetensors"), DENSE)
    assert caplog.text == ""


def test_shards_and_pickles_of_modules_come_along_but_code_only_when_that_is_asked_for(tmp_path, caplog):
    source = write(tmp_path / "model")
    (source / "2_Dense" / "model.safetensors").unlink()
    save_index(source / "2_Dense" / "model.safetensors.index.json", {"model-00001-of-00001.safetensors": DENSE})
    torch.save({}, source / "1_Pooling" / "pytorch_model.bin")
    (source / "1_Pooling" / "pooling.py").write_text("")
    commands.convert_to_flashpack(source, tmp_path / "packed")
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "code is not copied, unless copy_code of a conversion asks for it"
    ]
    expected = ["1_Pooling/pytorch_model.bin"]
    expected += ["2_Dense/model-00001-of-00001.safetensors", "2_Dense/model.safetensors.index.json"]
    assert set(names_in(tmp_path / "packed")) == {*COMPANIONS, *expected, "model.flashpack"}
    commands.convert_to_flashpack(source, tmp_path / "packed", copy_code=True)
    assert "1_Pooling/pooling.py" in names_in(tmp_path / "packed")


def test_folders_with_files_that_stay_behind_are_named_once(tmp_path, caplog):
    source = write(tmp_path / "model", ["", "1_Pooling"])
    for name in ("onnx/model.onnx", "runs/deep/log.txt", "1_Pooling/weights.npz", ".git/config"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("")
    (source / "empty").mkdir()
    commands.convert_to_flashpack(source, tmp_path / "packed")
    assert [record.message for record in caplog.records] == [
        f"{source} has folders with files that are not copied: 1_Pooling, 2_Dense, onnx, runs"
    ]
    caplog.clear()
    commands.convert_to_flashpack(source)
    assert caplog.text == ""  # All of it is where it was.


def test_other_weights_of_a_module_in_the_destination_are_replaced_by_force_alone(tmp_path):
    source = write(tmp_path / "model")
    commands.convert_to_flashpack(source, tmp_path / "packed")
    (tmp_path / "packed" / "2_Dense" / "model.safetensors").write_bytes(b"trained")
    with pytest.raises(FlashPackError, match=r"other files .*: 2_Dense/model\.safetensors;"):
        commands.convert_to_flashpack(source, tmp_path / "packed")
    commands.convert_to_flashpack(source, tmp_path / "packed", force=True)
    assert_bit_equal(safetensors.torch.load_file(tmp_path / "packed" / "2_Dense" / "model.safetensors"), DENSE)


def test_a_component_of_a_pipeline_is_no_module(tmp_path):
    source = write(tmp_path / "model", ["unet"])
    (source / "unet").mkdir()
    (source / "unet" / "config.json").write_text("{}")
    (source / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet2DModel"]}))
    safetensors.torch.save_file({"old": torch.ones(1)}, source / "unet" / "model.safetensors")
    flashpack.pack_to_file(STATE, source / "unet" / "model.flashpack")
    commands.revert_from_flashpack(source, tmp_path / "back")
    assert_bit_equal(safetensors.torch.load_file(tmp_path / "back" / "unet" / "model.safetensors"), STATE)


def test_a_module_that_is_a_link_out_of_the_directory_is_refused(tmp_path):
    source = write(tmp_path / "model")
    (source / "2_Dense").rename(tmp_path / "elsewhere")
    (source / "2_Dense").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FlashPackError, match="a link that leads out of"):
        commands.convert_to_flashpack(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("modules", [{}, {"path": "../x"}, "2_Dense", None, [], [{}], [["../x"]]])
def test_a_file_of_that_name_that_is_not_of_sentence_transformers_names_no_modules(modules, tmp_path):
    source = write(tmp_path / "model", modules)
    commands.convert_to_flashpack(source, tmp_path / "packed")
    assert names_in(tmp_path / "packed") == ["config.json", "model.flashpack", "modules.json"]


def test_of_a_repository_one_set_of_weights_of_each_module_is_downloaded(tmp_path, monkeypatch):
    whole = write(tmp_path / "whole")
    torch.save(DENSE, whole / "2_Dense" / "pytorch_model.bin")
    torch.save({}, whole / "1_Pooling" / "pytorch_model.bin")
    (whole / "onnx").mkdir()
    (whole / "onnx" / "model.onnx").write_text("")
    here = tmp_path / "snapshot"

    def bring(repo_id, *, allow_patterns, **rest):
        from huggingface_hub.utils import filter_repo_objects

        for name in filter_repo_objects(names_in(whole), allow_patterns=allow_patterns):
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(whole / name, here / name)
        return os.fspath(here)

    monkeypatch.setattr("huggingface_hub.snapshot_download", bring)
    commands.convert_to_flashpack("some/model", tmp_path / "packed")
    weights = ["1_Pooling/pytorch_model.bin", "2_Dense/model.safetensors"]
    assert names_in(here) == sorted([*COMPANIONS, *weights, "model.safetensors"])
    assert names_in(tmp_path / "packed") == sorted([*COMPANIONS, *weights, "model.flashpack"])
