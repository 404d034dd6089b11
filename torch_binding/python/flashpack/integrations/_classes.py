"""Classes that add a flashpack mixin to a library's class X. They are called FlashPack<X>, but files name X."""

from __future__ import annotations

import copyreg
import functools
import inspect
from collections.abc import Iterator
from typing import Any

PREFIX = "FlashPack"
LIBRARIES = ("diffusers", "transformers")


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


def demote(model: Any) -> Any:
    """Gives a model of a class FlashPack<X> the class X again, in place, and returns it."""
    if "recipe" in vars(type(model)):
        model.__class__ = type(model).recipe[0]
    return model


def load_as_original(cls: Any, mixin: type, *args: Any, **kwargs: Any) -> Any:
    """Does what from_pretrained_flashpack() of `mixin` does, but returns a model of the class `cls` itself."""
    result = promoted_class(cls, mixin).from_pretrained_flashpack(*args, **kwargs)
    # With output_loading_info the result is a tuple.
    demote(result[0] if isinstance(result, tuple) else result)
    return result


def lend(mixin: Any) -> None:
    """Gives methods of `mixin` to all models of its library. They keep their classes, by which libraries decide."""
    base = mixin.__bases__[0]
    for name in ("save_flashpack", "save_pretrained_flashpack"):
        setattr(base, name, getattr(mixin, name))
    base.from_pretrained_flashpack = classmethod(lambda cls, *args, **kw: load_as_original(cls, mixin, *args, **kw))


def _reduce(promoted: _Promoted) -> tuple[Any, ...]:
    return promoted_class, promoted.recipe


copyreg.pickle(_Promoted, _reduce)


def original_class(cls: type, mixin: type) -> Any:
    """Returns the class that files name for `cls`, so that they load in other processes, and without flashpack.

    It is the nearest class of a library, or one on the way there that changes what it inherits, because then the
    library's class is another model. Without such a class it is `cls` itself.
    """
    return next((base for base in _models(cls, mixin) if _is_of_library(base) or _changes(base)), cls)


def library_class(cls: type, mixin: type) -> Any:
    """Returns the nearest class of a library that `cls` is or derives from, or else `cls` itself."""
    return next(filter(_is_of_library, _models(cls, mixin)), cls)


def _models(cls: type, mixin: type) -> Iterator[type]:
    """Yields those classes of the MRO that are models, or pipelines, but not the bases of all."""
    return (base for base in cls.__mro__ if issubclass(base, mixin.__bases__[0]) and base not in mixin.__mro__)


def _is_of_library(cls: type) -> bool:
    # Classes FlashPack<X> have the module of X.
    return cls.__module__.split(".")[0] in LIBRARIES and "recipe" not in vars(cls)


def _changes(cls: type) -> bool:
    """Whether `cls` has an attribute of its bases in another form. Names that begin with flashpack_ do not count."""
    if "recipe" in vars(cls):
        return False
    inherited = super(cls, cls)
    return any(
        value is not getattr(inherited, name, value)
        for name, value in vars(cls).items()
        if not name.startswith(("__", "flashpack_")) or inspect.isfunction(value)
    )
