"""Temporary directories of conversions, and how they go away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import types

import pytest
from checkpoints import STATE
from flashpack import _temporary, cli, commands
from flashpack._temporary import temporary_directory


def names_in(directory):
    """Returns all names, those that begin with a dot included."""
    return sorted(os.listdir(directory))


def test_what_a_killed_process_has_left_is_removed_and_what_another_one_uses_stays(tmp_path):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        with temporary_directory(tmp_path) as path:
            (path / "part").write_bytes(b"a part")
            os.write(writer, b".")
            signal.pause()
    try:
        os.read(reader, 1)
        [used] = tmp_path.iterdir()
        with temporary_directory(tmp_path) as path:
            assert {used, path} == set(tmp_path.iterdir())
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert names_in(used) == ["part"]
    with temporary_directory(tmp_path) as path:
        assert names_in(tmp_path) == [path.name]
    assert names_in(tmp_path) == []


def test_what_has_another_name_or_is_no_directory_stays(tmp_path):
    for name in (".flashpack_mine", ".flashpack_settings", ".flashpack_conversion_settings", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / ".flashpack_conversion_abcdefgh.tmp").symlink_to("elsewhere")
    (tmp_path / ".flashpack_conversion_ijklmnop.tmp").write_bytes(b"a file")
    with temporary_directory(tmp_path):
        pass
    assert len(names_in(tmp_path)) == 6


@pytest.mark.parametrize("step", ["_opened", "_lock"])
def test_a_directory_that_is_removed_before_it_is_locked_is_made_again(tmp_path, monkeypatch, step):
    removed = []

    def robbed(argument):
        if not removed:
            [path] = tmp_path.iterdir()
            path.rmdir()
            removed.append(path)
        return own(argument)

    own = getattr(_temporary, step)
    monkeypatch.setattr(_temporary, step, robbed)
    with temporary_directory(tmp_path) as path:
        assert removed
        assert path.is_dir()


def test_a_second_signal_does_not_end_the_removal_but_a_later_one_ends_a_command_that_lost_the_first(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(cli, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    with cli._ended_by_signals():
        with pytest.raises(SystemExit):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        now[0] = 6.0
        with pytest.raises(SystemExit) as ended:
            signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# A signal comes in the middle of the command's work.
SIGNALLED = """
import os, signal, sys
import flashpack._reversal as reversal
from flashpack.__main__ import main

path, number, action = sys.argv[1], int(sys.argv[2]), sys.argv[3]
signal.signal(number, getattr(signal, action))
write = reversal._write


def signalled(*arguments):
    write(*arguments)
    os.kill(os.getpid(), number)
    assert action == "SIG_IGN", "the signal was not noticed"


reversal._write = signalled
main(["revert", path])
"""


def revert_with_signal(path, number, action):
    command = [sys.executable, "-c", SIGNALLED, os.fspath(path), str(int(number)), action]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_a_signal_ends_removes_what_it_has_written(tmp_path, pack, number):
    ran = revert_with_signal(pack(STATE), number, "SIG_DFL")
    assert ran.returncode == 128 + number, ran.stderr
    assert names_in(tmp_path) == ["0.flashpack"]


def test_a_signal_that_is_ignored_does_not_end_a_command(tmp_path, pack):
    ran = revert_with_signal(pack(STATE), signal.SIGHUP, "SIG_IGN")
    assert ran.returncode == 0, ran.stderr
    assert names_in(tmp_path) == ["0.flashpack", "0.safetensors"]


def test_a_conversion_removes_what_an_earlier_one_has_left(tmp_path, pack):
    left = tmp_path / ".flashpack_conversion_abcd_012.tmp"
    left.mkdir()
    (left / "part").write_bytes(b"a part")
    commands.revert_from_flashpack(pack(STATE))
    assert names_in(tmp_path) == ["0.flashpack", "0.safetensors"]
