"""Teaching the libraries that are installed to read and write flashpack files."""

from __future__ import annotations

from importlib.util import find_spec


def patch_integrations() -> None:
    """Patches transformers and diffusers, those of the two that are installed. May be called again."""
    if find_spec("diffusers") is not None:
        from .diffusers import patch_diffusers_auto_model

        patch_diffusers_auto_model()
    if find_spec("transformers") is not None:
        from .transformers import patch_transformers_auto_model

        patch_transformers_auto_model()
