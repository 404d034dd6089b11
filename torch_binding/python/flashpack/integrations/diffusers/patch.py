"""Lets diffusers' own classes load and save flashpack files."""

from __future__ import annotations

import functools
from typing import Any

import diffusers

from .._classes import demote, lend
from ._components import mixin_for
from .auto_model import AutoFlashPackModel
from .model import FlashPackDiffusersModelMixin


def patch_diffusers_auto_model() -> None:
    """Makes diffusers.AutoModel do what AutoFlashPackModel does. May be called again.

    `AutoModel.from_pretrained(..., use_flashpack=True)` and `AutoModel.from_pretrained_flashpack(...)` then load
    flashpack files. Every model of diffusers, and those of transformers that pipelines load, has
    save_pretrained_flashpack(). All keep their classes.
    """
    lend(FlashPackDiffusersModelMixin)
    auto: Any = diffusers.AutoModel
    if "from_pretrained_flashpack" in vars(auto):
        return
    pipeline: Any = diffusers.DiffusionPipeline
    auto.from_pretrained = classmethod(_auto_from_pretrained(auto.from_pretrained.__func__))
    auto.from_pretrained_flashpack = classmethod(_auto_from_pretrained_flashpack)
    pipeline.from_pretrained = classmethod(_pipeline_from_pretrained(pipeline.from_pretrained.__func__))


def _auto_from_pretrained(original: Any) -> Any:
    @functools.wraps(original)
    def from_pretrained(cls: Any, pretrained_model_or_path: Any = None, **kwargs: Any) -> Any:
        if kwargs.pop("use_flashpack", False):
            return _auto_from_pretrained_flashpack(cls, pretrained_model_or_path, **kwargs)
        return original(cls, pretrained_model_or_path, **kwargs)

    return from_pretrained


def _auto_from_pretrained_flashpack(cls: Any, /, pretrained_model_or_path: Any = None, **kwargs: Any) -> Any:
    """from_pretrained(..., use_flashpack=True)."""
    return demote(AutoFlashPackModel.from_pretrained_flashpack(pretrained_model_or_path, **kwargs))


def _pipeline_from_pretrained(original: Any) -> Any:
    @functools.wraps(original)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        pipeline = original(cls, pretrained_model_name_or_path, **kwargs)
        # transformers is imported by the load, if at all.
        for mixin in {mixin_for(type(component)) for component in pipeline.components.values()} - {None}:
            lend(mixin)
        return pipeline

    return from_pretrained
