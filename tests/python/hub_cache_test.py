"""Saving into the cache of the Hub, where files are links to blobs that several revisions share."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import flashpack
import pytest
import safetensors.torch
import torch
from flashpack._links import is_blob_link
from flashpack.commands import convert_to_flashpack, revert_from_flashpack
from hub_cache import COMMIT, make_hub_cache

OLD = b"what a repository has"


@pytest.fixture
def cached(tmp_path):
    """Makes a snapshot with the files of these names. Its blobs are what they were in the end."""
    blobs = {}

    def make(*names, content=OLD):
        cache = make_hub_cache(tmp_path / "hub", dict.fromkeys(names, content))
        blobs.update({blob: blob.read_bytes() for blob in (cache / "models--x--y" / "blobs").iterdir()})
        return cache / "models--x--y" / "snapshots" / COMMIT

    yield make
    assert blobs
    assert {blob: blob.read_bytes() for blob in next(iter(blobs)).parent.iterdir()} == blobs


def pack(path):
    flashpack.pack_to_file({"w": torch.ones(3)}, path)


def packed(path):
    return flashpack.load_file(path)["w"].tolist() == [1.0] * 3


def test_a_link_to_a_blob_is_replaced_and_the_blob_is_not(cached):
    path = cached("model.flashpack") / "model.flashpack"
    pack(path)
    assert packed(path)
    assert not path.is_symlink()
    assert os.listdir(path.parent) == ["model.flashpack"]


def test_a_link_to_a_link_to_a_blob_is_replaced_and_the_cache_is_not(cached, tmp_path):
    cached_link = cached("model.flashpack") / "model.flashpack"
    path = tmp_path / "mine.flashpack"
    path.symlink_to(cached_link)
    pack(path)
    assert not path.is_symlink()
    assert cached_link.read_bytes() == OLD


def test_a_blob_is_known_where_blobs_is_a_link_to_a_larger_disk(cached, tmp_path):
    path = cached("model.flashpack") / "model.flashpack"
    blobs = tmp_path / "hub" / "models--x--y" / "blobs"
    blobs.rename(tmp_path / "store")
    blobs.symlink_to(tmp_path / "store")
    pack(path)
    assert packed(path)
    assert not path.is_symlink()


def test_a_snapshot_is_known_by_whatever_name_its_directory_is_reached(cached, tmp_path, monkeypatch):
    snapshot = cached("a.flashpack", "b.flashpack")
    (tmp_path / "latest").symlink_to(snapshot)
    pack(tmp_path / "latest" / "a.flashpack")
    monkeypatch.chdir(snapshot)
    pack("b.flashpack")
    assert packed(snapshot / "a.flashpack")
    assert packed(snapshot / "b.flashpack")


def test_a_blob_is_known_where_the_system_takes_a_link(cached, tmp_path):
    snapshot = cached("model.flashpack")
    (tmp_path / "other" / "deep").mkdir(parents=True)
    (tmp_path / "other" / "step").symlink_to(snapshot / "model.flashpack")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "link").symlink_to(tmp_path / "other" / "deep")
    path = tmp_path / "work" / "mine.flashpack"
    path.symlink_to("link/../step")
    assert is_blob_link(path)


def test_a_link_whose_blob_is_gone_is_replaced(cached):
    snapshot = cached("other")
    (snapshot / "model.flashpack").symlink_to("../../blobs/absent")
    pack(snapshot / "model.flashpack")
    assert not (snapshot / "model.flashpack").is_symlink()


def test_a_blob_that_repositories_share_is_a_blob(tmp_path):
    name = hashlib.sha256(OLD).hexdigest()
    shared = tmp_path / "blobs" / name[:2] / name
    shared.parent.mkdir(parents=True)
    shared.write_bytes(OLD)
    path = tmp_path / "model.flashpack"
    path.symlink_to(shared)
    pack(path)
    assert shared.read_bytes() == OLD
    assert packed(path)


def test_other_links_are_followed(tmp_path):
    for name in "blobs", "snapshots":
        (tmp_path / "models" / name).mkdir(parents=True)
    target = tmp_path / "models" / "model.flashpack"
    path = tmp_path / "latest.flashpack"
    path.symlink_to(target)
    pack(path)
    assert path.is_symlink()
    assert packed(target)
    assert not is_blob_link(path)
    assert not is_blob_link(target)
    assert not is_blob_link(tmp_path / "absent")


def test_a_circle_of_links_is_no_blob(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert not is_blob_link(tmp_path / "a")


def test_converting_and_reverting_replace_links_to_blobs(cached, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    safetensors.torch.save_file({"w": torch.ones(3)}, source / "model.safetensors")
    (source / "config.json").write_text("{}")
    snapshot = cached("file.flashpack", "model.flashpack", "config.json", "back.safetensors")
    convert_to_flashpack(source / "model.safetensors", snapshot / "file.flashpack")
    convert_to_flashpack(source, snapshot, force=True)
    revert_from_flashpack(snapshot / "model.flashpack", snapshot / "back.safetensors")
    assert packed(snapshot / "file.flashpack")
    assert packed(snapshot / "model.flashpack")
    assert (snapshot / "config.json").read_text() == "{}"
    assert safetensors.torch.load_file(snapshot / "back.safetensors")["w"].tolist() == [1.0] * 3


def is_free_of_links(directory: Path):
    return not any(path.is_symlink() for path in directory.rglob("*"))


def test_a_saved_transformers_model_replaces_links_to_blobs(cached):
    pytest.importorskip("transformers")
    from transformers_models import assert_same_model, load, make, save

    snapshot = cached("model.flashpack", "config.json", "generation_config.json")
    model = make("llama")
    save(model, snapshot)
    assert is_free_of_links(snapshot)
    assert_same_model(load(type(model), snapshot), model)


def test_a_saved_pipeline_replaces_links_to_blobs(cached):
    pytest.importorskip("diffusers")
    from diffusers_models import image, make_pipeline, plain_text_encoder

    pipeline = make_pipeline(text_encoder=plain_text_encoder)
    snapshot = cached(
        *("model_index.json", "unet/config.json", "unet/model.flashpack", "scheduler/scheduler_config.json"),
        *("text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/vocab.json"),
    )
    (snapshot / "scheduler" / "gone.json").symlink_to("../../../blobs/absent")
    pipeline.save_pretrained_flashpack(snapshot)
    assert is_free_of_links(snapshot)
    loaded = type(pipeline).from_pretrained_flashpack(snapshot)
    assert (image(loaded) == image(pipeline)).all()
