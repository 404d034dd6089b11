"""flashpack for transformers and diffusers. Importing this package imports neither of them."""

from __future__ import annotations

from .patch import patch_integrations

__all__ = ["patch_integrations"]
