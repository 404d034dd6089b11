"""What stands where something is to be written: pack_to_file's rule holds for all that writes."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import flashpack
import pytest
import safetensors.torch
from checkpoints import STATE
from flashpack import FlashPackError, commands
from flashpack.serialization import file_to_replace
from hub_cache import COMMIT, make_hub_cache
from support import assert_bit_equal

Writer = Callable[[Path, Path], None]


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    flashpack.pack_to_file(STATE, tmp_path / "model.flashpack")
    return tmp_path / "model.flashpack"


def pack(source: Path, destination: Path) -> None:
    flashpack.pack_to_file(STATE, destination)


def revert(source: Path, destination: Path) -> None:
    commands.revert_from_flashpack(source, destination)


def convert(source: Path, destination: Path) -> None:
    safetensors.torch.save_file(STATE, source.with_suffix(".safetensors"))
    commands.convert_to_flashpack(source.with_suffix(".safetensors"), destination)


WRITERS = [pack, revert, convert]


def named(stem: str, write: Writer) -> str:
    """A name for what `write` writes; it stands for the format."""
    return stem + (".safetensors" if write is revert else ".flashpack")


@pytest.mark.parametrize("write", WRITERS)
def test_a_fifo_is_not_replaced(packed, tmp_path, write):
    there = tmp_path / named("there", write)
    os.mkfifo(there)
    with pytest.raises(FlashPackError, match=rf"not a regular file.*{there.name}"):
        write(packed, there)
    assert stat.S_ISFIFO(there.stat().st_mode)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices")
@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("through_a_link", [False, True])
def test_a_device_is_not_replaced(packed, tmp_path, write, through_a_link):
    device = destination = tmp_path / "null"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("this sandbox makes no devices")
    if through_a_link:
        destination = tmp_path / "link"
        destination.symlink_to(device)
    with pytest.raises(FlashPackError, match=r"not a regular file.*null"):
        write(packed, destination)
    assert stat.S_ISCHR(device.stat().st_mode)


@pytest.mark.parametrize("write", WRITERS)
def test_a_directory_is_not_replaced(packed, tmp_path, write):
    (tmp_path / "there").mkdir()
    with pytest.raises(IsADirectoryError, match="there"):
        write(packed, tmp_path / "there")


@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize("write", WRITERS)
def test_a_link_is_followed_and_stays(packed, tmp_path, write, is_there):
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "file"
    if is_there:
        target.write_bytes(b"old")
        target.chmod(0o640)
    link = tmp_path / named("link", write)
    link.symlink_to(target)
    write(packed, link)
    assert link.is_symlink()
    assert target.stat().st_size > 100
    assert not is_there or stat.S_IMODE(target.stat().st_mode) == 0o640
    assert os.listdir(tmp_path / "elsewhere") == ["file"]
    # The format is that of the name that was given.
    if write is revert:
        assert_bit_equal(safetensors.torch.load_file(link), STATE)


def test_a_link_to_a_blob_of_the_hub_is_replaced_by_a_reverted_file(packed, tmp_path):
    cache = make_hub_cache(tmp_path / "cache", {"model.safetensors": b"a blob"})
    link = cache / "models--x--y" / "snapshots" / COMMIT / "model.safetensors"
    blob = link.resolve()
    commands.revert_from_flashpack(packed, link)
    assert blob.read_bytes() == b"a blob"
    assert not link.is_symlink()
    assert_bit_equal(safetensors.torch.load_file(link), STATE)


def test_nothing_of_a_directory_is_moved_where_one_file_has_no_place(tmp_path):
    (tmp_path / "model").mkdir()
    safetensors.torch.save_file(STATE, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / "tokenizer.json")
    with pytest.raises(FlashPackError, match=r"not a regular file.*tokenizer\.json"):
        commands.convert_to_flashpack(tmp_path / "model", tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["tokenizer.json"]
    assert stat.S_ISFIFO((tmp_path / "out" / "tokenizer.json").stat().st_mode)


def test_a_default_destination_that_is_a_link_to_nothing_is_there_already(packed, tmp_path):
    packed.with_suffix(".safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FlashPackError, match=r"model\.safetensors exists already"):
        commands.revert_from_flashpack(packed)
    assert not (tmp_path / "elsewhere").exists()


def test_models_are_not_saved_into_a_fifo(tmp_path):
    pytest.importorskip("transformers")
    from transformers_models import make, save

    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(FlashPackError, match=r"not a regular file.*config\.json"):
        save(make("bert"), tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("link", ["model.flashpack", "config.json"])
def test_a_link_in_the_destination_that_leads_to_the_source_is_refused(tmp_path, name, link):
    source = tmp_path / "model"
    source.mkdir()
    safetensors.torch.save_file(STATE, source / "model.safetensors")
    (source / "config.json").write_text("{}")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / link).symlink_to(source / name)
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    with pytest.raises(FlashPackError, match="is the source"):
        commands.convert_to_flashpack(source, tmp_path / "out", force=True)
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before


def test_two_links_in_the_destination_to_one_file_are_refused(tmp_path):
    (tmp_path / "model").mkdir()
    safetensors.torch.save_file(STATE, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "out").mkdir()
    for link in ("config.json", "model.flashpack"):
        (tmp_path / "out" / link).symlink_to(tmp_path / "one")
    (tmp_path / "one").write_text("old")
    with pytest.raises(FlashPackError, match="several links to one file"):
        commands.convert_to_flashpack(tmp_path / "model", tmp_path / "out", force=True)
    assert (tmp_path / "one").read_text() == "old"


@pytest.fixture
def other_file_system():
    """A directory that no rename reaches from the tests' own."""
    place = tempfile.mkdtemp(dir="/dev/shm")
    yield Path(place)
    shutil.rmtree(place)


def test_a_directory_with_links_to_another_file_system_gets_all_files(tmp_path, other_file_system):
    model = write_model(tmp_path)
    if os.stat(other_file_system).st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("there is one file system")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.flashpack").symlink_to(other_file_system / "model.flashpack")
    commands.convert_to_flashpack(model, tmp_path / "out")
    assert (tmp_path / "out" / "model.flashpack").is_symlink()
    assert os.listdir(other_file_system) == ["model.flashpack"]
    assert_bit_equal(flashpack.load_file(tmp_path / "out" / "model.flashpack"), STATE)
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.flashpack"]


def test_nothing_is_moved_if_one_file_cannot_get_to_its_file_system(tmp_path, other_file_system, monkeypatch):
    model = write_model(tmp_path)
    if os.stat(other_file_system).st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("there is one file system")
    (tmp_path / "out").mkdir()
    link = tmp_path / "out" / "model.flashpack"
    link.symlink_to(other_file_system / "there.flashpack")
    copyfile = shutil.copyfile

    def full(source, target):
        if Path(target).is_relative_to(other_file_system):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), target)
        return copyfile(source, target)

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space") as error:
        commands.convert_to_flashpack(model, tmp_path / "out")
    assert error.value.filename == str(other_file_system / "there.flashpack")
    assert os.listdir(tmp_path / "out") == ["model.flashpack"]
    assert os.listdir(other_file_system) == []


@pytest.fixture
def second_fails(monkeypatch):
    """Lets no second file of a directory get to its place."""
    replace, moved = os.replace, []

    def failing(source, target):
        moved.append(Path(target).name)
        if len(moved) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), source)
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)


@pytest.mark.parametrize("old", ["a file", "a link to a blob", "nothing"])
def test_a_directory_is_what_it_was_if_one_of_its_files_cannot_be_moved(tmp_path, second_fails, old):
    model, out = write_model(tmp_path), tmp_path / "out"
    out.mkdir()
    (out / "model.flashpack").write_text("old")
    if old == "a file":
        (out / "config.json").write_text("old")
    elif old == "a link to a blob":
        cache = make_hub_cache(tmp_path / "cache", {"config.json": b"old"})
        (out / "config.json").symlink_to(cache / "models--x--y" / "snapshots" / COMMIT / "config.json")
    before = {path.name: (path.is_symlink(), path.read_text()) for path in out.iterdir()}
    with pytest.raises(OSError, match="No space") as error:
        commands.convert_to_flashpack(model, out, force=True)
    assert error.value.filename == str(out / "model.flashpack")
    assert {path.name: (path.is_symlink(), path.read_text()) for path in out.iterdir()} == before


def test_a_directory_is_what_it_was_after_an_interrupt_that_comes_with_the_end_of_a_move(tmp_path, monkeypatch):
    replace = os.replace

    def interrupted(source, target):
        replace(source, target)
        monkeypatch.undo()
        raise KeyboardInterrupt

    model, out = write_model(tmp_path), tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        commands.convert_to_flashpack(model, out, force=True)
    assert {path.name: path.read_text() for path in out.iterdir()} == {"config.json": "old"}


def test_a_file_that_cannot_be_put_back_is_told(tmp_path, second_fails, monkeypatch, caplog):
    def refused(*_, **__):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    model, out = write_model(tmp_path), tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    monkeypatch.setattr(os, "link", refused)
    with pytest.raises(OSError, match="No space"):
        commands.convert_to_flashpack(model, out, force=True)
    assert f"{out / 'config.json'} cannot be put back" in caplog.text


def write_model(directory: Path) -> Path:
    (directory / "model").mkdir()
    safetensors.torch.save_file(STATE, directory / "model" / "model.safetensors")
    (directory / "model" / "config.json").write_text("{}")
    return directory / "model"


def test_a_directory_that_may_not_be_written_is_named_itself(tmp_path, monkeypatch):
    model = write_model(tmp_path)
    (tmp_path / "out").mkdir()

    def refused(suffix, prefix, dir):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), f"{dir}/{prefix}abcdefgh{suffix}")

    monkeypatch.setattr(tempfile, "mkdtemp", refused)
    with pytest.raises(PermissionError) as error:
        commands.convert_to_flashpack(model, tmp_path / "out")
    assert error.value.filename == str(tmp_path / "out")


def test_an_error_in_a_file_of_a_directory_names_the_file_that_it_becomes(tmp_path, monkeypatch):
    model = write_model(tmp_path)

    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), target)

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space") as error:
        commands.convert_to_flashpack(model, tmp_path / "out")
    assert error.value.filename == str(tmp_path / "out" / "config.json")


@pytest.mark.parametrize("write", WRITERS)
def test_a_name_that_only_a_directory_can_have_is_refused(packed, tmp_path, write):
    destination = f"{tmp_path / named('there', write)}/"
    with pytest.raises(IsADirectoryError, match="there"):
        write(packed, destination)
    assert not os.path.lexists(destination.rstrip("/"))


@pytest.fixture
def through_a_link(tmp_path, monkeypatch) -> Path:
    """A path to the directory `other`, which without its ".." would be one to `work`, the current directory."""
    (tmp_path / "other" / "deep").mkdir(parents=True)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "link").symlink_to(tmp_path / "other" / "deep")
    monkeypatch.chdir(tmp_path / "work")
    return Path("link", "..")


def save_flashpack(source: Path, destination: Path) -> None:
    flashpack.save_file(STATE, destination)


@pytest.mark.parametrize("write", [*WRITERS, save_flashpack])
def test_a_path_leads_where_the_system_takes_it(packed, through_a_link, tmp_path, write):
    unrelated = Path(named("there", write))
    unrelated.write_bytes(b"unrelated")
    write(packed, through_a_link / unrelated)
    assert unrelated.read_bytes() == b"unrelated"
    assert sorted(os.listdir(tmp_path / "other")) == ["deep", unrelated.name]
    assert_bit_equal(flashpack.load_file(through_a_link / unrelated), STATE)


def look(source: Path, destination: Path) -> None:
    file_to_replace(destination)


@pytest.mark.parametrize("write", [*WRITERS, look])
def test_the_file_that_is_looked_at_is_the_one_that_would_be_replaced(packed, through_a_link, tmp_path, write):
    there = Path(named("there", write))
    there.write_bytes(b"unrelated")
    os.mkfifo(tmp_path / "other" / there)
    with pytest.raises(FlashPackError, match="not a regular file"):
        write(packed, through_a_link / there)
    assert stat.S_ISFIFO((tmp_path / "other" / there).stat().st_mode)


def test_a_directory_is_converted_where_the_system_takes_its_path(through_a_link, tmp_path):
    model = write_model(tmp_path / "other")
    (model / "tokenizer.json").symlink_to("config.json")
    commands.convert_to_flashpack(through_a_link / "model", through_a_link / "out")
    assert sorted(os.listdir(tmp_path / "other" / "out")) == ["config.json", "model.flashpack", "tokenizer.json"]
    assert os.listdir() == ["link"]
