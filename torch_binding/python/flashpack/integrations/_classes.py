"""Classes that are a library's class with a flashpack mixin. They are called FlashPack<Class>; files never say so."""

from __future__ import annotations

import copyreg
import functools
from typing import Any

PREFIX = "FlashPack"


class _Promoted(type):
    """The class of the classes FlashPack<X>; pickle makes them anew from X."""

    recipe: tuple[type, type]


@functools.cache
def promoted_class(original: type, mixin: type) -> Any:
    """FlashPack<X> for a class X: the same with `mixin`. X itself, if it has it already."""
    if issubclass(original, mixin):
        return original
    # Libraries write the module of a class into files, to find it again.
    body = {"__module__": original.__module__, "__doc__": original.__doc__, "recipe": (original, mixin)}
    return _Promoted(PREFIX + original.__name__, (original, mixin), body)


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
