"""The Hugging Face Hub and its cache on this machine. Only downloads and uploads need the package huggingface_hub."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ._checkpoint import StrPath
from ._native import FlashPackError
from .version import version

_MAX_LINKS = 40  # The kernel follows no more.
_HASH = re.compile(r"[0-9a-f]{64}")


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


def is_blob_link(path: StrPath) -> bool:
    """Whether `path` is a symbolic link that leads to a blob of the Hub's cache, whether the blob exists or not.

    In the cache, files of a repository are links to blobs, whose names are hashes of their contents. Writing through
    such a link would change the file in every revision that shares the blob. So flashpack follows other links, and
    replaces these.
    """
    return any(map(is_blob, _targets(path)))


def _targets(path: StrPath) -> Iterator[Path]:
    """Yields the target of the link `path` and, as long as the target is a link again, the next target.

    Each target is yielded in the directory that the link names, and again in the directory that this resolves to,
    because `blobs` may itself be a link.
    """
    link = Path(path)
    for _ in range(_MAX_LINKS):
        try:
            target = os.readlink(link)
        except OSError:
            return
        directory, name = os.path.split(target)
        home = os.path.join(os.path.realpath(link.parent), directory)
        yield Path(os.path.normpath(home), name)
        link = Path(os.path.realpath(home), name)
        yield link


def is_blob(path: Path) -> bool:
    """Whether `path`, which need not exist, is where the Hub's cache keeps a blob."""
    home = path.parent
    if home.name == "blobs":
        return (home.parent / "snapshots").is_dir()
    # From version 2 on huggingface_hub lets repositories share blobs, in blobs/<two digits of the hash>/<hash>.
    is_named_for_hash = _HASH.fullmatch(path.name) is not None and home.name == path.name[:2]
    return is_named_for_hash and home.parent.name == "blobs"
