"""Classes that are a library's class with a flashpack mixin. They are called FlashPack<Class>; files never say so."""

from __future__ import annotations

import copyreg
import functools
from typing import Any

PREFIX = "FlashPack"


class _Promoted(type):
    """The class of the classes FlashPack<X>; pickle makes them anew from X."""

    recipe: tuple[type, type]

    def __str__(cls) -> str:
        # transformers registers under this what a class can record, such as hidden states.
        return str(vars(cls)["recipe"][0]) if "recipe" in vars(cls) else repr(cls)


@functools.cache
def promoted_class(original: type, mixin: type) -> Any:
    """FlashPack<X> for a class X: the same with `mixin`. X itself, if it has it already."""
    if issubclass(original, mixin):
        return original
    # Libraries write the module of a class into files, to find it again.
    body: dict[str, Any] = {"__module__": original.__module__, "__doc__": original.__doc__, "recipe": (original, mixin)}
    # By this name the Trainer tells which models shift their labels.
    body["_get_name"] = lambda model: type(model).__name__.removeprefix(PREFIX)
    return _Promoted(PREFIX + original.__name__, (original, mixin), body)


def demote(model: Any) -> None:
    """Takes from a model, in place, what promoted_class gave to its class."""
    if isinstance(type(model), _Promoted) and "recipe" in vars(type(model)):
        model.__class__ = type(model).recipe[0]


def _reduce(promoted: _Promoted) -> tuple[Any, ...]:
    return promoted_class, promoted.recipe


copyreg.pickle(_Promoted, _reduce)


def original_class(cls: type, mixin: type) -> Any:
    """The class that files name for `cls`, so that they load without flashpack.

    For a class FlashPack..., also one written by hand, it is the nearest base that is a model and lacks the mixin.
    Others, and those that have no such base, stay what they are.
    """
    if not cls.__name__.startswith(PREFIX):
        return cls
    library_base = mixin.__bases__[0]
    for base in cls.__mro__:
        if issubclass(base, library_base) and not issubclass(base, mixin) and not issubclass(mixin, base):
            return base
    return cls
