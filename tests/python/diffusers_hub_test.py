from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_cache import make_hub_cache

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from diffusers import AutoencoderKL  # noqa: E402
from diffusers_models import (  # noqa: E402
    MODEL,
    FlashPackSD,
    FlashPackUNet2DConditionModel,
    image,
    make_pipeline,
    make_unet,
    plain_text_encoder,
    save_pipeline,
)
from flashpack.integrations.diffusers import AutoFlashPackModel  # noqa: E402


def cached(directory: Path, cache: Path) -> dict[str, Any]:
    """Arguments that find the files of `directory` as repository x/y, without network."""
    files = {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    return {"cache_dir": make_hub_cache(cache, files), "local_files_only": True}


class Recorder:
    """Stands in for huggingface_hub.HfApi and notes what it is told."""

    calls: list[tuple[str, dict[str, Any]]]

    def __init__(self, **options: Any) -> None:
        self.calls.append(("HfApi", options))

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))

        class Answer:
            pass

        answer = Answer()
        answer.repo_id = f"somebody/{repo_id}"  # type: ignore[attr-defined]
        return answer

    def upload_folder(self, *, folder_path: str, **options: Any) -> None:
        files = sorted(str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file())
        self.calls.append(("upload_folder", {"files": files, **options}))


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    calls: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(Recorder, "calls", calls, raising=False)
    monkeypatch.setattr("huggingface_hub.HfApi", Recorder)
    return calls


def test_a_model_is_loaded_from_the_cache_of_the_hub(tmp_path):
    saved = save_pipeline(tmp_path / "saved")
    options = cached(saved, tmp_path / "cache")
    loaded = FlashPackUNet2DConditionModel.from_pretrained_flashpack("x/y", subfolder="unet", **options)
    assert loaded.config._name_or_path == "x/y"
    auto = AutoFlashPackModel.from_pretrained_flashpack("x/y", subfolder="vae", **options)
    assert isinstance(auto, AutoencoderKL)


def test_a_pipeline_is_loaded_from_the_cache_of_the_hub(tmp_path):
    saved = save_pipeline(tmp_path / "saved")
    loaded = FlashPackSD.from_pretrained_flashpack("x/y", proxies=None, **cached(saved, tmp_path / "cache"))
    assert np.array_equal(image(loaded), image(make_pipeline()))
    assert loaded.config._name_or_path == "x/y"


def test_only_what_is_needed_is_downloaded(tmp_path, monkeypatch):
    pipeline = make_pipeline(text_encoder=plain_text_encoder)
    commit = tmp_path / "snapshots" / "c0ffee"
    pipeline.save_pretrained_flashpack(commit)
    asked = []

    def snapshot_download(repo_id: str, *, revision: Any, allow_patterns: list[str], **options: Any) -> str:
        asked.append((repo_id, revision, allow_patterns))
        return str(commit)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    FlashPackSD.from_pretrained_flashpack("somebody/pipeline", revision="branch")
    first, second = asked
    assert first[:2] == ("somebody/pipeline", "branch")
    assert any(fnmatch(f"unet/{MODEL}", pattern) for pattern in first[2])
    assert not any(fnmatch("unet/diffusion_pytorch_model.safetensors", pattern) for pattern in first[2])
    assert second == ("somebody/pipeline", "c0ffee", ["scheduler/*", "text_encoder/*", "tokenizer/*"])


def test_an_upload_has_all_files_and_the_arguments(tmp_path, uploads):
    make_pipeline().save_pretrained_flashpack(
        tmp_path / "name", push_to_hub=True, token="secret", private=True, create_pr=True, commit_message="why"
    )
    (_, made), (_, created), (_, uploaded) = uploads
    assert made["token"] == "secret"
    assert created == {"repo_id": "name", "private": True, "exist_ok": True}
    assert uploaded["repo_id"] == "somebody/name"
    assert (uploaded["create_pr"], uploaded["commit_message"]) == (True, "why")
    assert {"model_index.json", "unet/config.json", f"unet/{MODEL}", "tokenizer/tokenizer_config.json"} <= {
        *uploaded["files"]
    }


def test_the_upload_of_a_model_goes_to_the_repository_that_is_named(tmp_path, uploads):
    make_unet().save_pretrained_flashpack(str(tmp_path), push_to_hub=True, repo_id="other")
    assert uploads[1][1]["repo_id"] == "other"
    assert uploads[2][1]["files"] == ["config.json", MODEL]


def test_other_ranks_write_nothing(tmp_path, uploads):
    make_unet().save_pretrained_flashpack(tmp_path / "unet", is_main_process=False, push_to_hub=True)
    make_pipeline().save_pretrained_flashpack(tmp_path / "all", is_main_process=False, push_to_hub=True)
    assert list(tmp_path.iterdir()) == []
    assert uploads == []
