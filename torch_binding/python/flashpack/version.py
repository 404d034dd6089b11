"""The version, in the forms that setuptools-scm users look for. The number itself stands in CMakeLists.txt."""

from __future__ import annotations

from ._native import version

__all__ = ["__commit_id__", "__version__", "__version_tuple__", "commit_id", "version", "version_tuple"]

__version__ = version
__version_tuple__: tuple[int | str, ...] = tuple(int(part) for part in version.split("."))
version_tuple = __version_tuple__
__commit_id__: str | None = None
commit_id = __commit_id__
