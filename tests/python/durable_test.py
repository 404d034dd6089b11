"""What a save has made is durable when it returns: files, and the names of new directories, too."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import flashpack
import pytest
import safetensors.torch
from checkpoints import STATE
from flashpack import _durable, commands

Lost = Callable[[], list[str]]


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> Lost:
    """Tells what a crash would take: what got a name, or was moved, in Python, and no fsync of it."""
    unsynced: set[Path] = set()
    synced: set[Path] = set()
    mkdir, replace, fsync = os.mkdir, os.replace, os.fsync

    def watched_mkdir(path, *args, **options):
        mkdir(path, *args, **options)
        unsynced.add(Path(path).resolve())

    def watched_replace(source, target):
        assert Path(source).resolve() in synced, f"{target} has a name before its bytes are durable"
        replace(source, target)
        unsynced.add(Path(target).resolve())

    def watched_fsync(descriptor):
        fsync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.add(path)
        unsynced.difference_update({name for name in unsynced if name.parent == path})

    monkeypatch.setattr(os, "mkdir", watched_mkdir)
    monkeypatch.setattr(os, "replace", watched_replace)
    monkeypatch.setattr(os, "fsync", watched_fsync)
    return lambda: sorted(str(path) for path in unsynced if path.exists())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    safetensors.torch.save_file(STATE, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tools.jinja").write_text("")
    return directory


def test_the_directories_of_a_new_file_are_durable(tmp_path, lost):
    flashpack.pack_to_file(STATE, tmp_path / "a" / "b" / "c.flashpack")
    assert lost() == []


def test_the_directories_of_a_relative_path_are_durable(tmp_path, lost, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _durable.make_directories("a")
    _durable.make_directories("b/../c/d/")
    assert (tmp_path / "a").is_dir()
    assert (tmp_path / "c" / "d").is_dir()
    assert lost() == []


def test_what_a_conversion_of_a_directory_makes_is_durable(source, tmp_path, lost):  # `lost` begins after `source`.
    commands.convert_to_flashpack(source, tmp_path / "new" / "out")
    assert (tmp_path / "new" / "out" / "additional_chat_templates" / "tools.jinja").is_file()
    assert lost() == []


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_what_a_reversal_makes_is_durable(tmp_path, lost, suffix):
    flashpack.pack_to_file(STATE, tmp_path / "model.flashpack")
    commands.revert_from_flashpack(tmp_path / "model.flashpack", tmp_path / "new" / "out" / f"model{suffix}")
    assert lost() == []


def test_the_directories_of_a_saved_pipeline_are_durable(tmp_path, lost):
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from diffusers_models import make_pipeline

    pipeline = make_pipeline()
    before = set(lost())
    pipeline.save_pretrained_flashpack(tmp_path / "new" / "pipeline")
    assert {"unet", "tokenizer", "scheduler"} <= {path.name for path in (tmp_path / "new" / "pipeline").iterdir()}
    assert set(lost()) <= before


def test_a_file_where_a_directory_should_be_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="file"):
        _durable.make_directories(tmp_path / "file")
    with pytest.raises(NotADirectoryError, match="file"):
        _durable.make_directories(tmp_path / "file" / "in")


def test_a_failure_to_make_directories_durable_is_an_error_that_names_the_one_above(tmp_path, monkeypatch):
    def failing(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output error") as caught:
        flashpack.pack_to_file(STATE, tmp_path / "a" / "b.flashpack")
    assert caught.value.filename == os.fspath(tmp_path)


def test_a_directory_that_takes_names_but_cannot_be_read_is_made_durable_with_all_else(tmp_path, monkeypatch):
    syncs = []
    monkeypatch.setattr(os, "sync", lambda: syncs.append(True))

    def refusing(path, *args, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, "open", refusing)  # Root may read all.
    _durable.make_directories(tmp_path / "a")
    monkeypatch.undo()
    assert (tmp_path / "a").is_dir()
    assert syncs == [True]
