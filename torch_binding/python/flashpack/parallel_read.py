"""The one function of this module of flashpack 0.4.5 that is still needed; the engine has replaced the reader."""

from __future__ import annotations

from ._engine import release_engines

__all__ = ["release_pinned_pool"]


def release_pinned_pool() -> None:
    """Frees the staging memory, page-locked for GPUs, that loads and saves share; the next one allocates it again."""
    release_engines()
