"""Names in files and of files may be anything; what is raised because of them is text that drives no terminal."""

from __future__ import annotations

import flashpack
import pytest
import torch
from flashpack import commands
from flashpack.deserialization import iterate_from_flash_tensor, read_flashpack_file

# A colour, a line of its own, a title by an 8-bit control character, and text from right to left.
BAD = "a\x1b[31mb\nc\x9b\u202e"


def model(tensor: torch.Tensor, is_parameter: bool = True) -> torch.nn.Module:
    made = torch.nn.Module()
    if is_parameter:
        made._parameters[BAD] = torch.nn.Parameter(tensor)
    else:
        made._buffers[BAD] = tensor
    return made


class Special(torch.Tensor):
    def add(self, *args):
        return NotImplemented


def damaged(path):
    raw = bytearray(path.read_bytes())
    raw[0] ^= 1
    path.write_bytes(raw)
    return path


def read_misaligned(path):
    storage, metadata = read_flashpack_file(path)
    metadata["index"][0]["offset"] = 1
    list(iterate_from_flash_tensor(storage, metadata))


def convert_nested(path):
    nested = path.with_name("nested.pt")
    torch.save({BAD: {"weight": torch.ones(1)}}, nested)
    commands.convert_to_flashpack(nested)


CAUSES = {
    "missing": lambda path: flashpack.assign_from_file(torch.nn.Linear(1, 1), path),
    "shape": lambda path: flashpack.assign_from_file(model(torch.ones(2)), path),
    "dtype": lambda path: flashpack.assign_from_file(model(torch.ones(3, dtype=torch.half), False), path),
    "class": lambda path: flashpack.assign_from_file(model(torch.ones(3).as_subclass(Special), False), path),
    "lossy": lambda path: flashpack.assign_from_file(
        model(torch.ones(3, dtype=torch.int8), False), path, coerce_dtype=True
    ),
    "absent": lambda path: flashpack.load_file(path, names=[BAD + "x"]),
    "no such name": lambda path: flashpack.open_file(path).get(BAD + "x"),
    "damaged": lambda path: flashpack.load_file(damaged(path)),
    "misaligned": read_misaligned,
    "sparse": lambda path: flashpack.pack_to_file({BAD: torch.ones(1).to_sparse()}, path),
    "nested": convert_nested,
    "name of no file": lambda path: flashpack.load_file(path.with_name(BAD)),
    "name of no valid file": lambda path: flashpack.load_file(path.with_name(path.name + BAD)),
    "name of a directory to write": lambda path: flashpack.pack_to_file(
        {"a": torch.ones(1)}, path.with_name("dir" + BAD)
    ),
    "name of a directory": lambda path: commands.convert_to_flashpack(path.with_name("dir" + BAD)),
}


@pytest.mark.parametrize("cause", CAUSES.values(), ids=CAUSES)
def test_nothing_in_a_message_drives_a_terminal(cause, tmp_path):
    path = tmp_path / "file.flashpack"
    flashpack.pack_to_file({BAD: torch.full((3,), 1.5)}, path)
    (tmp_path / f"file.flashpack{BAD}").write_bytes(b"no such file")
    (tmp_path / f"dir{BAD}").mkdir()
    with pytest.raises((ValueError, OSError, KeyError)) as caught:
        cause(path)
    assert str(caught.value).isprintable()
    assert "31mb" in str(caught.value) or cause is CAUSES["missing"]


def test_errors_about_what_a_checkpoint_has_name_the_file(tmp_path):
    torch.save({"state_dict": {"weight": torch.ones(1)}, "epoch": 3}, tmp_path / "nested.pt")
    with pytest.raises(flashpack.FlashPackError, match=r"nested\.pt: cannot pack 'state_dict': it is a dict"):
        commands.convert_to_flashpack(tmp_path / "nested.pt")
    (tmp_path / "model").mkdir()
    torch.save({"weight": torch.ones(1), "epoch": 3}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(flashpack.FlashPackError, match=r"pytorch_model\.bin: cannot pack 'epoch': it is a int"):
        commands.convert_to_flashpack(tmp_path / "model")
    assert commands.convert_to_flashpack(tmp_path / "model", ignore_names=["epoch"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, None])
def test_what_is_no_tensor_is_told_whatever_dtype_is_asked_for(dtype, tmp_path):
    with pytest.raises(flashpack.FlashPackError, match="cannot pack 'a': it is a int, not a tensor"):
        flashpack.pack_to_file({"a": 1}, tmp_path / "x", dtype)
