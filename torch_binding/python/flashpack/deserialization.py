"""Reading flashpack files: as blocks, as a state dict, or into a module."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ._assign import AssignReport, Casts, Filters, Plan, check_strictness, commit, make_plan
from ._device import CPU, captures_undisturbed
from ._distributed import Ranks, join_ranks, ranks_of_group, resolve_shard_strategy
from ._engine import engine, left_before_exit
from ._footer import Footer, StrPath, Verify, get_flashpack_file_metadata, is_flashpack_file, open_footer
from ._logging import in_one_line
from ._memory import ReadBlocks, ReadOptions, Wanted, read_blocks, read_tensors, supported_device, tensors_of
from ._meta_init import warn_of_meta
from ._native import FlashPackError
from ._own_code import run_own_code
from ._progress import progress_bar
from .constants import DEFAULT_CHUNK_BYTES, DEFAULT_NUM_STREAMS, FILE_FORMAT_V3
from .utils import human_num_elements, is_ignored_tensor_name, listed, logger

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


@dataclass
class FlashTensorStorage:
    """The payload of a file: one flat tensor per macroblock."""

    blocks: list[torch.Tensor]
    backing_arrays: list[Any] | None = None
    """None: blocks own their memory."""
    stats: dict[str, Any] | None = None
    """How the bytes came: bytes by route, operations, seconds, backend and why a slower one was taken, if one was."""

    def block(self, idx: int) -> torch.Tensor:
        return self.blocks[idx]

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        return self.blocks[0].device if self.blocks else torch.device("cpu")


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

    `metadata`: the footer, if the caller has it already; returned as it is, after a check that it is this file's.
    `mmap`: maps the file instead of reading it (CPU only). Nothing is read before it is touched, writes stay private,
    and if somebody truncates the file while the tensors live, touching them kills the process (SIGBUS).
    `verify`: see assign_from_file.
    `chunk_bytes`, `num_streams`: accepted for compatibility; the engine knows better.

    Raises FlashPackError (a ValueError) for a file or an argument that is not valid, OSError for the system's failures.
    """
    options = ReadOptions(mmap, verify, not silent)
    target = supported_device(device, options)
    with open_footer(path) as footer:
        result = _accepted(metadata, footer)
        return _read_blocks(footer, target, options), result


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
    """read_flashpack_file on every rank of the process group, of which only `src` reads; the others get its bytes.

    All ranks have to call it, and only `src` has to see the file. What fails on one rank raises on all.

    `sharded`, `shard_strategy`: checked, and without effect on what is read by whom.

    Raises what read_flashpack_file raises; RuntimeError without a process group, and for what failed on another rank.
    """
    ranks = ranks_of_group(device, src)
    with ranks.together():
        ranks.check(False, sharded, shard_strategy)
        options = ReadOptions(show=not silent)
        target = supported_device(device, options)
        with ranks.footer(path) as footer:
            result = _accepted(metadata, footer)
            storage = _read_blocks(footer, target, options, ranks.read_blocks)
    return storage, result


def iterate_from_flash_tensor(
    flash_tensor: FlashTensorStorage | torch.Tensor,
    metadata: dict[str, Any],
    ignore_names: Collection[str] | None = None,
    ignore_prefixes: Collection[str] | None = None,
    ignore_suffixes: Collection[str] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, view of its block) for every tensor of `metadata` that is not ignored, in file order.

    Trusts nothing in `metadata`. Raises FlashPackError naming the record that does not fit its block.
    """
    storage = flash_tensor if isinstance(flash_tensor, FlashTensorStorage) else FlashTensorStorage([flash_tensor])
    index = _index_of(metadata)
    _check_alignment(storage, index, metadata.get("align_bytes", 0))
    filters = (listed(ignore_names), listed(ignore_prefixes), listed(ignore_suffixes))
    for record in index:
        if not is_ignored_tensor_name(record["name"], *filters):
            yield record["name"], _view(storage, record)


@left_before_exit
def revert_from_file(path: StrPath, silent: bool = True) -> dict[str, torch.Tensor]:
    """The state dict that was packed, in file order, on the CPU. Each tensor owns its memory."""
    with open_footer(path) as footer, torch.inference_mode(False), torch.no_grad():
        return read_tensors(footer, footer.entries(), CPU, ReadOptions(show=not silent))


@left_before_exit
def verify_file(path: StrPath, silent: bool = True) -> dict[str, Any]:
    """Reads the payload of a file, at the speed of the disk, and holds it against the checksums written with it.

    Returns `verified_bytes`, which match; `corrupt`, a list of (file offset, size in bytes, names of the tensors there)
    of the stripes that do not; and `seconds`. Raises FlashPackError for a file that has no checksums or is not valid,
    OSError for the system's failures.
    """
    with open_footer(path) as footer, progress_bar("Verifying", footer.native.payload_bytes, not silent) as progress:
        return engine().verify(footer.fileno(), footer.path, footer.native, progress)


@left_before_exit
@captures_undisturbed()
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
    dtype: torch.dtype | None = None,
) -> AssignReport:
    """Gives the parameters and buffers of `model` the values of a file, all of them or, if anything fails, none.

    Names, shapes and buffer dtypes are checked before a byte of the payload is read. Parameters stay the objects they
    are (optimizers, hooks and ties stay valid) and take the dtype of the file; meta parameters are replaced. Tensors
    that the model holds under several names are read once, from the first name in the file. What the file does not
    have is moved to the device; only meta tensors, of which a warning tells, and parameters of classes that change what
    tensors do stay. Loading code of the model's own (hooks of load_state_dict, overridden methods, set_extra_state())
    runs as in load_state_dict() once everything is read; the checks of what it is given come after it. If it fails,
    parameters, buffers and the attributes of modules are what they were.

    `device`: where everything ends; default: `model.device`, else that of the first parameter; the CPU if that is meta.
    `strict_params`, `strict_buffers`: whether those that the file lacks are an error (non-persistent buffers never
    are); with either, so are names that the model lacks. `strict` stands for both.
    `ignore_*`: names neither read nor required.
    `coerce_dtype`: casts to the model's dtypes, which else must agree for buffers; integers where no value changes.
    `dtype`: what floating-point or complex tensors of the file are cast to, those of buffers too, as in load_file.
    `verify`: "auto" holds what is read in whole stripes of 1 MiB against the checksums of the file, if it has them;
    "always" all of it, and a file without checksums is an error; "never" reads only.
    `keep_flash_ref_on_model`: reads whole macroblocks, lets the tensors share their memory, and keeps them and the
    footer as `_flash_shared_storage` and `_flash_shared_storage_meta`.
    `mmap`: as in read_flashpack_file. `num_streams`, `chunk_bytes`: accepted for compatibility.
    `use_distributed_loading`: all ranks of the process group call this; rank 0 reads what any of them wants, and the
    others get its bytes without having to see the file. What fails on one rank raises on all, and changes no module
    unless it was the last step, moving and casting, that failed. Without a group, one is made of `rank`, `local_rank`
    and `world_size`; in a world of one, this process loads alone. `distributed_*`: see read_flashpack_file_distributed.

    Returns what was assigned, missing, unexpected and left on the meta device, and how the bytes came.

    Raises FlashPackError (a ValueError) for a file that is not valid or does not fit, OSError for the system's
    failures, RuntimeError for what failed on another rank. Not to be called while other threads use `model`.
    """
    options = ReadOptions(mmap, verify, not silent)
    filters = (listed(ignore_names), listed(ignore_prefixes), listed(ignore_suffixes))
    strictness = (strict, strict_params, strict_buffers)
    wish = _Wish(filters, Casts(coerce_dtype, dtype), strictness, keep_flash_ref_on_model)
    device = _device_of(model) if device is None else device
    ranks = join_ranks(device, rank, local_rank, world_size) if use_distributed_loading else Ranks()
    with ranks.together():
        ranks.check(mmap, distributed_sharded, distributed_shard_strategy)
        target = supported_device(device, options)
        with ranks.footer(path) as footer:
            plan, stats = _assign(model, footer, target, options, ranks, wish)
    return _report(model, plan, path, stats)


class _Wish(NamedTuple):
    """What is to be assigned, and how."""

    filters: Filters
    casts: Casts
    strictness: tuple[bool | None, bool, bool]
    keep_storage: bool


def _assign(
    model: torch.nn.Module, footer: Footer, device: torch.device, options: ReadOptions, ranks: Ranks, wish: _Wish
) -> tuple[Plan, dict[str, Any] | None]:
    """Has `model` take what the file has, by code of its own, too, or leaves it as it was."""
    with _blamed_on(model, footer, TypeError, ValueError):
        plan = make_plan(model, footer.entries(), wish.filters, wish.casts)
    if not plan.own_code:
        check_strictness(plan, footer.path, *wish.strictness)
    with_gradients = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.no_grad(), ExitStack() as undo:
        tensors, storage, stats = _load(plan, footer, device, options, ranks, wish.keep_storage)
        ranks.agree()
        given = commit(plan, tensors, device, wish.casts, undo)
        if plan.own_code:
            with _blamed_on(model, footer, Exception), torch.set_grad_enabled(with_gradients):
                run_own_code(model, plan, given, undo)
            check_strictness(plan, footer.path, *wish.strictness)
        undo.pop_all()
    if storage is not None:
        model._flash_shared_storage = storage  # type: ignore[assignment]
        model._flash_shared_storage_meta = footer.metadata  # type: ignore[assignment]
    return plan, stats


def _load(
    plan: Plan, footer: Footer, device: torch.device, options: ReadOptions, ranks: Ranks, as_blocks: bool
) -> tuple[dict[str, torch.Tensor], FlashTensorStorage | None, dict[str, Any] | None]:
    """The tensors that `plan` wants, and the statistics; `as_blocks` as views of the whole payload, which is returned,
    too.
    """
    entries = plan.wanted + plan.passed_on
    if as_blocks:
        storage = _read_blocks(footer, device, options, ranks.read_blocks)
        index = footer.metadata["index"]
        # Through `data`, so that each has a version counter of its own.
        shared = {entry.name: _view(storage, index[entry.number]).data for entry in entries}
        return shared, storage, storage.stats
    entries = ranks.wanted_by_any(footer, entries)
    filled = ranks.read_blocks(footer, Wanted(footer.native, entries), device, options)
    return tensors_of(entries, filled), None, filled.stats


def _accepted(metadata: dict[str, Any] | None, footer: Footer) -> dict[str, Any]:
    """The footer that the caller has, else that of the file, with a macroblock for every record."""
    if metadata is not None and not _describes(metadata, footer):
        raise FlashPackError(f"{footer.path}: the metadata given is not that of this file")
    result = footer.metadata if metadata is None else metadata
    for record in _index_of(result):
        record.setdefault("macroblock", 0)
    return result


@contextmanager
def _blamed_on(model: torch.nn.Module, footer: Footer, *kinds: type[Exception]) -> Iterator[None]:
    """Errors of these kinds say what was being assigned to what."""
    try:
        yield
    except torch.OutOfMemoryError:  # Callers tell it by its class.
        raise
    except kinds as error:
        raise FlashPackError(
            f"Error while assigning to {type(model).__name__} from {footer.path}: {in_one_line(error)}"
        ) from error


def _read_blocks(
    footer: Footer, device: torch.device, options: ReadOptions, read: ReadBlocks = read_blocks
) -> FlashTensorStorage:
    macroblocks = footer.macroblocks()
    with torch.inference_mode(False), torch.no_grad():
        filled = read(footer, Wanted(footer.native.macroblocks, macroblocks), device, options)
        blocks = [block.to(device) for block in tensors_of(macroblocks, filled).values()]
    return FlashTensorStorage(blocks, stats=filled.stats)


def _device_of(model: torch.nn.Module) -> str | torch.device:
    device = getattr(model, "device", None)
    if isinstance(device, (str, torch.device)) and torch.device(device).type != "meta":
        return device
    first = next((parameter for parameter in model.parameters() if not parameter.is_meta), None)
    return torch.device("cpu") if first is None else first.device


def _describes(metadata: dict[str, Any], footer: Footer) -> bool:
    ours = [(each.dtype, each.offset_bytes, each.elems) for each in footer.macroblocks()]
    try:
        if metadata.get("format") == FILE_FORMAT_V3:
            return [(metadata["target_dtype"], 0, metadata["total_elems"])] == ours
        blocks = metadata["macroblocks"]
        return [(block["dtype"], block["offset_bytes"], block["length_elems"]) for block in blocks] == ours
    except (KeyError, TypeError, ValueError, AttributeError):
        return False


def _index_of(metadata: Any) -> list[dict[str, Any]]:
    """The records of `metadata`, once it is known that they are records and have names."""
    index = metadata.get("index") if isinstance(metadata, dict) else None
    if not isinstance(index, list):
        raise FlashPackError("the metadata has no list 'index'")
    for record in index:
        if not isinstance(record, dict) or not isinstance(record.get("name"), str):
            raise FlashPackError(f"Could not get tensor for record {record!r}: it is no object with a name")
    return index


def _block_of(storage: FlashTensorStorage, record: dict[str, Any]) -> torch.Tensor:
    which = record.get("macroblock")
    which = 0 if which is None else which
    if type(which) is not int or not 0 <= which < len(storage):
        raise FlashPackError(f"Index entry references macroblock {which}, but only {len(storage)} blocks exist.")
    return storage.block(which)


def _is_count(number: Any) -> bool:
    return type(number) is int and number >= 0


def _check_alignment(storage: FlashTensorStorage, index: list[dict[str, Any]], align_bytes: int) -> None:
    if not _is_count(align_bytes):
        raise FlashPackError(f"align_bytes must be >= 0, got {align_bytes!r}")
    misaligned = []
    for record in index if align_bytes else ():
        align_elems = align_bytes // math.gcd(align_bytes, _block_of(storage, record).element_size())
        offset: Any = record.get("offset")
        if not _is_count(offset) or offset % align_elems:
            misaligned.append(repr(record["name"]))
    if misaligned:
        raise FlashPackError(f"{len(misaligned)} index entries are misaligned (e.g., {', '.join(misaligned[:3])}).")


def _view(storage: FlashTensorStorage, record: dict[str, Any]) -> torch.Tensor:
    block = _block_of(storage, record)
    fields: tuple[Any, Any, Any] = (record.get("offset"), record.get("length"), record.get("shape"))
    offset, length, shape = fields
    if (
        not isinstance(shape, (list, tuple))
        or not all(map(_is_count, (offset, length, *shape)))
        or math.prod(shape) != length
        or offset + length > block.numel()
    ):
        raise FlashPackError(f"Could not get tensor for record {record}: it does not fit {block.numel()} elements")
    return block.narrow(0, offset, length).view(tuple(shape))


def _report(model: torch.nn.Module, plan: Plan, path: StrPath, stats: dict[str, Any] | None) -> AssignReport:
    elements = human_num_elements(sum(entry.elems for entry in plan.wanted))
    logger.info("assigned %d tensors (%s elements) to %d names", len(plan.wanted), elements, len(plan.slots))
    missing = plan.missing_parameters + plan.missing_buffers
    if plan.unexpected:
        logger.info("not in the model: %s", plan.unexpected)
    if missing:
        logger.info("not in the file: %s", missing)
    left_on_meta = warn_of_meta(model, path)
    return AssignReport(tuple(plan.assigned()), tuple(missing), tuple(plan.unexpected), left_on_meta, stats)
