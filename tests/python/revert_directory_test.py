"""flashpack revert of directories, adapters, and what happens while files are written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import flashpack
import pytest
import safetensors.torch
import torch
from checkpoints import STATE, halves, names_in
from click.testing import CliRunner
from convert_directory_test import small_bert, small_pipeline, write_model, write_pipeline
from flashpack import FlashPackError, commands
from flashpack.__main__ import main
from support import DTYPES, assert_bit_equal, random_tensor


def run(*arguments):
    return CliRunner().invoke(main, [os.fspath(argument) for argument in arguments])


def without_weights(names):
    return [name for name in names if not name.endswith((".safetensors", ".flashpack"))]


def test_a_directory_reverts_to_what_it_was_converted_from(tmp_path):
    write_model(tmp_path / "model", {"model.safetensors": STATE})
    commands.convert_to_flashpack(tmp_path / "model", tmp_path / "packed")
    assert commands.revert_from_flashpack(tmp_path / "packed", tmp_path / "new" / "back") == os.fspath(
        tmp_path / "new" / "back"
    )
    expected = [*without_weights(names_in(tmp_path / "packed")), "model.safetensors"]
    assert names_in(tmp_path / "new" / "back") == sorted(expected)
    assert_bit_equal(safetensors.torch.load_file(tmp_path / "new" / "back" / "model.safetensors"), STATE)


@pytest.mark.parametrize("command", ["convert", "revert"])
def test_the_commands_replace_other_files_of_a_directory_by_force_alone(command, tmp_path):
    write_model(tmp_path / "model", {"model.safetensors": STATE})
    commands.convert_to_flashpack(tmp_path / "model", tmp_path / "packed")
    source = tmp_path / {"convert": "model", "revert": "packed"}[command]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("of another model")
    result = run(command, source, tmp_path / "out")
    assert result.exit_code == 1
    assert "other files of the names that would be copied there: config.json" in result.stderr
    assert names_in(tmp_path / "out") == ["config.json"]
    assert (tmp_path / "out" / "config.json").read_text() == "of another model"
    assert run(command, source, tmp_path / "out", "--force").exit_code == 0
    assert (tmp_path / "out" / "config.json").read_text() == "{}"


def test_a_library_loads_what_a_directory_reverts_to(tmp_path):
    bert = small_bert(tmp_path / "bert")
    unet = small_pipeline(tmp_path / "pipeline")
    for name in ("bert", "pipeline"):
        commands.convert_to_flashpack(tmp_path / name, tmp_path / f"{name}-packed")
        assert run("revert", tmp_path / f"{name}-packed", tmp_path / f"{name}-back").exit_code == 0
    again = type(bert).from_pretrained(tmp_path / "bert-back", use_safetensors=True, dtype="auto")
    assert_bit_equal(again.state_dict(), dict(bert.state_dict()))
    again = type(unet).from_pretrained(
        tmp_path / "pipeline-back" / "unet", torch_dtype=torch.bfloat16, use_safetensors=True
    )
    assert_bit_equal(again.state_dict(), dict(unet.state_dict()))
    assert (tmp_path / "pipeline-back" / "scheduler" / "scheduler_config.json").is_file()
    assert (tmp_path / "pipeline-back" / "unet" / "diffusion_pytorch_model.safetensors").is_file()


def test_components_that_are_safetensors_already_come_along_to_another_directory(tmp_path):
    write_pipeline(tmp_path / "source")
    unet = tmp_path / "source" / "unet"
    (unet / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    commands.convert_to_flashpack(unet)
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    plain, other = halves()
    run("revert", tmp_path / "source", tmp_path / "back")
    assert_bit_equal(
        safetensors.torch.load_file(tmp_path / "back" / "unet" / "diffusion_pytorch_model.safetensors"), plain
    )
    assert_bit_equal(safetensors.torch.load_file(tmp_path / "back" / "text_encoder" / "model.safetensors"), other)
    before = (tmp_path / "source" / "text_encoder" / "model.safetensors").stat()
    assert run("revert", tmp_path / "source").exit_code == 0
    assert_bit_equal(safetensors.torch.load_file(unet / "diffusion_pytorch_model.safetensors"), plain)
    assert (tmp_path / "source" / "text_encoder" / "model.safetensors").stat() == before


def test_a_directory_is_its_own_default_and_replaces_nothing_unless_forced(tmp_path):
    write_model(tmp_path / "model", {"model.safetensors": STATE})
    commands.convert_to_flashpack(tmp_path / "model")
    result = run("revert", tmp_path / "model")
    assert "model.safetensors exists already" in result.stderr
    (tmp_path / "model" / "model.safetensors").write_bytes(b"old")
    assert run("revert", tmp_path / "model", "--force").exit_code == 0
    assert_bit_equal(safetensors.torch.load_file(tmp_path / "model" / "model.safetensors"), STATE)
    (tmp_path / "model" / "model.flashpack").unlink()
    with pytest.raises(FlashPackError, match="there is no flashpack file in"):
        commands.revert_from_flashpack(tmp_path / "model", tmp_path / "other")
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt", ".pth", ".ckpt"])
def test_a_directory_reverts_to_a_file_if_the_destination_is_called_like_one(suffix, tmp_path):
    (tmp_path / "model").mkdir()
    flashpack.pack_to_file(STATE, tmp_path / "model" / "model.flashpack")
    file = tmp_path / f"out{suffix}"
    assert run("revert", tmp_path / "model", file).exit_code == 0
    assert_bit_equal(safetensors.torch.load_file(file) if suffix == ".safetensors" else torch.load(file), STATE)


def test_a_component_that_leads_out_of_the_directory_is_refused(tmp_path):
    write_pipeline(tmp_path / "source")
    commands.convert_to_flashpack(tmp_path / "source", tmp_path / "packed")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "packed" / "unet" / "model.flashpack").rename(tmp_path / "elsewhere" / "model.flashpack")
    (tmp_path / "packed" / "unet" / "model.flashpack").symlink_to(tmp_path / "elsewhere" / "model.flashpack")
    with pytest.raises(FlashPackError, match="a link that leads out of"):
        commands.revert_from_flashpack(tmp_path / "packed", tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors"])
def test_an_adapter_keeps_its_name_there_and_back(name, tmp_path):
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    save = safetensors.torch.save_file if name.endswith(".safetensors") else torch.save
    save(STATE, lora / name)
    stem = name.split(".")[0]
    assert run("convert", lora).exit_code == 0
    assert names_in(lora) == sorted(["adapter_config.json", name, f"{stem}.flashpack"])
    assert "exists already" in run("convert", lora).stderr
    assert_bit_equal(flashpack.load_file(lora), STATE)  # Where two files have one name, it is the flashpack file.
    assert run("convert", lora, tmp_path / "packed").exit_code == 0
    assert names_in(tmp_path / "packed") == ["adapter_config.json", f"{stem}.flashpack"]
    assert run("revert", tmp_path / "packed", tmp_path / "back").exit_code == 0
    assert names_in(tmp_path / "back") == ["adapter_config.json", f"{stem}.safetensors"]
    assert_bit_equal(safetensors.torch.load_file(tmp_path / "back" / f"{stem}.safetensors"), STATE)


def test_of_a_model_and_an_adapter_the_model_is_converted(tmp_path):
    plain, other = halves()
    write_model(tmp_path / "model", {"adapter_model.safetensors": other})
    torch.save(plain, tmp_path / "model" / "pytorch_model.bin")
    commands.convert_to_flashpack(tmp_path / "model", tmp_path / "out")
    assert_bit_equal(flashpack.load_file(tmp_path / "out" / "model.flashpack"), plain)


def test_safetensors_files_of_every_dtype_are_as_their_library_reads_them(pack, tmp_path):
    known = [dtype for dtype in DTYPES if dtype in safetensors.torch._TYPES.values()]
    tensors = {str(dtype): random_tensor((3, 5), dtype) for dtype in known}
    tensors |= {'größe "\\\n': torch.ones(()), "none": torch.empty(2, 0), "odd": random_tensor((7,), torch.uint8)}
    path = commands.revert_from_flashpack(pack(tensors, metadata={"a": "\u00fc\n"}), tmp_path / "a.safetensors")
    assert_bit_equal(safetensors.torch.load_file(path), tensors)
    assert_bit_equal(flashpack.load_file(path), tensors)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"a": "\u00fc\n", "format": "pt"}
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    assert length % 8 == 0
    for name, tensor in tensors.items():
        assert header[name]["data_offsets"][0] % tensor.dtype.itemsize == 0


FULL = """
import resource, sys, flashpack, torch
from flashpack.commands import revert_from_flashpack
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    revert_from_flashpack(sys.argv[1], sys.argv[2])
except OSError as error:
    print(error.errno, error)
"""


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_a_system_that_takes_no_more_bytes_is_an_oserror_and_leaves_nothing(name, tmp_path):
    flashpack.pack_to_file({"a": torch.ones(1 << 20)}, tmp_path / "a.flashpack")
    done = subprocess.run(
        [sys.executable, "-c", FULL, tmp_path / "a.flashpack", tmp_path / name],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == f"27 [Errno 27] File too large: '{tmp_path / name}'\n", done
    assert os.listdir(tmp_path) == ["a.flashpack"]


@pytest.mark.parametrize(("suffix", "titles"), [("safetensors", {"Writing"}), ("pt", {"Verifying", "Writing"})])
def test_reverting_shows_the_writing_and_what_comes_before_it(suffix, titles, pack, tmp_path, monkeypatch, capsys):
    source = pack({"a": torch.ones(1 << 18)})
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    commands.revert_from_flashpack(source, tmp_path / f"a.{suffix}", silent=False)
    shown = capsys.readouterr().err
    assert set(re.findall(r"(\w+): 100%", shown)) == titles
