"""How the tensors of a flashpack file get into other files."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from flashpack import _reversal, _safetensors, commands
from support import random_tensor

# Small and odd sizes beside each other, so that gaps between what is written together are short.
STATE = {f"{i}.{name}": random_tensor(shape, seed=i) for i in range(20) for name, shape in (("a", (3,)), ("b", (41,)))}
STATE |= {"bytes": random_tensor((7,), torch.uint8), "none": torch.empty(0, 2), "double": random_tensor((5,)).double()}


@pytest.mark.parametrize("batch_bytes", [1, 300, 64 << 20])
def test_a_file_in_any_order_becomes_the_one_that_safetensors_writes(tmp_path, pack, monkeypatch, batch_bytes):
    monkeypatch.setattr(_safetensors, "_BATCH_BYTES", batch_bytes)
    source = pack(STATE, name_order=sorted(STATE, key=lambda name: name[::-1]))
    result = commands.revert_from_flashpack(source, tmp_path / "a.safetensors")
    safetensors.torch.save_file(STATE, tmp_path / "expected.safetensors", {"format": "pt"})
    assert (tmp_path / "expected.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes(), result


def test_large_tensors_that_neither_begin_nor_end_at_a_block_are_whole(tmp_path, pack):
    state = {f"{i}": torch.arange(3_000_000 + i, dtype=torch.int32) for i in range(3)} | {"small": torch.ones(5)}
    commands.revert_from_flashpack(pack(state, name_order=["2", "small", "0", "1"]), tmp_path / "a.safetensors")
    reverted = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert reverted.keys() == state.keys()
    assert all(torch.equal(reverted[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_an_error_in_reading_names_the_source(tmp_path, pack, monkeypatch, name):
    source = pack(STATE)

    def failing(*args, **options):
        raise OSError(errno.EIO, "cannot read", str(source))

    monkeypatch.setattr(_reversal, "stream_tensors", failing)
    with pytest.raises(OSError, match="cannot read") as error:
        commands.revert_from_flashpack(source, tmp_path / name)
    assert error.value.filename == str(source)


PEAK = """
import sys, torch
import flashpack.commands


def memory_bytes(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def anonymous_bytes():
    return memory_bytes("RssAnon") + memory_bytes("RssShmem")


source, destination = sys.argv[1:]
taken = []
begin = anonymous_bytes()
if destination.endswith(".pt"):
    save = torch.save
    torch.save = lambda *args: (save(*args), taken.append(anonymous_bytes() - begin))
else:
    begin = memory_bytes("VmRSS")
flashpack.commands.revert_from_flashpack(source, destination)
print(*taken or [memory_bytes("VmHWM") - begin])
"""


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_a_file_need_not_fit_into_memory(tmp_path, pack, name):
    tensors = {str(i): torch.full((16 << 20,), i, dtype=torch.uint8) for i in range(24)}
    source = pack(tensors)
    ran = subprocess.run(
        [sys.executable, "-c", PEAK, os.fspath(source), os.fspath(tmp_path / name)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert int(ran.stdout) < sum(tensor.nbytes for tensor in tensors.values()) - (64 << 20)
