"""Which files `flashpack convert` takes, and how it refuses the others."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import flashpack
import pytest
import torch
from flashpack import FlashPackError, commands
from support import assert_bit_equal


def test_a_header_that_names_a_tensor_twice_is_refused(tmp_path):
    first, second = (f'"a":{json.dumps({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})}' for _ in range(2))
    header = f"{{{first},{second}}}".encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(FlashPackError) as refusal, flashpack.open_file(path):
        pass
    with pytest.raises(FlashPackError) as error:
        commands.convert_to_flashpack(path)
    assert str(error.value) == str(refusal.value)
    assert not (tmp_path / "a.flashpack").exists()


def test_a_lack_of_memory_is_not_told_as_a_damaged_file(tmp_path, monkeypatch):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")

    def full(*args, **options):
        raise MemoryError

    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(MemoryError):
        commands.convert_to_flashpack(tmp_path / "a.pt")


@pytest.mark.parametrize("is_mapped", [True, False], ids=["archive", "before 1.6"])
def test_a_name_that_is_no_text_is_that_of_a_file_like_others(tmp_path, is_mapped):
    path = tmp_path / os.fsdecode(b"m\xff.pt")
    with open(path, "wb") as file:
        torch.save({"a": torch.arange(4.0)}, file, _use_new_zipfile_serialization=is_mapped)
    written = commands.convert_to_flashpack(path)
    assert Path(written) == path.with_suffix(".flashpack")
    assert_bit_equal(flashpack.load_file(written), {"a": torch.arange(4.0)})


def test_a_name_is_that_of_the_file_in_a_locale_without_its_letters_too(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "mé.pt")
    code = "import sys; from flashpack import commands; commands.convert_to_flashpack(sys.argv[1])"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", code, tmp_path / "mé.pt"]
    ran = subprocess.run(command, env=environment, stderr=subprocess.PIPE, check=False)
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert_bit_equal(flashpack.load_file(tmp_path / "mé.flashpack"), {"a": torch.ones(2)})


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="this torch has no such dtype")
def test_transposed_values_of_four_bits_are_packed_whatever_their_size(tmp_path):
    raw = torch.arange(80 * 100, dtype=torch.int32).to(torch.uint8).view(80, 100)
    tensor = raw.view(torch.float4_e2m1fn_x2).t()
    flashpack.pack_to_file({"a": tensor}, tmp_path / "a.flashpack")
    assert_bit_equal(
        {"a": flashpack.load_file(tmp_path / "a.flashpack")["a"].view(torch.uint8)}, {"a": raw.t().contiguous()}
    )
