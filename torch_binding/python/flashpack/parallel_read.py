"""What is left of a module of flashpack 0.4.5; the engine has taken the place of the reader that was here."""

from __future__ import annotations

from ._engine import release_engines

__all__ = ["release_pinned_pool"]


def release_pinned_pool() -> None:
    """Gives back the staging memory, page-locked for GPUs, that loads and saves share; the next one makes it anew."""
    release_engines()
