"""python -m flashpack. The commands are importable from here."""

from __future__ import annotations

from .cli import convert, main, metadata, revert, verify

__all__ = ["convert", "main", "metadata", "revert", "verify"]

if __name__ == "__main__":
    main()
