from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios

import click
import flashpack
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from flashpack.__main__ import main
from support import assert_bit_equal, random_tensor, write_file

STATE = {"weight": random_tensor((300, 7), seed=1), "bias": random_tensor((7,), seed=2)}
MIXED = {"w": random_tensor((300, 20)), "b": random_tensor((7,)), "h": random_tensor((9,), torch.bfloat16)}


def run(*arguments):
    return CliRunner().invoke(main, [os.fspath(argument) for argument in arguments])


def command(*arguments):
    return [sys.executable, "-m", "flashpack", *map(os.fspath, arguments)]


def run_process(*arguments, **options):
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120, **options)


@pytest.fixture
def source(tmp_path):
    safetensors.torch.save_file(STATE, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_metadata_of_one_dtype_reads_as_in_the_reference(pack):
    path = pack(STATE)
    lines = ["format: flashpack_v3", "target_dtype: float32", "align_bytes: 128", "total_elems: 2119"]
    lines += ["checksums: crc32c", "size: 2 tensors, 8.43 kB"]
    index = ["index:", "  0: 0000:2100 weight [300, 7]", "  1: 2112:2119 bias [7]"]
    assert run("metadata", path).output.splitlines() == lines
    for option in ("-i", "--show-index", "--index"):
        assert run("metadata", path, option).output.splitlines() == lines + index


def test_metadata_of_several_dtypes_reads_as_in_the_reference(pack):
    result = run("metadata", pack(MIXED), "-i")
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        "format: flashpack_v4",
        "align_bytes: 128",
        "total_payload_bytes: 24210",
        "total_elems: 6032",
        "checksums: crc32c",
        "size: 3 tensors, 24.0 kB",
        "macroblocks:",
        "  0: float32    00000:24092",
        "  1: bfloat16   24192:24210",
        "index:",
        "  macroblock0: float32    00000:06000",
        "  0: 00000:06000 w [300, 20]",
        "  1: 06016:06023 b [7]",
        "  macroblock1: bfloat16   00000:00009",
        "  2: 00000:00009 h [9]",
    ]


@pytest.mark.parametrize("source", [STATE, MIXED], ids=["v3", "v4"])
def test_metadata_for_programs_is_the_footer(pack, source):
    path = pack(source)
    footer = {**flashpack.get_flashpack_file_metadata(path), "checksums": "crc32c"}
    assert json.loads(run("metadata", path, "--json", "--show-index").output) == footer
    del footer["index"]
    assert json.loads(run("metadata", path, "-j").output) == footer


def test_metadata_says_that_a_file_has_no_checksums(pack):
    assert "checksums: none" in run("metadata", pack(STATE, checksum=False)).output.splitlines()


@pytest.mark.parametrize("name", ["metadata", "verify", "revert"])
def test_of_a_model_directory_the_flashpack_file_is_meant(tmp_path, name):
    result = run(name, tmp_path)
    assert result.exit_code == 1
    assert "has no flashpack or safetensors file" in result.stderr
    flashpack.pack_to_file(STATE, tmp_path / "model.flashpack")
    assert run(name, tmp_path).exit_code == 0


def test_names_cannot_drive_the_terminal(pack):
    output = run("metadata", pack({"a\x1b[2J\nb\u202e": torch.ones(1), "größe": torch.ones(1)}), "-i").output
    assert "a\\x1b[2J\\nb\\u202e" in output
    assert "größe" in output
    assert "\x1b" not in output


@pytest.mark.parametrize("arguments", [("--version",), ("metadata", "PATH", "-i"), ("metadata", "PATH", "--json")])
def test_metadata_needs_neither_torch_nor_numpy_nor_what_is_built_on_them(pack, arguments):
    arguments = [str(pack(STATE)) if argument == "PATH" else argument for argument in arguments]
    code = f"""
import sys
from flashpack.__main__ import main
main({arguments!r}, standalone_mode=False)
heavy = {{"torch", "numpy", "safetensors", "transformers", "diffusers", "accelerate", "huggingface_hub"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_what_a_safetensors_file_has_is_shown(source):
    shown = run("metadata", source, "--index").output
    assert "format: safetensors\n" in shown
    assert all(name in shown for name in STATE)
    assert {record["name"] for record in json.loads(run("metadata", source, "-i", "--json").output)["index"]} == set(
        STATE
    )


def test_what_is_no_checkpoint_is_told_in_a_line(tmp_path, source):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(source.read_bytes()[:-1])
    for name, path, message in (
        ("metadata", broken, "broken.safetensors"),
        ("verify", source, "has no checksums"),
        ("revert", source, "is the source"),
    ):
        result = run(name, path)
        assert result.exit_code == 1
        assert result.stdout == ""
        assert re.fullmatch(rf"Error: .*{message}.*\n", result.stderr)
        assert run(name, tmp_path / "missing").exit_code == 2


def test_version_is_told():
    assert run("--version").output == f"flashpack, version {flashpack.__version__}\n"
    process = run_process("--version")
    assert process.stdout == run("--version").output


def test_converting_and_reverting_say_where_the_result_is(source):
    packed = source.with_suffix(".flashpack")
    result = run("convert", source)
    assert (result.exit_code, result.output) == (0, f"Success: Saved to {packed}\n")
    source.unlink()
    result = run("revert", packed)
    assert (result.exit_code, result.output) == (0, f"Success: Saved to {source}\n")
    assert_bit_equal(safetensors.torch.load_file(source), STATE)


def test_default_destinations_are_replaced_by_force_alone_and_named_ones_always(source):
    packed = source.with_suffix(".flashpack")
    packed.write_bytes(b"old")
    result = run("convert", source)
    assert result.exit_code == 1
    assert re.fullmatch(r"Error: .*exists already.*--force.*\n", result.stderr)
    assert packed.read_bytes() == b"old"
    for arguments in ((source, "--force"), (source, packed)):
        packed.write_bytes(b"old")
        assert run("convert", *arguments).exit_code == 0
        assert_bit_equal(flashpack.revert_from_file(packed), STATE)
    before = source.read_bytes()
    assert run("revert", packed).exit_code == 1
    assert source.read_bytes() == before
    assert run("revert", packed, "--force").exit_code == 0
    assert_bit_equal(safetensors.torch.load_file(source), STATE)


def test_force_does_not_make_a_conversion_replace_its_source(pack):
    for name, source in (("revert", pack(STATE).rename), ("convert", None)):
        path = source(pack(STATE).with_name("a.safetensors")) if source else None
        if path is None:
            path = pack(STATE).with_name("a.flashpack")
            torch.save(STATE, path)
        before = path.read_bytes()
        result = run(name, path, "--force")
        assert result.exit_code == 1
        assert "is the source" in result.stderr
        assert path.read_bytes() == before


def test_directories_are_replaced_by_force_too(tmp_path, source):
    assert run("convert", tmp_path).exit_code == 0
    assert run("convert", tmp_path).exit_code == 1
    assert run("convert", tmp_path, "--force").exit_code == 0
    assert run("convert", tmp_path.parent, "--subfolder", tmp_path.name, "--force").output.split()[-1] == str(tmp_path)


def test_options_reach_the_conversion(source):
    result = run("convert", source, "--dtype", "float16", "--ignore-names", "bias")
    assert result.exit_code == 0
    assert_bit_equal(
        flashpack.revert_from_file(source.with_suffix(".flashpack")), {"weight": STATE["weight"].to(torch.float16)}
    )
    result = run(
        "convert", source, "--force", "--ignore-prefixes", "no", "--ignore-suffixes", "as", "--ignore-suffixes", "ht"
    )
    assert (result.exit_code, result.stderr) == (
        1,
        f"Error: {source}: No tensors to pack. A flashpack file has at least one; a safetensors file can be empty\n",
    )
    result = run("convert", source, "--force", "--dtype", "float17")
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: dtype='float17' is neither a torch.dtype nor the name of one, such as 'bfloat16'\n"
    )
    for name in ("bf16", "BF16", "torch.bfloat16"):
        assert run("convert", source, "--force", "--dtype", name).exit_code == 0
        assert flashpack.load_file(source.with_suffix(".flashpack"))["weight"].dtype is torch.bfloat16


def test_a_repository_without_destination_is_an_error(source):
    result = run("convert", "not-a-file/not-a-repo")
    assert result.exit_code == 1
    assert "Error: destination_path is required" in result.stderr


def test_a_traceback_is_shown_on_request_of_errors_that_nobody_has_foreseen(source, monkeypatch):
    for arguments in (("revert", source, "-v"), ("convert", "nowhere", "-v"), ("convert", "a/b.pt", "-v")):
        result = run(*arguments)
        assert result.exit_code == 1
        assert re.fullmatch(r"Error: .*\n", result.stderr)

    def unforeseen(*_, **__):
        raise RuntimeError("a\x1b]0;owned\x07")

    monkeypatch.setattr("flashpack._reversal.revert", unforeseen)
    assert run("revert", source).stderr == "Error: a\\x1b]0;owned\\x07\n"
    result = run("revert", source, "-v")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "\nError: a\\x1b]0;owned" in result.stderr
    assert "\x1b" not in result.stderr


def test_verify_tells_what_is_sound_and_which_tensors_are_not(pack):
    path = pack(MIXED)
    result = run("verify", path)
    assert result.exit_code == 0
    assert re.fullmatch(r"sound: 24210 bytes in \d+\.\d\d s\n", result.output)
    assert json.loads(run("verify", path, "--json").output)["corrupt"] == []
    raw = bytearray(path.read_bytes())
    raw[5] ^= 1
    path.write_bytes(raw)
    result = run("verify", path)
    assert result.exit_code == 1
    assert result.output.splitlines()[0] == 'corrupt: bytes 0+24210, of "w", "b", "h"'
    result = run("verify", path, "-j")
    assert result.exit_code == 1
    assert json.loads(result.output)["corrupt"] == [
        {"offset_bytes": 0, "size_bytes": 24210, "tensors": '"w", "b", "h"'}
    ]


def test_verifying_a_file_without_checksums_is_an_error(pack):
    result = run("verify", pack(STATE, checksum=False))
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")


def test_pipes_get_the_result_and_nothing_else(tmp_path, source):
    result = run_process("convert", source.name, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"Success: Saved to {tmp_path}/model.flashpack\n"
    gap = {"format": "flashpack_v3", "target_dtype": "uint8", "align_bytes": 0, "total_elems": 1, "index": []}
    path = write_file(tmp_path / "gap.flashpack", gap, bytes(64))
    result = run_process("metadata", path)
    assert (result.returncode, result.stderr) == (0, "")


def test_nothing_is_told_in_pipes_by_libraries_that_build_the_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 32, "num_hidden_layers": 1}
    config = transformers.BertConfig(**shape, num_attention_heads=2)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "model")
    result = run_process("convert", tmp_path / "model", tmp_path / "out", "--use-transformers")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"Success: Saved to {tmp_path}/out\n"


def test_a_terminal_gets_progress_on_standard_error(tmp_path, source):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    result = subprocess.run(command("convert", source), stdout=subprocess.PIPE, stderr=theirs, text=True, timeout=120)
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert result.stdout == f"Success: Saved to {tmp_path}/model.flashpack\n"
    assert re.search(r"Writing: 100%.*8\.43k/8\.43k", shown)


def test_a_reader_that_has_seen_enough_is_no_error_to_be_told(pack):
    path = pack({f"{'name' * 20}.{i}": torch.ones(1) for i in range(3000)})
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(
        command("metadata", path, "-i"), stdout=write, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(write)
    assert result.stderr == ""


def test_every_command_teaches_by_examples_that_its_parser_takes():
    group = click.Context(main, info_name="flashpack")
    pages = {"": run("--help").output} | {name: run(name, "--help").output for name in main.commands}
    for name, page in pages.items():
        examples = [line.strip() for line in page.splitlines() if line.startswith("  flashpack ")]
        assert examples, name
        for example in examples:
            words = shlex.split(re.split(r"[|#]|&&", example)[0])
            chosen = main.commands[words[1]]
            assert name in ("", words[1])
            chosen.make_parser(click.Context(chosen, group)).parse_args(words[2:])
    assert "Exit status: 0" in pages[""]
    assert "program flashpack_tune, which is installed with the C++ library" in " ".join(pages["tune"].split())


def on_a_terminal(*arguments):
    """What a command that fails shows there."""
    terminal, child = pty.openpty()
    process = subprocess.Popen(command(*arguments), stdin=child, stdout=child, stderr=child)
    os.close(child)
    output = b""
    with contextlib.suppress(OSError):  # EIO: the other end is closed, and all has been read.
        while chunk := os.read(terminal, 65536):
            output += chunk
    os.close(terminal)
    assert process.wait(timeout=120) == 1
    return output.decode()


def test_no_name_drives_the_terminal_not_in_messages_and_not_in_what_is_logged(tmp_path):
    hostile = "a\x1b]0;owned\x07\x1b[2J\u202e"
    torch.save({hostile: "no tensor"}, tmp_path / f"{hostile}.pt")
    output = "".join(
        on_a_terminal("convert", *options, tmp_path / f"{hostile}.pt", tmp_path / "out.flashpack")
        for options in ([], ["-v"])
    )
    text = re.sub(r"\x1b\[\d*m", "", output)
    assert "cannot pack" in text
    assert "\\x1b]0;owned" in text
    assert not [char for char in text if not char.isprintable() and char not in "\r\n"]


def test_what_is_logged_of_hostile_names_cannot_drive_a_terminal(caplog, capsys):
    from flashpack._logging import PrintableFormatter, logger

    logger.warning("%s of %s", "a\x1b[2J", "line\nforged: line")
    assert caplog.messages == ["a\\x1b[2J of line\\nforged: line"]
    record = logging.LogRecord("other", logging.WARNING, "", 0, "b\x1b%s", ("\x07",), None)
    assert PrintableFormatter("%(name)s: %(message)s").format(record) == "other: b\\x1b\\x07"


@pytest.mark.parametrize("command", ["verify", "revert", "metadata"])
def test_a_command_does_its_work_if_standard_error_is_closed(pack, command):
    ran = subprocess.run(
        ["sh", "-c", '"$0" -m flashpack "$1" "$2" 2>&-', sys.executable, command, os.fspath(pack(STATE))],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert ran.returncode == 0
    assert ran.stdout
