"""transformers models in flashpack files. Importing this imports transformers."""

from __future__ import annotations

from .model import FlashPackTransformersModelMixin
from .patch import patch_transformers_auto_model

__all__ = ["FlashPackTransformersModelMixin", "patch_transformers_auto_model"]
