"""Classes that are a library's model with a flashpack mixin. They are called `FlashPack<Class>`; files are not told."""

from __future__ import annotations

import functools
from typing import Any

PREFIX = "FlashPack"


def mix(original: type, mixin: type) -> type:
    """`original` with `mixin`: a class made once, or `original` itself if it has the mixin. Instances pickle."""
    return original if issubclass(original, mixin) else _mix(original, mixin)


@functools.cache
def _mix(original: type, mixin: type) -> type:
    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        # No module has this class under its name, so pickle is told how to make it.
        _, _, *state = original.__reduce_ex__(self, protocol)
        return _new, (original, mixin), *state

    # The module says which library the class belongs to; diffusers writes that into model_index.json.
    body = {"__module__": original.__module__, "__doc__": original.__doc__, "__reduce_ex__": reduce}
    return type(PREFIX + original.__name__, (original, mixin), body)


def _new(original: type, mixin: type) -> Any:
    cls = _mix(original, mixin)
    return cls.__new__(cls)


def original_of(cls: type, mixin: type) -> type:
    """The class that files name instead of `cls`, so that they load where flashpack is not.

    It is the nearest base of a class called FlashPack... that is a model without the mixin. A class with another name,
    or that has no such base, stands for itself.
    """
    if not cls.__name__.startswith(PREFIX):
        return cls
    library_base = mixin.__bases__[0]
    for base in cls.__mro__:
        if issubclass(base, library_base) and not issubclass(base, mixin) and not issubclass(mixin, base):
            return base
    return cls
