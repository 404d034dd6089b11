import os
import sys

import peers
import pytest


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "FOLDER", tmp_path / "peers")
    return tmp_path / "peers"


def answer_with(monkeypatch, tmp_path, script):
    """Makes a program that is run in place of Python."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


def test_a_release_that_is_there_is_not_taken_again(folder, monkeypatch, tmp_path):
    answer_with(monkeypatch, tmp_path, "exit 1")
    (folder / "safetensors-0.8.0").mkdir(parents=True)
    assert peers.install("safetensors==0.8.0") is None


def test_a_release_is_taken_into_a_folder_of_its_own(folder, monkeypatch, tmp_path):
    answer_with(monkeypatch, tmp_path, 'while [ "$1" != --target ]; do shift; done; mkdir "$2"; echo "$3" >"$2/taken"')
    assert peers.install("safetensors==0.8.0") is None
    assert (folder / "safetensors-0.8.0" / "taken").read_text() == "safetensors==0.8.0\n"


def test_a_release_that_another_bench_has_taken_meanwhile_is_left_as_it_is(folder, monkeypatch, tmp_path):
    theirs = folder / "safetensors-0.8.0"
    script = 'while [ "$1" != --target ]; do shift; done; mkdir "$2"; echo ours >"$2/taken"'
    answer_with(monkeypatch, tmp_path, f"{script}; mkdir {theirs}; echo theirs >{theirs}/taken")
    assert peers.install("safetensors==0.8.0") is None
    assert (theirs / "taken").read_text() == "theirs\n"
    assert list(folder.iterdir()) == [theirs]


def test_a_release_that_cannot_be_had_says_why_and_leaves_no_folder(folder, monkeypatch, tmp_path):
    answer_with(monkeypatch, tmp_path, 'echo "no network" >&2; exit 1')
    assert peers.install("safetensors==0.8.0") == "cannot be installed: no network"
    assert not peers.folder_of("safetensors==0.8.0").exists()
    answer_with(monkeypatch, tmp_path, "exit 1")
    assert "cannot be installed" in peers.install("safetensors==0.8.0")


def test_a_process_imports_a_release_from_its_folder_and_from_nowhere_else(folder, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    assert peers.environment_with("safetensors==0.8.0")["PYTHONPATH"] == str(folder / "safetensors-0.8.0")
    assert peers.environment_with("") == dict(os.environ)
