"""A result is not written beside older weights that programs load in its place, or at least not without a word."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flashpack
import pytest
import safetensors.torch
import torch
from checkpoints import STATE, names_in, save_index
from flashpack import FlashPackError, _reversal, commands
from support import assert_bit_equal

OLD = {name: torch.zeros_like(tensor) for name, tensor in STATE.items()}
DIFFUSERS, TRANSFORMERS = {"_class_name": "UNet2DModel"}, {"model_type": "bert"}


def packed(directory: Path, config: dict[str, Any] = TRANSFORMERS) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    flashpack.pack_to_file(STATE, directory / "model.flashpack")
    return directory


def save_older_index(directory: Path, stem: str) -> Path:
    directory.mkdir(exist_ok=True)
    return save_index(directory / f"{stem}.safetensors.index.json", {f"{stem}-00001-of-00001.safetensors": OLD})


STEMS = [(DIFFUSERS, "diffusion_pytorch_model"), (TRANSFORMERS, "model")]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(("config", "stem"), STEMS)
def test_a_directory_is_not_reverted_beside_an_index_unless_forced(config, stem, named, tmp_path, caplog):
    directory = packed(tmp_path / "model", config)
    out = tmp_path / "out" if named else directory
    index = save_older_index(out, stem)
    before = names_in(tmp_path)
    arguments = (directory, out) if named else (directory,)
    with pytest.raises(FlashPackError, match=rf"{index} is there, .*diffusers.* in place of .*force=True"):
        commands.revert_from_flashpack(*arguments)
    assert names_in(tmp_path) == before
    commands.revert_from_flashpack(*arguments, force=True)
    assert not index.exists()
    assert (out / f"{stem}-00001-of-00001.safetensors").exists()  # Weights are not lost with the index.
    assert_bit_equal(safetensors.torch.load_file(out / f"{stem}.safetensors"), STATE)
    assert [record.message.partition(",")[0] for record in caplog.records] == [str(index)]


def test_diffusers_loads_what_was_reverted_beside_shards(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    shape = {"sample_size": 8, "block_out_channels": (32,), "layers_per_block": 1}
    unet = diffusers.UNet2DModel(**shape, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    unet.save_pretrained(tmp_path, max_shard_size="100KB")
    (index,) = tmp_path.glob("*.index.json")
    new = {name: tensor + 1 for name, tensor in unet.state_dict().items()}
    flashpack.pack_to_file(new, tmp_path / "model.flashpack")
    with pytest.raises(FlashPackError, match=index.name):
        commands.revert_from_flashpack(tmp_path)
    commands.revert_from_flashpack(tmp_path, force=True)
    assert_bit_equal(diffusers.UNet2DModel.from_pretrained(tmp_path).state_dict(), new)


def test_weights_go_where_a_configuration_of_transformers_says_that_they_are(tmp_path):
    directory = packed(tmp_path / "model", TRANSFORMERS | {"transformers_weights": "named.safetensors"})
    safetensors.torch.save_file(OLD, directory / "named.safetensors")
    with pytest.raises(FlashPackError, match=r"named\.safetensors exists already"):
        commands.revert_from_flashpack(directory)
    commands.revert_from_flashpack(directory, tmp_path / "out")
    assert names_in(tmp_path / "out") == ["config.json", "named.safetensors"]


@pytest.mark.parametrize("name", ["model.flashpack", "model.flashpack.index.json"])
def test_a_directory_with_an_older_flashpack_file_gets_no_other_weights_unless_forced(name, tmp_path):
    directory = packed(tmp_path / "model")
    out = tmp_path / "out"
    out.mkdir()
    if name == "model.flashpack":
        flashpack.pack_to_file(OLD, out / name)
    else:
        (out / name).write_text("{}")
    with pytest.raises(FlashPackError, match=rf"{name} is there, which flashpack loads in place of .*force=True"):
        commands.revert_from_flashpack(directory, out)
    assert os.listdir(out) == [name]
    commands.revert_from_flashpack(directory, out, force=True)
    assert names_in(out) == ["config.json", "model.safetensors"]
    assert_bit_equal(flashpack.load_file(out), STATE)


def test_an_adapter_has_no_rival_in_the_flashpack_file_of_a_model(tmp_path):
    directory = packed(tmp_path / "lora")
    (directory / "model.flashpack").rename(directory / "adapter_model.flashpack")
    (tmp_path / "out").mkdir()
    flashpack.pack_to_file(OLD, tmp_path / "out" / "model.flashpack")
    commands.revert_from_flashpack(directory, tmp_path / "out")
    flashpack.pack_to_file(OLD, tmp_path / "out" / "adapter_model.flashpack")
    with pytest.raises(FlashPackError, match=r"adapter_model\.flashpack is there"):
        commands.revert_from_flashpack(directory, tmp_path / "out")


def test_what_is_reverted_is_no_older_weights(tmp_path, caplog):
    directory = packed(tmp_path / "model")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.flashpack").symlink_to(directory / "model.flashpack")
    commands.revert_from_flashpack(directory, tmp_path / "out")
    commands.revert_from_flashpack(directory)
    commands.revert_from_flashpack(directory, force=True)
    assert (directory / "model.flashpack").exists()
    (directory / "model.flashpack").rename(directory / "model-1.flashpack")
    index = directory / "model.flashpack.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(STATE, "model-1.flashpack")}))
    for source in (directory, index):
        commands.revert_from_flashpack(source, force=True)
        assert index.exists()
    assert caplog.text == ""


def test_nothing_older_is_removed_before_the_result_is_there(tmp_path, monkeypatch):
    directory = packed(tmp_path / "model", DIFFUSERS)
    index = save_older_index(tmp_path / "out", "diffusion_pytorch_model")
    flashpack.pack_to_file(OLD, tmp_path / "out" / "model.flashpack")
    before = names_in(tmp_path / "out")

    def fail(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(_reversal, "copy_companions", fail)
        with pytest.raises(OSError, match="No space"):
            commands.revert_from_flashpack(directory, tmp_path / "out", force=True)
    assert names_in(tmp_path / "out") == before
    seen = []
    unlink = Path.unlink

    def spy(path: Path, **options: Any) -> None:
        if path.parent == index.parent:
            seen.append(names_in(index.parent))
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", spy)
    commands.revert_from_flashpack(directory, tmp_path / "out", force=True)
    assert len(seen) == 2
    assert {"config.json", "diffusion_pytorch_model.safetensors"} <= set(seen[0])


def test_beside_a_file_older_weights_stay_and_are_logged_or_refused_for_a_default(tmp_path, caplog):
    source = packed(tmp_path / "model") / "model.flashpack"
    index = save_older_index(tmp_path / "model", "model")
    with pytest.raises(FlashPackError, match=rf"{index} is there, .*: remove it, or name the destination"):
        commands.revert_from_flashpack(source)
    for arguments in ({"destination_path": source.with_suffix(".safetensors")}, {"force": True}):
        caplog.clear()
        commands.revert_from_flashpack(source, **arguments)
        assert [record.message.partition(",")[0] for record in caplog.records] == [f"{index} is there"]
    assert index.exists()
    caplog.clear()
    (tmp_path / "other.flashpack").write_bytes(b"older")
    commands.revert_from_flashpack(source, tmp_path / "other.pt")
    assert caplog.text == ""  # Nobody loads one of the two in place of the other.


def convert(out: Path) -> None:
    source = out.parent / "source"
    source.mkdir()
    safetensors.torch.save_file(STATE, source / "model.safetensors")
    commands.convert_to_flashpack(source, out)


def save_pipeline(out: Path) -> None:
    pytest.importorskip("diffusers")
    from diffusers_models import save_pipeline

    save_pipeline(out.parent)


def save_model_of_diffusers(out: Path) -> None:
    pytest.importorskip("diffusers")
    from diffusers_models import make_unet

    make_unet().save_pretrained_flashpack(out)


def save_model_of_transformers(out: Path) -> None:
    pytest.importorskip("transformers")
    from transformers_models import make, save

    save(make("bert"), out)


WRITES = [
    (convert, "out"),
    (save_pipeline, "unet"),
    (save_model_of_diffusers, "out"),
    (save_model_of_transformers, "out"),
]


@pytest.mark.parametrize(("write", "name"), WRITES)
def test_older_weights_beside_a_new_flashpack_file_stay_and_are_named_with_it(
    write: Callable[[Path], None], name, tmp_path, caplog
):
    older = save_older_index(tmp_path / name, "diffusion_pytorch_model")
    write(tmp_path / name)
    assert [record.message for record in caplog.records if record.name == "flashpack"] == [
        f"flashpack loads {tmp_path / name / 'model.flashpack'}, but programs without flashpack load {older}, "
        f"which is older"
    ]
    assert older.exists()
