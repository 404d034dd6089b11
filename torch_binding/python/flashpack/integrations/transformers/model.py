"""FlashPackTransformersModelMixin: saving and loading for transformers models."""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from ..._checkpoint import Verify
from ..._destination import own_files
from ..._directory import warn_of_older
from ..._hub import Download, Upload, resolve_directory, upload_directory
from ..._native import FlashPackError
from ..._options import Casts, LoadOptions, Sharing, Strictness
from ..._paths import StrPath
from ..._transfers import ReadOptions
from ...constants import (
    DEFAULT_ALIGN_BYTES,
    DEFAULT_CHUNK_BYTES,
    DEFAULT_NUM_STREAMS,
    DEFAULT_NUM_WRITE_WORKERS,
    WEIGHTS_NAME,
)
from ...mixin import FlashPackMixin
from ...utils import dtype_to_string, logger
from .._arguments import flashpack_file
from .._classes import original_class
from ._load import load

FILES = ("config.json", "generation_config.json", WEIGHTS_NAME)


class FlashPackTransformersModelMixin(PreTrainedModel, FlashPackMixin):
    """Adds save_pretrained_flashpack() and from_pretrained_flashpack() to a transformers model.

    For a class of your own: `class MyModel(BertModel, FlashPackTransformersModelMixin)`. After
    patch_transformers_auto_model() all models of transformers have these methods, without the mixin.
    """

    flashpack_init_method: ClassVar[str | None] = "_from_config"

    def save_pretrained_flashpack(
        self,
        save_directory: StrPath,
        *,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        target_dtype: torch.dtype | None = None,
        align_bytes: int = DEFAULT_ALIGN_BYTES,
        silent: bool = True,
        commit_message: str | None = None,
        create_pr: bool = False,
        token: str | bool | None = None,
        repo_id: str | None = None,
        private: bool | None = None,
        num_workers: int = DEFAULT_NUM_WRITE_WORKERS,
        checksum: bool = True,
        metadata: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes `model.flashpack` and the configurations of model and generation into a directory, which must exist.

        `is_main_process`: ranks that pass False write nothing. `target_dtype`, `align_bytes`, `checksum`, `metadata`:
        as in pack_to_file. Older weights of another format stay beside it, and are logged, because programs without
        flashpack load them.
        `push_to_hub`: uploads these files to `repo_id`, by default the name of the directory, under the user's name.

        Raises FlashPackError (a ValueError) naming what cannot be written, OSError for the system's failures.
        """
        if not os.path.isdir(save_directory):
            raise FlashPackError(f"Save directory {save_directory} is not a directory")
        if kwargs:
            logger.warning("save_pretrained_flashpack does not take %s", ", ".join(kwargs))
        if not is_main_process:
            return
        directory = Path(save_directory)
        path = directory / WEIGHTS_NAME
        self.save_flashpack(
            path,
            target_dtype=target_dtype,
            align_bytes=align_bytes,
            silent=silent,
            num_workers=num_workers,
            checksum=checksum,
            metadata=metadata,
        )
        _save_config(self, directory, target_dtype)
        warn_of_older(path)
        if push_to_hub:
            upload = Upload(repo_id, token, private, create_pr, commit_message)
            upload_directory(directory, upload, [*FILES, "*.py"])

    @classmethod
    def from_pretrained_flashpack(
        cls,
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
        token: str | bool | None = None,
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
    ) -> Any:
        """Returns a new model, in eval mode, from a directory or a repository on the Hub with `model.flashpack` in it.

        `device`: the device of the model, by default the CPU. Attributes `flashpack_*` of the class are defaults of
        `ignore_*` and `coerce_dtype`. Arguments of the Hub mean what they mean in transformers, the others what they
        mean in assign_from_file. `kwargs` are those of from_pretrained() of transformers: `config`, `dtype`,
        `device_map`, `attn_implementation`, entries of the configuration and so on. A device map that leaves the choice
        of devices open, as "auto" does, means `device` or the current GPU; several devices must all be GPUs. Without
        `dtype` every tensor keeps its dtype in the file.

        Names in the file may be those of the module or of a checkpoint that transformers can convert. Weights that the
        file lacks, if that is no error, are initialised as transformers does.

        Raises FileNotFoundError without `model.flashpack`, and what assign_from_file raises.
        """
        download = Download(subfolder, revision, cache_dir, local_dir, token, force_download, local_files_only, proxies)
        options = LoadOptions(
            device,
            cls._flashpack_filters(ignore_names, ignore_prefixes, ignore_suffixes),
            Strictness(strict, strict_params, strict_buffers),
            Casts(coerce_dtype or cls.flashpack_coerce_dtype),
            ReadOptions(mmap, verify, not silent),
            Sharing(
                use_distributed_loading, distributed_sharded, distributed_shard_strategy, rank, local_rank, world_size
            ),
            keep_flash_ref_on_model,
        )
        return _load(cls, pretrained_model_name_or_path, download, options, kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Saves as transformers does, with the name of the original class in config.json."""
        save = super().save_pretrained
        with _as_original(self):
            return save(*args, **kwargs)


def _load(cls: Any, path_or_repo: StrPath, download: Download, options: LoadOptions, arguments: dict[str, Any]) -> Any:
    path = flashpack_file(resolve_directory(path_or_repo, download, FILES))
    output_loading_info = arguments.pop("output_loading_info", False)
    # transformers decides much by class names, so that it gets the original class.
    original = vars(cls).get("recipe", (cls,))[0]
    model, info = load(original, path, str(path_or_repo), options, arguments)
    model.__class__ = cls
    return (model, info) if output_loading_info else model


@contextmanager
def _as_original(model: PreTrainedModel) -> Iterator[None]:
    """Within it, `model` is an instance of the class whose name transformers is to write down."""
    promoted = type(model)
    model.__class__ = original_class(promoted, FlashPackTransformersModelMixin)
    try:
        yield
    finally:
        model.__class__ = promoted


def _save_config(model: PreTrainedModel, directory: Path, target_dtype: torch.dtype | None) -> None:
    """Writes what transformers needs to build the model again; that includes its code if the library lacks it."""
    config: PretrainedConfig = copy.deepcopy(model.config)
    config.architectures = [original_class(type(model), FlashPackTransformersModelMixin).__name__]
    config.dtype = dtype_to_string(target_dtype or model.dtype)
    own_files(directory, "*.json")
    if model._auto_class is not None:
        own_files(directory, "*.py")
        with _as_original(model):
            custom_object_save(model, directory, config=config)
    config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)
