"""The mixin for models of diffusers."""

from __future__ import annotations

import inspect
import os
import re
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from diffusers import ModelMixin

from ..._casts import PLAIN_FLOATS, asked_dtype
from ..._checkpoint import Checkpoint, Verify, open_checkpoint
from ..._destination import own_files
from ..._directory import warn_of_older
from ..._durable import make_directories
from ..._hub import Download, Upload, resolve_directory, upload_directory
from ..._native import FlashPackError
from ..._options import Casts, Filters, LoadOptions, Sharing, Strictness
from ..._paths import StrPath
from ..._plan import slots_of
from ..._repository import blaming, check_model_config
from ..._transfers import ReadOptions
from ...constants import (
    DEFAULT_ALIGN_BYTES,
    DEFAULT_CHUNK_BYTES,
    DEFAULT_NUM_STREAMS,
    DEFAULT_NUM_WRITE_WORKERS,
    WEIGHTS_NAME,
)
from ...mixin import FlashPackMixin
from ...utils import string_to_dtype
from .._arguments import flashpack_file, main_dtype, placement_of, requested_dtype, without_unknown
from .._classes import original_class

Self = TypeVar("Self", bound="FlashPackDiffusersModelMixin")


class FlashPackDiffusersModelMixin(ModelMixin, FlashPackMixin):
    """Adds save_pretrained_flashpack() and from_pretrained_flashpack() to a model of diffusers.

    `class MyUNet(UNet2DConditionModel, FlashPackDiffusersModelMixin): pass`, under any name. Files name the base, so
    that they load in any process. A class that changes what it inherits is named itself, and must be there for a load.
    """

    flashpack_init_method: ClassVar[str | None] = "from_config"

    def save_pretrained_flashpack(
        self,
        save_directory: StrPath,
        *,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        target_dtype: torch.dtype | None = None,
        align_bytes: int = DEFAULT_ALIGN_BYTES,
        silent: bool = True,
        num_workers: int = DEFAULT_NUM_WRITE_WORKERS,
        commit_message: str | None = None,
        create_pr: bool = False,
        token: str | None = None,
        repo_id: str | None = None,
        private: bool | None = None,
        checksum: bool = True,
        **kwargs: Any,
    ) -> None:
        """Writes `model.flashpack` and `config.json` into a directory, which is made if need be.

        Older weights of another format stay there, and are logged, because programs without flashpack load them.

        `is_main_process`: ranks that pass False write and upload nothing.
        `push_to_hub`: uploads the directory, to `repo_id` or, without one, to a repository of the directory's name.
        The other arguments are those of pack_to_file. `kwargs` that save_flashpack does not take are logged.

        Raises FlashPackError (a ValueError) for what cannot be saved, OSError for the system's failures.
        """
        if not is_main_process:
            return
        if getattr(self, "hf_quantizer", None) is not None:
            raise FlashPackError(f"{type(self).__name__} is quantized; its tensors alone do not make it again")
        directory = make_directory(save_directory)
        save = self.save_flashpack
        options = without_unknown(save.__qualname__, kwargs, inspect.signature(save).parameters)
        path = directory / WEIGHTS_NAME
        save(
            path,
            target_dtype,
            align_bytes=align_bytes,
            silent=silent,
            num_workers=num_workers,
            checksum=checksum,
            **options,
        )
        own_files(directory, "*.json")
        self.save_config(directory)
        warn_of_older(path)
        if push_to_hub:
            upload_directory(directory, Upload(repo_id, token, private, create_pr, commit_message))

    @classmethod
    def from_pretrained_flashpack(
        cls: type[Self],
        pretrained_model_name_or_path: StrPath,
        device: str | torch.device | None = None,
        *,
        silent: bool = True,
        strict: bool | None = None,
        strict_params: bool = True,
        strict_buffers: bool = False,
        keep_flash_ref_on_model: bool = False,
        num_streams: int = DEFAULT_NUM_STREAMS,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
        ignore_names: Collection[str] | None = None,
        ignore_prefixes: Collection[str] | None = None,
        ignore_suffixes: Collection[str] | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        local_dir: StrPath | None = None,
        local_dir_use_symlinks: bool = False,
        local_files_only: bool = False,
        cache_dir: StrPath | None = None,
        token: str | None = None,
        force_download: bool = False,
        proxies: dict[str, str] | None = None,
        use_distributed_loading: bool = False,
        distributed_sharded: bool = False,
        distributed_shard_strategy: str | None = None,
        rank: int | None = None,
        local_rank: int | None = None,
        world_size: int | None = None,
        coerce_dtype: bool = False,
        mmap: bool = False,
        verify: Verify = "auto",
        **kwargs: Any,
    ) -> Self:
        """Returns the model of a directory, or of a repository on the Hub; only files that it needs are downloaded.

        The model is built from `config.json` without memory for its parameters, as in FlashPackMixin.from_flashpack
        (accelerate is not needed), gets the tensors of `model.flashpack`, and is in eval mode.
        Floating-point parameters and buffers have the dtypes of the file, unless `dtype` asks for another.

        `kwargs`: `dtype` or `torch_dtype`, but modules that the class keeps in float32 stay so; `device_map`, without
        effect beside `device`, where "auto" and its like mean the current GPU, and several devices must all be GPUs;
        `config`, instead of config.json. Any other overrides an entry of the config, or is logged if the class does not
        take it.
        The other arguments are those of from_flashpack and of huggingface_hub.snapshot_download.

        Raises FileNotFoundError without `model.flashpack`, OSError without config.json, FlashPackError if the class
        cannot be built from it, and what assign_from_file raises.
        """
        download = Download(subfolder, revision, cache_dir, local_dir, token, force_download, local_files_only, proxies)
        device_map = kwargs.pop("device_map", None)
        placed = placement_of(device_map if device is None else {"": device})
        options = LoadOptions(
            placed.device,
            Filters(ignore_names, ignore_prefixes, ignore_suffixes),
            Strictness(strict, strict_params, strict_buffers),
            Casts(coerce_dtype, requested_dtype(kwargs)),
            ReadOptions(mmap, verify, not silent),
            Sharing(
                use_distributed_loading, distributed_sharded, distributed_shard_strategy, rank, local_rank, world_size
            ),
            keep_flash_ref_on_model,
        )
        return placed.dispatch(_load(cls, pretrained_model_name_or_path, download, options, kwargs))

    @classmethod
    def _flashpack_fitted(cls, model: Any, path: StrPath, options: LoadOptions) -> tuple[StrPath, LoadOptions]:
        if not isinstance(path, Checkpoint):
            return path, options
        names = _names_in(model, path)
        slots, patterns = slots_of(model), getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        ignored = [name for name in names if name not in slots and any(re.search(each, name) for each in patterns)]
        renamed = {old: name for name, old in names.items() if old != name}
        filters = options.filters.after_renaming(names.values(), renamed, slots).also(ignored)
        return path.renamed(renamed), options._replace(filters=filters)

    def to_json_string(self) -> str:
        """Returns the config as ConfigMixin does, but names the class that is loadable without flashpack."""
        original = original_class(type(self), FlashPackDiffusersModelMixin)
        if original is type(self):
            return str(super().to_json_string())
        stand_in = original.__new__(original)
        stand_in.register_to_config(**self.config)
        return str(stand_in.to_json_string())


def make_directory(path: StrPath) -> Path:
    directory = Path(path)
    if directory.exists() and not directory.is_dir():
        raise FlashPackError(f"Save directory {directory} is not a directory")
    make_directories(directory)
    return directory


def _load(
    cls: type[Self], path_or_repo: StrPath, download: Download, options: LoadOptions, kwargs: dict[str, Any]
) -> Self:
    directory = resolve_directory(path_or_repo, download, (WEIGHTS_NAME, "config.json"))
    path = flashpack_file(directory)
    coerce_dtype, dtype = options.casts
    dtype = asked_dtype(dtype)
    # _build() gives the model the dtypes that are wanted, so the tensors are cast to those of the model.
    options = options._replace(casts=Casts(coerce_dtype or dtype is not None))
    config = kwargs.pop("config", None)
    if config is None:
        config = check_model_config(directory) or cls.load_config(directory)
    with open_checkpoint(path) as checkpoint:
        build = partial(_build, cls, directory, config, kwargs, checkpoint, dtype)
        model = cls.from_flashpack(checkpoint, init_fn=build, **options.keywords())
    model.register_to_config(_name_or_path=os.fspath(path_or_repo))
    return model


def _build(
    cls: Any,
    directory: Path,
    config: Mapping[str, Any],
    kwargs: dict[str, Any],
    checkpoint: Checkpoint,
    dtype: torch.dtype | None,
) -> Any:
    """Returns a new model whose floating-point tensors have the dtypes that the load is to end with."""
    with blaming(directory / "config.json"), _default_dtype(main_dtype(checkpoint) if dtype is None else dtype):
        _, unused, _ = cls.extract_init_dict(dict(config), **kwargs)
        overrides = without_unknown(cls.__name__, kwargs, kwargs.keys() - unused.keys())
        model = cls._flashpack_builder()(config, **overrides)
    dtypes = {entry.name: string_to_dtype(entry.dtype) for entry in checkpoint.entries()}
    stored = {name: dtypes[old] for name, old in _names_in(model, checkpoint).items()}
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, slot in slots_of(model).items():
        wanted = stored.get(name)
        if wanted is not None and dtype is not None:
            wanted = torch.float32 if kept.intersection(name.split(".")) else dtype
        if wanted is not None and wanted.is_floating_point:
            data = slot.value.data
            slot.value.data = data.to(wanted) if data.is_floating_point() else data
    return model


def _names_in(model: Any, checkpoint: Checkpoint) -> dict[str, str]:
    """Returns the names in the file by those that the model has for them, where diffusers knows older names."""
    names = OrderedDict((entry.name, entry.name) for entry in checkpoint.entries())
    if isinstance(model, ModelMixin):
        model._fix_state_dict_keys_on_load(names)  # It moves the values of a state dict to other keys.
    return names


@contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """Within it, constructors make tensors such as position tables in `dtype`, as in a load by diffusers."""
    before = torch.get_default_dtype()
    if dtype in PLAIN_FLOATS:  # torch allows no others as default.
        torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
