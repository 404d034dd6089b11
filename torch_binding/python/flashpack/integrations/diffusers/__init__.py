"""diffusers: models and pipelines that save to and load from flashpack files. Needs diffusers."""

from __future__ import annotations

from .auto_model import AutoFlashPackModel
from .model import FlashPackDiffusersModelMixin
from .patch import patch_diffusers_auto_model
from .pipeline import FlashPackDiffusionPipeline

__all__ = [
    "AutoFlashPackModel",
    "FlashPackDiffusersModelMixin",
    "FlashPackDiffusionPipeline",
    "patch_diffusers_auto_model",
]
