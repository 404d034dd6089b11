"""`use_flashpack=True` for from_pretrained() of transformers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from ..._options import Strictness
from ..._repository import blaming
from .._classes import lend, load_as_original
from .model import FlashPackTransformersModelMixin

ClassMethod = Callable[..., Any]


def patch_transformers_auto_model() -> None:
    """Lets transformers read and write flashpack files. May be called again.

    `AutoModel.from_pretrained(name, use_flashpack=True)`, and for short `AutoModel.from_pretrained_flashpack(name)`,
    does what FlashPackTransformersModelMixin.from_pretrained_flashpack() does; so does from_pretrained() of a model
    class. But as with other files, weights that only the file or only the model has are reported, and are an error only
    if a strict flag is given. Every model of transformers has save_pretrained_flashpack(), from whatever files it was
    loaded. All keep their classes.
    """
    _wrap(PreTrainedModel, "from_pretrained", _divert)
    # Each Auto class has copies of the methods of the first.
    autos = [value for value in vars(modeling_auto).values() if isinstance(value, type)]
    for auto in [_BaseAutoModelClass, *(auto for auto in autos if issubclass(auto, _BaseAutoModelClass))]:
        _wrap(auto, "from_pretrained", _blame_files)
    _BaseAutoModelClass.from_pretrained_flashpack = classmethod(_from_pretrained_flashpack)
    lend(FlashPackTransformersModelMixin)


def _wrap(owner: type, name: str, wrapper: Callable[[ClassMethod], ClassMethod]) -> None:
    """Puts `wrapper` around the classmethod `name`, if `owner` defines one and it is not wrapped yet."""
    method = owner.__dict__.get(name)
    if method is not None and not hasattr(method.__func__, "_flashpack_original"):
        wrapped = functools.wraps(method.__func__)(wrapper(method.__func__))
        wrapped._flashpack_original = method.__func__  # type: ignore[attr-defined]
        setattr(owner, name, classmethod(wrapped))


def _divert(original: ClassMethod) -> ClassMethod:
    def from_pretrained(cls: type, *args: Any, use_flashpack: bool = False, **kwargs: Any) -> Any:
        if not use_flashpack:
            return original(cls, *args, **kwargs)
        if not kwargs.keys() & set(Strictness._fields):
            kwargs["strict"] = False
        return load_as_original(cls, FlashPackTransformersModelMixin, *args, **kwargs)

    return from_pretrained


def _blame_files(original: ClassMethod) -> ClassMethod:
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("use_flashpack"):
            return original(cls, *args, **kwargs)
        if kwargs.get("trust_remote_code") is None:
            # Without an answer of the caller, transformers would take one from the terminal or from stdin.
            kwargs["trust_remote_code"] = False
        with blaming(f"{args[0]}", passed=(RuntimeError,)) if args else nullcontext():
            return original(cls, *args, **kwargs)

    return from_pretrained


def _from_pretrained_flashpack(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
    """from_pretrained(..., use_flashpack=True)."""
    return cls.from_pretrained(pretrained_model_name_or_path, *args, use_flashpack=True, **kwargs)
