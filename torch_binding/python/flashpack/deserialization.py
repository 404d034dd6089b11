"""Reading flashpack files: as macroblocks, as a state dict, or into a module."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any

import torch

from ._casts import DTypeLike, asked_dtype
from ._checkpoint import Verify, get_flashpack_file_metadata, is_flashpack_file, open_checkpoint
from ._device import CPU, captures_undisturbed
from ._distributed import ranks_of_group, resolve_shard_strategy
from ._engine import engine, left_before_exit
from ._hub_hashes import Named, hashes_of, named_for_its_hash
from ._loading import assign
from ._options import Casts, Filters, LoadOptions, Sharing, Strictness
from ._paths import StrPath
from ._progress import Progress, after, progress_bar
from ._report import AssignReport
from ._storage import FlashTensorStorage, accepted, iterate_from_flash_tensor, read_storage
from ._tensors import read_tensors
from ._transfers import ReadOptions, Wanted, supported_device
from .constants import DEFAULT_CHUNK_BYTES, DEFAULT_NUM_STREAMS

__all__ = [
    "AssignReport",
    "FlashTensorStorage",
    "assign_from_file",
    "get_flashpack_file_metadata",
    "is_flashpack_file",
    "iterate_from_flash_tensor",
    "read_flashpack_file",
    "read_flashpack_file_distributed",
    "resolve_shard_strategy",
    "revert_from_file",
    "verify_file",
]


@left_before_exit
@captures_undisturbed()
def read_flashpack_file(
    path: StrPath,
    device: str | torch.device = "cpu",
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    num_streams: int = DEFAULT_NUM_STREAMS,
    silent: bool = True,
    metadata: dict[str, Any] | None = None,
    mmap: bool = False,
    verify: Verify = "auto",
) -> tuple[FlashTensorStorage, dict[str, Any]]:
    """Reads the whole payload: one flat tensor per macroblock, and the footer, as iterate_from_flash_tensor takes them.

    The blocks own their memory and may be written to; views of a block share it.

    `metadata`: the footer, if the caller has it already. It is returned as it is if it is this file's, else an error.
    `mmap`: maps the file instead of reading it (CPU only). Nothing is read before it is touched, writes stay private,
    and if somebody truncates the file while the tensors live, touching them kills the process (SIGBUS).
    `verify`: see assign_from_file.
    `chunk_bytes`, `num_streams`: accepted for compatibility, without effect.

    Raises FlashPackError (a ValueError) for a file or an argument that is not valid, OSError for the system's failures.
    """
    options = ReadOptions(mmap, verify, not silent)
    target = supported_device(device, options)
    with open_checkpoint(path) as checkpoint:
        result = accepted(metadata, checkpoint)
        return read_storage(checkpoint, target, options), result


@left_before_exit
@captures_undisturbed()
def read_flashpack_file_distributed(
    path: StrPath,
    device: str | torch.device = "cuda",
    src: int = 0,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    num_streams: int = DEFAULT_NUM_STREAMS,
    silent: bool = True,
    metadata: dict[str, Any] | None = None,
    sharded: bool = False,
    shard_strategy: str | None = None,
) -> tuple[FlashTensorStorage, dict[str, Any]]:
    """Does read_flashpack_file on every rank of the process group: rank `src` reads, and the others get its bytes.

    All ranks have to call it, and only `src` has to see the file. A failure on one rank raises on all.

    `sharded`, `shard_strategy`: checked, but without effect.

    Raises what read_flashpack_file raises; RuntimeError without a process group, and for a failure on another rank.
    """
    ranks = ranks_of_group(device, src)
    with ranks.together():
        ranks.check(False, sharded, shard_strategy)
        options = ReadOptions(show=not silent)
        target = supported_device(device, options)
        with ranks.checkpoint(path) as checkpoint:
            result = accepted(metadata, checkpoint)
            storage = read_storage(checkpoint, target, options, ranks.read_blocks)
    return storage, result


@left_before_exit
def revert_from_file(path: StrPath, silent: bool = True) -> dict[str, torch.Tensor]:
    """Returns the state dict that was packed, in file order, on the CPU. No two tensors share bytes."""
    with open_checkpoint(path) as checkpoint, torch.inference_mode(False), torch.no_grad():
        return read_tensors(Wanted(checkpoint, checkpoint.entries()), CPU, ReadOptions(show=not silent))


@left_before_exit
def verify_file(path: StrPath, silent: bool = True) -> dict[str, Any]:
    """Reads a checkpoint, at the speed of the disk, and compares it with what says how it was written.

    The payload of a flashpack file is held against the checksums in its footer. A file without checksums, as
    safetensors files are, is held against its name if it lies in the cache of the Hugging Face Hub, where files are
    named for a hash of their content; this takes as long as hashing.

    Returns `verified_bytes`, which match; `corrupt`, for the stripes that do not match a list of (file offset, size in
    bytes, names of the tensors there); and `seconds`. For a file that does not match its name, `corrupt` has one
    stripe, which is the whole file, and instead of names a text with its path and both hashes. Raises FlashPackError
    for a file that has neither checksums nor such a name or is not valid, OSError for the system's failures.
    """
    report: dict[str, Any] = {"verified_bytes": 0, "corrupt": [], "seconds": 0.0}
    with open_checkpoint(path) as checkpoint:
        native = checkpoint.native
        blobs = [None if file.has_checksums else named_for_its_hash(file) for file in checkpoint.files()]
        named = [blob for blob in blobs if blob is not None]
        total_bytes = sum(blob.size_bytes for blob in named) if all(blobs) else native.payload_bytes
        with progress_bar("Verifying", total_bytes, not silent) as progress:
            for number in (number for number, blob in enumerate(blobs) if blob is None):
                tell = after(report["verified_bytes"], progress)
                for key, value in engine(None, checkpoint.files()[number]).verify(native, number, tell).items():
                    report[key] += value
            if named:
                _hold_against_names(named, report, after(report["verified_bytes"], progress))
    return report


def _hold_against_names(named: list[Named], report: dict[str, Any], progress: Progress | None) -> None:
    begin = time.monotonic()
    for blob, found in zip(named, hashes_of(named, progress), strict=True):
        if found == blob.hash:
            report["verified_bytes"] += blob.size_bytes
        else:
            text = f"{blob.file.path}: its {blob.algorithm} is {found}, but in the cache it is named {blob.hash}"
            report["corrupt"].append(
                (0, blob.size_bytes, f"{text}; delete the file of that name and download it again")
            )
    report["seconds"] += time.monotonic() - begin


def assign_from_file(
    model: torch.nn.Module,
    path: StrPath,
    device: str | torch.device | None = None,
    strict: bool | None = None,
    strict_params: bool = True,
    strict_buffers: bool = False,
    keep_flash_ref_on_model: bool = False,
    silent: bool = True,
    num_streams: int = DEFAULT_NUM_STREAMS,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    ignore_names: Collection[str] | None = None,
    ignore_prefixes: Collection[str] | None = None,
    ignore_suffixes: Collection[str] | None = None,
    use_distributed_loading: bool = False,
    distributed_sharded: bool = False,
    distributed_shard_strategy: str | None = None,
    rank: int | None = None,
    local_rank: int | None = None,
    world_size: int | None = None,
    coerce_dtype: bool = False,
    mmap: bool = False,
    verify: Verify = "auto",
    dtype: DTypeLike | None = None,
    in_place: bool = False,
) -> AssignReport:
    """Gives the parameters and buffers of `model` the values of a file, all of them or, if anything fails, none.

    Names, shapes and buffer dtypes are checked before a byte of the payload is read. Parameters stay the same objects
    (optimizers, hooks and ties stay valid) and take the dtype of the file; meta parameters are replaced. A tensor that
    the model holds under several names is read once, from the first of them in the file. Tensors that the file lacks
    move to the device, except meta tensors, of which a warning tells, and parameters of classes that change what
    tensors do. Loading code of the model's own (hooks of load_state_dict, overridden methods, set_extra_state()) runs
    as in load_state_dict() once everything is read, and missing or unexpected names are checked after it. If it fails,
    parameters, buffers and the attributes of modules are as before.

    `device`: for all tensors; default: `model.device`, else that of the first parameter; the CPU if that is meta. A
    warning tells if parameters are on several devices, which the default takes to one.
    `strict_params`, `strict_buffers`: whether those that the file lacks are an error (non-persistent buffers never
    are); with either, so are names that the model lacks. `strict` stands for both.
    `ignore_*`: names neither read nor required.
    `coerce_dtype`: casts to the model's dtypes, without which buffers must agree; no value of integers may change.
    `dtype`: floating-point or complex tensors of the file, those of buffers too, are cast to it, as in load_file.
    `in_place`: reads into the memory that the tensors of `model` have, so that no second copy is held, see below.
    `verify`: "auto" verifies all stripes of 1 MiB that are read whole, if the file has checksums; "always" verifies all
    that is wanted, and a file without checksums is an error; "never" verifies nothing.
    `keep_flash_ref_on_model`: reads whole macroblocks, lets the tensors share their memory, and keeps them and the
    footer as `_flash_shared_storage` and `_flash_shared_storage_meta`.
    `mmap`: as in read_flashpack_file. `num_streams`, `chunk_bytes`: accepted for compatibility, without effect.
    `use_distributed_loading`: all ranks of the process group call this; rank 0 reads what any of them wants, and the
    others get its bytes without having to see the file. A failure on one rank raises on all, and changes no module
    unless it comes in the last step, moving and casting. Without a group, one is made of `rank`, `local_rank` and
    `world_size`; in a world of one, this process loads alone. `distributed_*`: see read_flashpack_file_distributed.

    With `in_place`, tensors keep their memory, device and dtype: floating-point and complex values are cast to it while
    they are read, and other casts are an error. Meta tensors get new memory on `device`; for others, `device` can only
    say where they are. Names, shapes, dtypes and memory are checked before a byte is read, but it is not all or
    nothing: after an error in reading, which says so, tensors may have values of the file and older ones. What autograd
    has saved of them for a backward pass cannot be used any more. Models with loading code of their own are refused,
    as are `dtype`, `mmap`, `keep_flash_ref_on_model` and `use_distributed_loading`.

    Returns the names that were assigned, missing, unexpected and left on the meta device, and figures of the reads.

    Raises FlashPackError (a ValueError) for a file that is not valid or does not fit, OSError for the system's
    failures, RuntimeError for a failure on another rank. No other thread may use `model` meanwhile.
    """
    options = LoadOptions(
        device,
        Filters.of(ignore_names, ignore_prefixes, ignore_suffixes),
        Strictness(strict, strict_params, strict_buffers),
        Casts(coerce_dtype, asked_dtype(dtype)),
        ReadOptions(mmap, verify, not silent),
        Sharing(use_distributed_loading, distributed_sharded, distributed_shard_strategy, rank, local_rank, world_size),
        keep_flash_ref_on_model,
        in_place,
    )
    return assign(model, path, options)
