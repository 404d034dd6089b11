"""Downloads from the Hugging Face Hub, and uploads to it. Both need the package huggingface_hub."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ._native import FlashPackError
from ._paths import StrPath
from .version import version


class Download(NamedTuple):
    """A folder of a repository, and the arguments of huggingface_hub.snapshot_download to get it with."""

    subfolder: str | None = None
    revision: str | None = None
    cache_dir: StrPath | None = None
    local_dir: StrPath | None = None
    token: str | bool | None = None
    force_download: bool = False
    local_files_only: bool = False
    proxies: dict[str, str] | None = None
    """Has an effect only in older versions of huggingface_hub, which take it."""

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Download:
        """Takes over those of `arguments` that snapshot_download has, too."""
        return cls(**{name: arguments[name] for name in cls().options() if arguments.get(name) is not None})

    def options(self) -> dict[str, Any]:
        """Returns the arguments of snapshot_download."""
        return {name: value for name, value in self._asdict().items() if name != "subfolder"}


def resolve_directory(path_or_repo: StrPath, download: Download, allow_patterns: Sequence[str]) -> Path:
    """Returns the directory of a model, or its subfolder: a local one as it is, else downloaded from the Hub.

    Only files that match `allow_patterns`, which are relative to the subfolder, are downloaded.

    Raises FlashPackError if `path_or_repo` is neither a directory nor a repository's name, and OSError or ValueError
    for errors of the Hub.
    """
    directory = Path(path_or_repo)
    if not directory.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError

        known = inspect.signature(snapshot_download).parameters
        options = {name: value for name, value in download.options().items() if name != "proxies" or name in known}
        lead = f"{download.subfolder.strip('/')}/" if download.subfolder else ""
        try:
            snapshot = snapshot_download(
                os.fspath(path_or_repo),
                allow_patterns=[lead + pattern for pattern in allow_patterns],
                library_name="flashpack",
                library_version=version,
                **options,
            )
        except HFValidationError as error:
            raise FlashPackError(f"{path_or_repo} is neither a directory nor the name of a repository") from error
        directory = Path(snapshot)
    return directory / download.subfolder if download.subfolder else directory


class Upload(NamedTuple):
    """The place on the Hub that a directory goes to, and the options of the upload."""

    repo_id: str | None = None
    """None stands for the name of the directory, under the user's name."""
    token: str | bool | None = None
    private: bool | None = None
    create_pr: bool = False
    """Proposes the change instead of making it."""
    commit_message: str | None = None


def upload_directory(directory: StrPath, upload: Upload, allow_patterns: Sequence[str] | None = None) -> None:
    """Uploads the files of `directory` to a repository on the Hub, which is made if it does not exist.

    `allow_patterns`: the files that go, by default all.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=upload.token, library_name="flashpack", library_version=version)
    named = Path(directory).absolute()
    name = upload.repo_id or (named.resolve() if named.name == os.pardir else named).name
    # The Hub's answer has the whole name, with the user's namespace.
    full_name = api.create_repo(name, private=upload.private, exist_ok=True).repo_id
    api.upload_folder(
        repo_id=full_name,
        folder_path=os.fspath(directory),
        commit_message=upload.commit_message,
        create_pr=upload.create_pr,
        allow_patterns=None if allow_patterns is None else list(allow_patterns),
    )
