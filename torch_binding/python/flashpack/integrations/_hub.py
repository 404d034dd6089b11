"""Directories of models that may live on the Hugging Face Hub. Needs huggingface_hub, and only once it is used."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._footer import StrPath
from .._native import FlashPackError
from ..version import version


def resolve_directory(
    path_or_repo: StrPath,
    *,
    subfolder: str | None = None,
    allow_patterns: Sequence[str],
    revision: str | None = None,
    cache_dir: StrPath | None = None,
    local_dir: StrPath | None = None,
    token: str | bool | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    **legacy: Any,
) -> Path:
    """The directory of a model, or its `subfolder`: a local one as it is, else downloaded from the Hub.

    Only files that match `allow_patterns`, which are relative to the subfolder, are downloaded. `legacy` are arguments
    of older versions of huggingface_hub, such as `proxies`; those that the installed one lacks have no effect.

    Raises FlashPackError if `path_or_repo` is neither a directory nor a repository's name; what the Hub raises is an
    OSError or a ValueError.
    """
    directory = Path(path_or_repo)
    if not directory.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError

        known = inspect.signature(snapshot_download).parameters
        lead = f"{subfolder.strip('/')}/" if subfolder else ""
        try:
            directory = Path(
                snapshot_download(
                    os.fspath(path_or_repo),
                    revision=revision,
                    cache_dir=cache_dir,
                    local_dir=local_dir,
                    token=token,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    allow_patterns=[lead + pattern for pattern in allow_patterns],
                    library_name="flashpack",
                    library_version=version,
                    **{name: value for name, value in legacy.items() if name in known},
                )
            )
        except HFValidationError as error:
            raise FlashPackError(f"{path_or_repo} is neither a directory nor the name of a repository") from error
    return directory / subfolder if subfolder else directory


def upload_directory(
    directory: StrPath,
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    revision: str | None = None,
    allow_patterns: Sequence[str] | None = None,
    ignore_patterns: Sequence[str] | None = None,
) -> None:
    """Uploads the files of `directory` to a repository on the Hub, which is made if it does not exist.

    `allow_patterns`: the files that go, by default all; `ignore_patterns`: files that stay here.
    `create_pr`: proposes the change instead of making it.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="flashpack", library_version=version)
    # The Hub's answer has the whole name, with the user's namespace.
    full_name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    api.upload_folder(
        repo_id=full_name,
        folder_path=os.fspath(directory),
        revision=revision,
        commit_message=commit_message,
        create_pr=create_pr,
        allow_patterns=None if allow_patterns is None else list(allow_patterns),
        ignore_patterns=None if ignore_patterns is None else list(ignore_patterns),
    )
