"""What flashpack brings to other libraries. Nothing here imports one of them before it is asked to."""

from __future__ import annotations

from .patch import patch_integrations

__all__ = ["patch_integrations"]
