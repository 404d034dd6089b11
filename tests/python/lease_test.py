"""Files with a write lease are waited for, as plain open() waits; what may be a FIFO is opened without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import flashpack
import pytest
import safetensors.torch
from checkpoints import STATE
from flashpack import _native, _repository, commands

# Gives the lease back when the kernel says that somebody wants to open the file.
HOLDER = """
import fcntl, os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGIO})
file = os.open(sys.argv[1], os.O_RDWR)
fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("holds it", flush=True)
signal.sigwait({signal.SIGIO})
fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
"""


def convert(path: Path) -> None:
    commands.convert_to_flashpack(path, path.with_name("out.flashpack"))


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("model.flashpack", _native.open_checkpoint),
        ("model.flashpack", flashpack.get_flashpack_file_metadata),
        ("model.flashpack", flashpack.load_file),
        ("config.json", _repository.read_json),
        ("model.safetensors", convert),
    ],
)
def test_a_file_with_a_write_lease_is_waited_for(tmp_path: Path, name: str, read: Callable[[Path], object]):
    flashpack.pack_to_file(STATE, tmp_path / "model.flashpack")
    safetensors.torch.save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({}))
    arguments = [sys.executable, "-c", HOLDER, str(tmp_path / name)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as holder:
        try:
            if holder.stdout.readline() != "holds it\n":
                pytest.skip(f"no leases on this file system: {holder.stderr.read().splitlines()[-1]}")
            read(tmp_path / name)
            assert holder.wait() == 0
        finally:
            holder.kill()


def test_a_file_that_cannot_be_opened_is_named_whatever_its_name(tmp_path: Path):
    for name in ("absent.json", os.fsdecode(b"absent \xff.json")):
        with pytest.raises(FileNotFoundError, match="absent") as caught:
            _repository.open_regular(tmp_path / name)
        assert caught.value.filename == os.fspath(tmp_path / name)
    with pytest.raises(flashpack.FlashPackError, match="NUL"):
        _repository.open_regular(tmp_path / "a\0b")
