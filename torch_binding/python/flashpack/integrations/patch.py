"""Lets transformers and diffusers read and write flashpack files."""

from __future__ import annotations

from .. import utils


def patch_integrations() -> None:
    """Patches transformers and diffusers, as far as they are installed. May be called again."""
    if utils.diffusers_is_available():
        from .diffusers import patch_diffusers_auto_model

        patch_diffusers_auto_model()
    if utils.transformers_is_available():
        from .transformers import patch_transformers_auto_model

        patch_transformers_auto_model()
