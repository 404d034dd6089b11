from __future__ import annotations

import inspect
import socket
from pathlib import Path
from types import SimpleNamespace

import flashpack
import pytest

huggingface_hub = pytest.importorskip("huggingface_hub")

from flashpack._hub import Download, Upload, resolve_directory, upload_directory  # noqa: E402
from hub_cache import make_hub_cache  # noqa: E402


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def cache(tmp_path) -> Path:
    files = {"config.json": b"{}", "model.flashpack": b"whole", "part/model.flashpack": b"part"}
    return make_hub_cache(tmp_path / "cache", files, references=("main", "v2"))


def test_a_local_directory_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    (tmp_path / "part").mkdir()
    assert resolve_directory(tmp_path, Download(), ["x"]) == tmp_path
    assert resolve_directory(str(tmp_path), Download(subfolder="part", proxies={}), ["x"]) == tmp_path / "part"


def test_what_was_downloaded_is_found_without_network(cache):
    cached = Download(cache_dir=cache, local_files_only=True)
    assert (resolve_directory("x/y", cached, ["model.flashpack"]) / "model.flashpack").read_text() == "whole"
    part = resolve_directory("x/y", cached._replace(subfolder="part", revision="v2"), ["model.flashpack"])
    assert (part / "model.flashpack").read_text() == "part"
    with pytest.raises(OSError):
        resolve_directory("x/y", cached._replace(revision="v3"), ["model.flashpack"])
    with pytest.raises(OSError):
        resolve_directory("x/z", cached, ["model.flashpack"])


def test_offline_mode_is_respected(cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    directory = resolve_directory("x/y", Download(cache_dir=cache), ["model.flashpack"])
    assert (directory / "model.flashpack").read_text() == "whole"


def test_only_what_is_asked_for_is_downloaded(monkeypatch, tmp_path):
    calls = []

    def snapshot_download(repo_id, **options):
        calls.append((repo_id, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    found = resolve_directory("x/y", Download("a/b/", token="t"), ["*.json", "model.flashpack"])
    assert found == tmp_path / "a" / "b"
    assert resolve_directory("x/y", Download(local_dir="d", revision="r"), ("c",)) == tmp_path
    (first, options), (second, others) = calls
    assert first == second == "x/y"
    assert options["allow_patterns"] == ["a/b/*.json", "a/b/model.flashpack"]
    assert options["token"] == "t"
    assert others["allow_patterns"] == ["c"]
    assert (others["local_dir"], others["revision"]) == ("d", "r")


def test_proxies_reach_only_a_hub_that_knows_them(cache, monkeypatch, recwarn):
    download = Download(cache_dir=cache, local_files_only=True, proxies={"https": "p"})
    assert resolve_directory("x/y", download, ["model.flashpack"]).is_dir()
    assert not recwarn.list

    seen = {}

    def old(repo_id, proxies="none", **options):
        seen.update(options, proxies=proxies)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", old)
    resolve_directory("x/y", download, ["model.flashpack"])
    assert seen["proxies"] == {"https": "p"}


@pytest.mark.parametrize("wrong", ["/no/such/directory", "./missing", "a b"])
def test_what_is_neither_a_directory_nor_a_repository_is_named(wrong):
    with pytest.raises(flashpack.FlashPackError, match=f"{wrong} is neither a directory nor"):
        resolve_directory(wrong, Download(local_files_only=True), [])


@pytest.fixture
def hub(monkeypatch):
    """Takes the place of HfApi and records what it is asked; arguments that the real one lacks are errors."""
    calls = []
    real = huggingface_hub.HfApi

    class Recorder(real):
        def create_repo(self, repo_id, **options):
            _bind(real.create_repo, self, repo_id, **options)
            calls.append(("create_repo", {"repo_id": repo_id, **options}))
            return SimpleNamespace(repo_id=f"user/{repo_id}" if "/" not in repo_id else repo_id)

        def upload_folder(self, **options):
            _bind(real.upload_folder, self, **options)
            options["files"] = sorted(
                huggingface_hub.utils.filter_repo_objects(
                    (path.name for path in Path(options["folder_path"]).iterdir()),
                    allow_patterns=options["allow_patterns"],
                )
            )
            calls.append(("upload_folder", {"api_token": self.token, **options}))

    def _bind(method, *args, **options):
        inspect.signature(method).bind(*args, **options)

    monkeypatch.setattr(huggingface_hub, "HfApi", Recorder)
    return calls


def test_an_upload_makes_the_repository_and_sends_the_files(hub, tmp_path):
    for name in "config.json", "model.flashpack", "secret.txt":
        (tmp_path / name).write_text(name)
    upload_directory(tmp_path, Upload("mine", "t", True, True, "m"))
    (made, repository), (sent, folder) = hub
    assert (made, sent) == ("create_repo", "upload_folder")
    assert repository == {"repo_id": "mine", "private": True, "exist_ok": True}
    assert folder["repo_id"] == "user/mine"
    assert folder["files"] == ["config.json", "model.flashpack", "secret.txt"]
    expected = {"api_token": "t", "create_pr": True, "commit_message": "m"}
    assert {name: folder[name] for name in expected} == expected


def test_files_can_be_chosen_for_an_upload(hub, tmp_path):
    for name in "config.json", "model.flashpack", "secret.txt":
        (tmp_path / name).write_text(name)
    upload_directory(tmp_path, Upload("x/y"), ("*.json", "*.flashpack"))
    assert hub[1][1]["files"] == ["config.json", "model.flashpack"]
    assert hub[1][1]["repo_id"] == "x/y"


@pytest.mark.parametrize(
    ("path", "name"), [("link/..", "other"), ("link", "link"), (".", "work"), ("../other/.", "other")]
)
def test_a_repository_without_a_name_gets_that_of_the_directory(hub, tmp_path, monkeypatch, path, name):
    (tmp_path / "other" / "deep").mkdir(parents=True)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "link").symlink_to(tmp_path / "other" / "deep")
    monkeypatch.chdir(tmp_path / "work")
    upload_directory(path, Upload())
    assert hub[0][1]["repo_id"] == name
