"""What whoever packed a file says of it."""

from __future__ import annotations

import json
import os

import flashpack
import pytest
import safetensors
import safetensors.torch
import torch
from checkpoints import STATE, halves, save_index
from click.testing import CliRunner
from flashpack.cli import main
from flashpack.commands import convert_to_flashpack, revert_from_flashpack
from support import footer_bytes

# As LoRA trainers write it.
ABOUT = {"format": "pt", "ss_network_dim": "16", "modelspec.title": 'a "title"\n', "": "é\0"}


@pytest.fixture
def path(tmp_path):
    flashpack.pack_to_file(STATE, tmp_path / "model.flashpack", metadata=ABOUT)
    return tmp_path / "model.flashpack"


def header_of(file):
    with safetensors.safe_open(file, "pt") as opened:
        return opened.metadata()


def test_metadata_is_read_as_it_was_written(path):
    assert flashpack.get_flashpack_file_metadata(path)["metadata"] == ABOUT
    with flashpack.open_file(path) as file:
        assert file.metadata["metadata"] == ABOUT
    about = {}
    flashpack.load_file(path, metadata=about)
    assert about == ABOUT


def test_its_key_comes_last_but_for_checksums_and_the_rest_of_the_footer_is_as_without_it(path, tmp_path):
    flashpack.pack_to_file(STATE, tmp_path / "plain")
    plain, footer = json.loads(footer_bytes(tmp_path / "plain")), json.loads(footer_bytes(path))
    assert [*footer][-3:] == ["metadata", "crc32c_per_mib", "footer_crc32c"]
    assert {key: footer[key] for key in plain if key != "footer_crc32c"} == {
        key: plain[key] for key in plain if key != "footer_crc32c"
    }


@pytest.mark.parametrize("nothing", [None, {}])
def test_without_any_the_file_is_what_it_is_without_the_argument(nothing, tmp_path):
    flashpack.pack_to_file(STATE, tmp_path / "with", metadata=nothing)
    flashpack.pack_to_file(STATE, tmp_path / "without")
    assert (tmp_path / "with").read_bytes() == (tmp_path / "without").read_bytes()
    assert "metadata" not in flashpack.get_flashpack_file_metadata(tmp_path / "with")
    about = {}
    flashpack.load_file(tmp_path / "with", metadata=about)
    assert about == {}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"rank": 16}, "'rank': 16 is a int, not a str"),
        ({"rank": None}, "'rank': None is a NoneType"),
        ("step 7", "metadata is a str, not a mapping"),
        ({1: "a"}, "1: 1 is a int"),
        ({"a": "\ud800"}, "'a' cannot be written as UTF-8"),
        ({"\ud800": "a"}, "cannot be written as UTF-8"),
        ({"a": "\0" * (50 << 20)}, "over the limit of 268435456"),
    ],
    ids=["number", "None", "text", "key", "surrogate", "key-surrogate", "too-long"],
)
def test_what_a_footer_cannot_hold_is_refused_before_anything_is_written(metadata, message, tmp_path):
    with pytest.raises(flashpack.FlashPackError, match=message):
        flashpack.pack_to_file(STATE, tmp_path / "new" / "model.flashpack", metadata=metadata)
    assert os.listdir(tmp_path) == []


def test_names_that_make_a_footer_too_long_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(flashpack.FlashPackError, match="over the limit of 268435456"):
        flashpack.pack_to_file({"\0" * (50 << 20): torch.ones(1)}, tmp_path / "new" / "model.flashpack")
    assert os.listdir(tmp_path) == []


def test_the_metadata_of_a_safetensors_file_comes_back_after_conversion(tmp_path):
    safetensors.torch.save_file(STATE, tmp_path / "lora.safetensors", metadata=ABOUT)
    packed = convert_to_flashpack(tmp_path / "lora.safetensors")
    assert header_of(revert_from_flashpack(packed, tmp_path / "back.safetensors")) == ABOUT


def test_a_safetensors_file_without_metadata_reverts_to_one_that_transformers_takes(tmp_path):
    safetensors.torch.save_file(STATE, tmp_path / "model.safetensors")
    packed = convert_to_flashpack(tmp_path / "model.safetensors")
    assert "metadata" not in flashpack.get_flashpack_file_metadata(packed)
    assert header_of(revert_from_flashpack(packed, tmp_path / "back.safetensors")) == {"format": "pt"}


@pytest.mark.parametrize("destination", ["converted", "model.flashpack"])
def test_the_metadata_of_a_directory_comes_with_its_weights(destination, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    safetensors.torch.save_file(STATE, source / "model.safetensors", metadata=ABOUT)
    converted = convert_to_flashpack(source, tmp_path / destination)
    packed = converted if destination.endswith(".flashpack") else os.path.join(converted, "model.flashpack")
    assert flashpack.get_flashpack_file_metadata(packed)["metadata"] == ABOUT


def test_the_metadata_of_a_sharded_directory_comes_back_after_conversion(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    shards = dict(zip(("m0.safetensors", "m1.safetensors"), halves(), strict=True))
    save_index(source / "model.safetensors.index.json", shards)
    for name, tensors in shards.items():
        safetensors.torch.save_file(tensors, source / name, metadata=ABOUT)
    packed = os.path.join(convert_to_flashpack(source, tmp_path / "converted"), "model.flashpack")
    assert flashpack.get_flashpack_file_metadata(packed)["metadata"] == ABOUT
    assert header_of(revert_from_flashpack(packed, tmp_path / "back.safetensors")) == ABOUT


def test_what_shards_contradict_each_other_about_is_left_out_with_a_warning(tmp_path, caplog):
    shards = dict(zip(("m0.safetensors", "m1.safetensors"), halves(), strict=True))
    index = save_index(tmp_path / "model.safetensors.index.json", shards)
    for (name, tensors), own in zip(shards.items(), ({"a": "1", "b": "2"}, {"b": "3", "c": "4"}), strict=True):
        safetensors.torch.save_file(tensors, tmp_path / name, metadata={"format": "pt", **own})
    packed = convert_to_flashpack(index)
    assert flashpack.get_flashpack_file_metadata(packed)["metadata"] == {"format": "pt", "a": "1", "c": "4"}
    assert "contradict each other in metadata, which is left out: b" in caplog.text


@pytest.mark.parametrize("suffix", ["bin", "safetensors.index.json", "bin.index.json"])
def test_a_checkpoint_without_metadata_has_none_after_its_conversion(suffix, tmp_path):
    source = tmp_path / f"model.{suffix}"
    if suffix.endswith("json"):
        kind = suffix.removesuffix(".index.json")
        save_index(source, {f"m{number}.{kind}": half for number, half in enumerate(halves())})
    else:
        torch.save(STATE, source)
    assert "metadata" not in flashpack.get_flashpack_file_metadata(convert_to_flashpack(source))


def test_a_file_that_has_no_place_for_metadata_is_made_with_a_warning(path, caplog):
    back = revert_from_flashpack(path, path.with_name("back.pt"))
    assert set(torch.load(back)) == set(STATE)
    assert "metadata is left out" in caplog.text


def test_a_tensor_with_the_name_of_metadata_is_refused_where_it_could_not_be_read(tmp_path):
    path = tmp_path / "model.flashpack"
    flashpack.pack_to_file({"__metadata__": torch.ones(2)}, path)
    with pytest.raises(flashpack.FlashPackError, match='"__metadata__"'):
        revert_from_flashpack(path)
    assert os.listdir(tmp_path) == ["model.flashpack"]
    assert torch.load(revert_from_flashpack(path, tmp_path / "model.pt"))["__metadata__"].tolist() == [1, 1]


def test_mixins_pass_metadata_on(tmp_path):
    class Net(torch.nn.Linear, flashpack.FlashPackMixin):
        pass

    Net(2, 2).save_flashpack(tmp_path / "net.flashpack", silent=True, metadata=ABOUT)
    assert flashpack.get_flashpack_file_metadata(tmp_path / "net.flashpack")["metadata"] == ABOUT


def test_transformers_models_are_saved_with_metadata(tmp_path):
    pytest.importorskip("transformers")
    from transformers_models import make, save

    save(make("bert"), tmp_path, metadata=ABOUT)
    assert flashpack.get_flashpack_file_metadata(tmp_path / "model.flashpack")["metadata"] == ABOUT


def test_diffusers_models_are_saved_with_metadata(tmp_path):
    pytest.importorskip("diffusers")
    from diffusers_models import FlashPackCounting

    FlashPackCounting().save_pretrained_flashpack(tmp_path, metadata=ABOUT)
    assert flashpack.get_flashpack_file_metadata(tmp_path / "model.flashpack")["metadata"] == ABOUT


def test_the_command_line_shows_metadata_in_lines_that_cannot_drive_a_terminal(tmp_path):
    path = tmp_path / "model.flashpack"
    flashpack.pack_to_file(STATE, path, metadata={"evil\x1b[2J": "one\ntwo", "long": "x" * 5000})
    lines = CliRunner().invoke(main, ["metadata", str(path)]).output.splitlines()
    assert r"  evil\x1b[2J: one\ntwo" in lines
    assert f"  long: {'x' * 1000}... and 4000 characters more" in lines
    shown = json.loads(CliRunner().invoke(main, ["metadata", "--json", str(path)]).output)
    assert shown["metadata"] == {"evil\x1b[2J": "one\ntwo", "long": "x" * 5000}
