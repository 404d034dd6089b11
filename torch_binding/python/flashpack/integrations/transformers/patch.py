"""`use_flashpack=True` for from_pretrained() of transformers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from ..._repository import blaming
from .._classes import demote, promoted_class
from .model import FlashPackTransformersModelMixin, promote

ClassMethod = Callable[..., Any]


def patch_transformers_auto_model() -> None:
    """Lets the Auto classes of transformers read flashpack files. May be called again.

    `AutoModel.from_pretrained(name, use_flashpack=True)`, and for short `AutoModel.from_pretrained_flashpack(name)`,
    does what FlashPackTransformersModelMixin.from_pretrained_flashpack() does; so does from_pretrained() of a model
    class. Every model that an Auto class returns, from whatever files, has the mixin until the model becomes part of
    another model of transformers.
    """
    _wrap(PreTrainedModel, "from_pretrained", _divert)
    # Each Auto class has copies of the methods of the first.
    autos = [value for value in vars(modeling_auto).values() if isinstance(value, type)]
    for auto in [_BaseAutoModelClass, *(auto for auto in autos if issubclass(auto, _BaseAutoModelClass))]:
        for name in ("from_pretrained", "from_config"):
            _wrap(auto, name, _promote_result)
    _BaseAutoModelClass.from_pretrained_flashpack = classmethod(_from_pretrained_flashpack)
    _keep_parts_original()


@functools.cache
def _keep_parts_original() -> None:
    register_module_module_registration_hook(_demote_part)


def _demote_part(module: nn.Module, name: str, part: nn.Module | None) -> None:
    """Takes the mixin from a part of a model, because transformers decides by its class name how to convert weights."""
    if type(module).__module__.startswith("transformers") or isinstance(module, PreTrainedModel):
        demote(part)


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
        return promoted_class(cls, FlashPackTransformersModelMixin).from_pretrained_flashpack(*args, **kwargs)

    return from_pretrained


def _promote_result(original: ClassMethod) -> ClassMethod:
    def auto_method(cls: type, *args: Any, **kwargs: Any) -> Any:
        is_ours = bool(kwargs.get("use_flashpack"))
        if is_ours and kwargs.get("trust_remote_code") is None:
            # Without an answer of the caller, transformers would take one from the terminal or from stdin.
            kwargs["trust_remote_code"] = False
        with blaming(f"{args[0]}", passed=(RuntimeError,)) if args and is_ours else nullcontext():
            result = original(cls, *args, **kwargs)
        # With output_loading_info the result is a tuple.
        promote(result[0] if isinstance(result, tuple) else result)
        return result

    return auto_method


def _from_pretrained_flashpack(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
    """from_pretrained(..., use_flashpack=True)."""
    return cls.from_pretrained(pretrained_model_name_or_path, *args, use_flashpack=True, **kwargs)
