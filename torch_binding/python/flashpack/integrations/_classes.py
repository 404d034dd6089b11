"""Classes that add a flashpack mixin to a library's class X. They are called FlashPack<X>, but files name X."""

from __future__ import annotations

import copyreg
import functools
from typing import Any

PREFIX = "FlashPack"


class _Promoted(type):
    """The metaclass of the classes FlashPack<X>. No module has these classes, so pickle makes them again from X."""

    recipe: tuple[type, type]

    def __str__(cls) -> str:
        # transformers registers the outputs that a class can record, such as hidden states, under this string.
        return str(vars(cls)["recipe"][0]) if "recipe" in vars(cls) else repr(cls)


@functools.cache
def promoted_class(original: type, mixin: type) -> Any:
    """Returns FlashPack<X> for a class X: a subclass with `mixin`. If X has the mixin already, returns X itself."""
    if issubclass(original, mixin):
        return original
    # Libraries write the module of a class into files, to find it again.
    body: dict[str, Any] = {"__module__": original.__module__, "__doc__": original.__doc__, "recipe": (original, mixin)}
    # The Trainer decides by this name which models shift their labels.
    body["_get_name"] = lambda model: type(model).__name__.removeprefix(PREFIX)
    return _Promoted(PREFIX + original.__name__, (original, mixin), body)


def demote(model: Any) -> None:
    """Gives a model of a class FlashPack<X> the class X again, in place."""
    if isinstance(type(model), _Promoted) and "recipe" in vars(type(model)):
        model.__class__ = type(model).recipe[0]


def _reduce(promoted: _Promoted) -> tuple[Any, ...]:
    return promoted_class, promoted.recipe


copyreg.pickle(_Promoted, _reduce)


def original_class(cls: type, mixin: type) -> Any:
    """Returns the class that files name for `cls`, so that they load without flashpack.

    For a class FlashPack..., also one written by hand, it is the nearest base that is a model and lacks the mixin.
    For any other class, or without such a base, it is `cls` itself.
    """
    if not cls.__name__.startswith(PREFIX):
        return cls
    library_base = mixin.__bases__[0]
    for base in cls.__mro__:
        if issubclass(base, library_base) and not issubclass(base, mixin) and not issubclass(mixin, base):
            return base
    return cls
