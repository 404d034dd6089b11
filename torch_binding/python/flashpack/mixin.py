"""FlashPackMixin: saving and loading for your own modules."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, TypeVar

import torch

from ._casts import DTypeLike, asked_dtype
from ._checkpoint import Verify
from ._loading import assign
from ._meta_init import meta_parameters
from ._options import Casts, Filters, LoadOptions, Names, Sharing, Strictness
from ._paths import StrPath
from ._transfers import ReadOptions
from .constants import (
    DEFAULT_ALIGN_BYTES,
    DEFAULT_CHUNK_BYTES,
    DEFAULT_NUM_STREAMS,
    DEFAULT_NUM_WRITE_WORKERS,
)
from .deserialization import assign_from_file
from .serialization import pack_to_file
from .utils import logger

__all__ = ["FlashPackMixin", "assign_from_file"]

Self = TypeVar("Self", bound="FlashPackMixin")


class FlashPackMixin:
    """Adds save_flashpack() and from_flashpack() to a torch.nn.Module.

    The class attributes are the defaults of the arguments of the same names. `flashpack_init_method` names the
    classmethod that builds an instance, if that is not the constructor.
    """

    flashpack_coerce_dtype: ClassVar[bool] = False
    flashpack_init_method: ClassVar[str | None] = None
    flashpack_ignore_names: ClassVar[list[str] | None] = None
    flashpack_ignore_prefixes: ClassVar[list[str] | None] = None
    flashpack_ignore_suffixes: ClassVar[list[str] | None] = None
    flashpack_meta_init: ClassVar[bool] = True

    @classmethod
    def from_flashpack(
        cls: type[Self],
        path: StrPath,
        *args: Any,
        device: str | torch.device | None = None,
        silent: bool = False,
        strict: bool | None = None,
        strict_params: bool = True,
        strict_buffers: bool = False,
        keep_flash_ref_on_model: bool = False,
        ignore_names: Collection[str] | None = None,
        ignore_prefixes: Collection[str] | None = None,
        ignore_suffixes: Collection[str] | None = None,
        num_streams: int = DEFAULT_NUM_STREAMS,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
        use_distributed_loading: bool = False,
        distributed_sharded: bool = False,
        distributed_shard_strategy: str | None = None,
        rank: int | None = None,
        local_rank: int | None = None,
        world_size: int | None = None,
        coerce_dtype: bool = False,
        init_fn: Callable[..., Self] | None = None,
        mmap: bool | None = None,
        verify: Verify | None = None,
        dtype: DTypeLike | None = None,
        meta_init: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Builds an instance without memory for its parameters, loads `path` into it, and returns it in eval mode.

        `init_fn`, else `flashpack_init_method`, else the class builds it from `args` and those `kwargs` that it takes.
        If it has a parameter `mmap`, `verify`, `dtype` or `meta_init`, it gets that argument, as in flashpack 0.4.5,
        which knows none of them. `meta_init=False` gives parameters memory from the start, for constructors that look
        at their values.
        `device`: default is the CPU. The other arguments are those of assign_from_file.

        Warns when parameters that the file lacks stay on the meta device. Raises what assign_from_file raises.
        """
        sharing = Sharing(
            use_distributed_loading, distributed_sharded, distributed_shard_strategy, rank, local_rank, world_size
        )
        build = cls._flashpack_builder() if init_fn is None else init_fn
        shared = {"mmap": mmap, "verify": verify, "dtype": dtype, "meta_init": meta_init}
        theirs, ours = _shared_out(build, {name: value for name, value in shared.items() if value is not None})
        kwargs = _accepted(build, args, kwargs | theirs, sharing)
        model = _build(build, args, kwargs, ours.get("meta_init", cls.flashpack_meta_init))
        assert isinstance(model, torch.nn.Module)  # _build has checked it.
        options = LoadOptions(
            "cpu" if device is None else device,
            cls._flashpack_filters(ignore_names, ignore_prefixes, ignore_suffixes),
            Strictness(strict, strict_params, strict_buffers),
            Casts(coerce_dtype or cls.flashpack_coerce_dtype, asked_dtype(ours.get("dtype"))),
            ReadOptions(ours.get("mmap", False), ours.get("verify", "auto"), not silent),
            sharing,
            keep_flash_ref_on_model,
        )
        assign(model, *cls._flashpack_fitted(model, path, options))
        model.eval()
        return model

    def save_flashpack(
        self,
        destination_path: StrPath,
        target_dtype: torch.dtype | None = None,
        name_order: Iterable[str] | None = None,
        align_bytes: int = DEFAULT_ALIGN_BYTES,
        silent: bool = False,
        num_workers: int = DEFAULT_NUM_WRITE_WORKERS,
        checksum: bool = True,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Calls pack_to_file for this module."""
        if not isinstance(self, torch.nn.Module):
            raise TypeError(f"{type(self).__name__} is not a torch.nn.Module")
        pack_to_file(
            self, destination_path, target_dtype, name_order, align_bytes, silent, num_workers, checksum, metadata
        )

    @classmethod
    def _flashpack_builder(cls: type[Self]) -> Callable[..., Self]:
        method = cls.flashpack_init_method
        return cls if method is None else getattr(cls, method, cls)

    @classmethod
    def _flashpack_fitted(cls, model: Any, path: StrPath, options: LoadOptions) -> tuple[StrPath, LoadOptions]:
        """Returns `path` and `options`, fitted to `model` by classes that know older names of its tensors."""
        return path, options

    @classmethod
    def _flashpack_filters(cls, names: Names, prefixes: Names, suffixes: Names) -> Filters:
        """Returns the given filters, with the defaults of the class for those that are None."""
        return Filters.of(
            cls.flashpack_ignore_names if names is None else names,
            cls.flashpack_ignore_prefixes if prefixes is None else prefixes,
            cls.flashpack_ignore_suffixes if suffixes is None else suffixes,
        )


def _build(build: Callable[..., Self], args: Sequence[Any], kwargs: dict[str, Any], meta_init: bool) -> Self:
    try:
        with meta_parameters() if meta_init else nullcontext():
            model = build(*args, **kwargs)
    except RuntimeError as error:
        if not meta_init or "meta" not in str(error):
            raise
        raise RuntimeError(
            f"{getattr(build, '__qualname__', build)} failed while parameters had no memory; if it looks at their "
            f"values, pass meta_init=False: {error}"
        ) from error
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{getattr(build, '__qualname__', build)} made a {type(model).__name__}, not a module")
    return model


def _shared_out(build: Callable[..., Any], given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns those of `given` that `build` has a parameter for, and the others."""
    named = inspect.signature(build).parameters.keys()
    theirs = {name: value for name, value in given.items() if name in named}
    return theirs, {name: value for name, value in given.items() if name not in named}


def _accepted(
    build: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], sharing: Sharing
) -> dict[str, Any]:
    """Returns those of `kwargs` that `build` takes, and the rank and its like if it names them and `args` lack them.

    A rank that is not known is passed as None only if the parameter has no default.
    """
    places = {"rank": sharing.rank, "local_rank": sharing.local_rank, "world_size": sharing.world_size}
    parameters = inspect.signature(build).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    dropped = [] if takes_all else [name for name in kwargs if name not in parameters]
    if dropped:
        logger.warning("%s does not take %s", getattr(build, "__qualname__", build), ", ".join(dropped))
    accepted = {name: value for name, value in kwargs.items() if name not in dropped}
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    taken = [name for name, parameter in parameters.items() if parameter.kind in positional][: len(args)]
    wanted = [name for name in places if name in parameters and name not in taken]
    required = [name for name in wanted if parameters[name].default is inspect.Parameter.empty]
    return accepted | {name: places[name] for name in wanted if places[name] is not None or name in required}
