"""Files in the cache of the Hugging Face Hub are held against their names."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading

import flashpack
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from flashpack._checkpoint import File
from flashpack._hub_hashes import Named, hashes_of
from flashpack.cli import main
from hub_cache import COMMIT

SHARDS = {
    "model-00001-of-00002.safetensors": {"a": torch.arange(3 << 20)},
    "model-00002-of-00002.safetensors": {"b": torch.ones(5)},
}
INDEX = {"weight_map": {name: file for file, tensors in SHARDS.items() for name in tensors}}


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def git_sha1(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def snapshot_of(cache, files, hash_of=sha256):
    """Makes a cache of these files, and returns the directory of links to them."""
    snapshot = cache / "models--x--y" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    blobs = cache / "models--x--y" / "blobs"
    blobs.mkdir()
    for name, content in files.items():
        (blobs / hash_of(content)).write_bytes(content)
        (snapshot / name).symlink_to(f"../../blobs/{hash_of(content)}")
    return snapshot


def sharded(cache, hash_of=sha256):
    files = {name: safetensors.torch.save(tensors) for name, tensors in SHARDS.items()}
    return snapshot_of(cache, files | {"model.safetensors.index.json": json.dumps(INDEX).encode()}, hash_of)


def damage(link):
    blob = link.resolve()
    raw = bytearray(blob.read_bytes())
    raw[-1] ^= 1
    blob.write_bytes(raw)


@pytest.mark.parametrize("hash_of", [sha256, git_sha1])
def test_safetensors_files_in_the_cache_are_held_against_their_names(hash_of, tmp_path):
    snapshot = sharded(tmp_path, hash_of)
    sizes = {name: (snapshot / name).stat().st_size for name in SHARDS}
    report = flashpack.verify_file(snapshot, silent=False)
    assert (report["verified_bytes"], report["corrupt"]) == (sum(sizes.values()), [])
    assert report["seconds"] > 0
    first, second = SHARDS
    damage(snapshot / second)
    report = flashpack.verify_file(snapshot)
    assert report["verified_bytes"] == sizes[first]
    ((offset, size, text),) = report["corrupt"]
    assert (offset, size) == (0, sizes[second])
    blob = (snapshot / second).resolve()
    assert text.startswith(f"{snapshot / second}: ")
    assert blob.name in text
    assert hash_of(blob.read_bytes()) in text


def test_a_blob_may_be_given_by_its_own_path_or_by_a_blobs_directory_that_is_a_link(tmp_path):
    snapshot = sharded(tmp_path)
    name = next(iter(SHARDS))
    assert flashpack.verify_file((snapshot / name).resolve())["corrupt"] == []
    blobs = tmp_path / "models--x--y" / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    assert flashpack.verify_file(snapshot)["corrupt"] == []


def test_a_flashpack_file_in_the_cache_is_held_against_its_checksums_or_else_its_name(pack, tmp_path):
    for number, checksum in enumerate((True, False)):
        content = pack({"a": torch.ones(1000)}, checksum=checksum).read_bytes()
        path = snapshot_of(tmp_path / str(number), {"model.flashpack": content}) / "model.flashpack"
        assert flashpack.verify_file(path)["verified_bytes"] == (4000 if checksum else len(content))
        raw = bytearray(content)
        raw[0] ^= 1
        path.resolve().write_bytes(raw)
        ((_, size, _),) = flashpack.verify_file(path)["corrupt"]
        assert size == (4000 if checksum else len(content))


def test_a_file_that_merely_has_the_name_of_a_hash_is_an_error(tmp_path):
    content = safetensors.torch.save({"a": torch.ones(1)})
    path = tmp_path / sha256(content)
    path.write_bytes(content)
    with pytest.raises(flashpack.FlashPackError, match="no checksums"):
        flashpack.verify_file(path)


def test_a_file_that_changes_while_it_is_hashed_is_an_error(tmp_path, monkeypatch):
    snapshot = sharded(tmp_path)
    path = snapshot / next(iter(SHARDS))
    real = os.preadv

    def changing(*arguments):
        os.truncate(path.resolve(), 1000)
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", changing)
    with pytest.raises(OSError, match="changed") as caught:
        flashpack.verify_file(path)
    assert caught.value.filename == str(path)


def test_a_chunk_is_read_while_the_one_before_it_is_hashed(tmp_path, monkeypatch):
    path = sharded(tmp_path) / next(iter(SHARDS))
    real_read, real_new = os.preadv, hashlib.new
    second_read = threading.Event()

    def reading(fd, buffers, offset):
        if offset > 0:
            second_read.set()
        return real_read(fd, buffers, offset)

    class Hashing:
        def __init__(self, *arguments, **options):
            self.digest = real_new(*arguments, **options)
            self.hexdigest = self.digest.hexdigest

        def update(self, chunk):
            assert second_read.wait(60)
            self.digest.update(chunk)

    monkeypatch.setattr(os, "preadv", reading)
    monkeypatch.setattr(hashlib, "new", Hashing)
    assert flashpack.verify_file(path)["corrupt"] == []


def test_the_command_names_the_file_that_does_not_match(tmp_path):
    snapshot = sharded(tmp_path)
    assert CliRunner().invoke(main, ["verify", str(snapshot)]).output.startswith("sound: ")
    name = next(iter(SHARDS))
    damage(snapshot / name)
    result = CliRunner().invoke(main, ["verify", str(snapshot)])
    assert result.exit_code == 1
    assert name in result.output.splitlines()[0]


def test_what_the_disk_cannot_read_is_told_with_its_name(tmp_path, monkeypatch):
    def failing(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with open(os.devnull, "rb") as opened:
        file = File(tmp_path / "blob", opened.fileno(), (0, 0, 1, 0), "safetensors", False, 0)
        monkeypatch.setattr(os, "preadv", failing)
        with pytest.raises(OSError, match="Input/output") as error:
            hashes_of([Named(file, "0" * 64)], None)
    assert error.value.filename == str(tmp_path / "blob")
