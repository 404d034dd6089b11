"""Teaching diffusers' own classes about flashpack."""

from __future__ import annotations

import functools
from typing import Any

from diffusers import AutoModel, DiffusionPipeline

from .auto_model import AutoFlashPackModel
from ._components import adopt


def patch_diffusers_auto_model() -> None:
    """Makes diffusers.AutoModel do what AutoFlashPackModel does, and pipelines load models with the mixin, too.

    `AutoModel.from_pretrained(..., use_flashpack=True)` and `AutoModel.from_pretrained_flashpack(...)` then load
    flashpack files, and all models can save_pretrained_flashpack(). Each method of diffusers is wrapped, once; it does
    what it did, whatever the version.
    """
    if "from_pretrained_flashpack" in vars(AutoModel):
        return
    AutoModel.from_pretrained = classmethod(_auto_from_pretrained(AutoModel.from_pretrained.__func__))
    AutoModel.from_pretrained_flashpack = classmethod(_auto_from_pretrained_flashpack)
    DiffusionPipeline.from_pretrained = classmethod(
        _pipeline_from_pretrained(DiffusionPipeline.from_pretrained.__func__)
    )


def _auto_from_pretrained(original: Any) -> Any:
    @functools.wraps(original)
    def from_pretrained(cls: Any, pretrained_model_or_path: Any = None, **kwargs: Any) -> Any:
        if kwargs.pop("use_flashpack", False):
            return AutoFlashPackModel.from_pretrained_flashpack(pretrained_model_or_path, **kwargs)
        return adopt(original(cls, pretrained_model_or_path, **kwargs))

    return from_pretrained


def _auto_from_pretrained_flashpack(cls: Any, pretrained_model_or_path: Any = None, **kwargs: Any) -> Any:
    return AutoFlashPackModel.from_pretrained_flashpack(pretrained_model_or_path, **kwargs)


def _pipeline_from_pretrained(original: Any) -> Any:
    @functools.wraps(original)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        pipeline = original(cls, pretrained_model_name_or_path, **kwargs)
        for name, component in pipeline.components.items():
            if name not in kwargs:
                adopt(component)
        return pipeline

    return from_pretrained
