"""Bars: what they show, and when they are full."""

from __future__ import annotations

import functools
import re
import subprocess
import sys

import flashpack
import pytest
import torch
from flashpack import _native
from flashpack._progress import progress_bar
from tqdm import tqdm


def pretend_a_terminal(monkeypatch):
    """To be called by the test itself, because a fixture has another standard error."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    # Each step is shown, however soon it comes after the last one.
    monkeypatch.setattr("flashpack._progress.tqdm", functools.partial(tqdm, mininterval=0, miniters=0))


def percentages(text):
    return [int(number) for number in re.findall(r"(\d+)%", text)]


def test_a_bar_is_full_when_its_block_has_ended_well(monkeypatch, capsys):
    pretend_a_terminal(monkeypatch)
    with progress_bar("Moving", 1000, True) as progress:
        progress(1000)
        assert max(percentages(capsys.readouterr().err)) < 100
    assert percentages(capsys.readouterr().err)[-1] == 100
    with pytest.raises(RuntimeError), progress_bar("Moving", 1000, True) as progress:
        progress(1000)
        raise RuntimeError
    assert max(percentages(capsys.readouterr().err)) < 100


def test_a_save_is_shown_as_done_when_the_file_is_in_its_place(tmp_path, monkeypatch, capsys):
    pretend_a_terminal(monkeypatch)
    path = tmp_path / "a.flashpack"
    shown = []

    class Watched:
        def __init__(self, *args):
            self._writer = _native.Writer(*args)

        def __getattr__(self, name):
            return getattr(self._writer, name)

        def commit(self, tail):
            shown.extend(percentages(capsys.readouterr().err))
            self._writer.commit(tail)

    monkeypatch.setattr("flashpack.serialization._native", _Replaced(Writer=Watched))
    flashpack.pack_to_file({"a": torch.ones(1 << 20)}, path, silent=False)
    assert shown
    assert max(shown) < 100
    assert percentages(capsys.readouterr().err)[-1] == 100


class _Replaced:
    def __init__(self, **names):
        vars(self).update(names)

    def __getattr__(self, name):
        return getattr(_native, name)


NOTEBOOK = """
import sys, types
shell = types.SimpleNamespace(config={"IPKernelApp": {}})
sys.modules["IPython"] = types.SimpleNamespace(get_ipython=lambda: shell)
import flashpack, torch
flashpack.pack_to_file({"a": torch.ones(4)}, sys.argv[1], silent=False)
"""


def test_a_notebook_shows_a_bar_though_it_is_no_terminal(tmp_path):
    shown = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", NOTEBOOK, tmp_path / "a"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Writing: 100%" in shown.stderr
    plain = NOTEBOOK.replace("IPKernelApp", "TerminalIPythonApp")
    shown = subprocess.run([sys.executable, "-c", plain, tmp_path / "a"], capture_output=True, text=True, timeout=120)
    assert (shown.returncode, shown.stderr) == (0, "")
