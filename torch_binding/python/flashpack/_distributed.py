"""Loading on all ranks of a process group, of which one reads the file.

Before ranks exchange anything, they agree that none of them has failed so far. If one has, all raise, so that no rank
waits for bytes that will not come. Ranks exchange JSON and raw bytes, never pickles.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from . import _native
from ._checkpoint import Checkpoint, Entry, open_checkpoint
from ._device import CPU
from ._logging import in_one_line
from ._memory import Block, allocate
from ._native import FlashPackError
from ._paths import StrPath, name_of
from ._tensors import read_blocks
from ._transfers import Filled, ReadOptions, Wanted, fill, make_room
from .constants import DEFAULT_SHARD_STRATEGY, SHARD_STRATEGIES
from .utils import is_distributed, logger, maybe_init_distributed

# This bounds the memory of a backend beside the tensor: Gloo copies device memory through the host window by window.
_WINDOW_BYTES = 64 << 20


@dataclass
class Ranks:
    """The ranks that load together. By default this process is alone, and exchanges nothing."""

    rank: int = 0
    count: int = 1
    src: int = 0
    """The rank that reads."""
    device: torch.device = CPU
    """The device that this rank loads to."""
    _parted: bool = field(default=False, init=False)
    """Whether a rank has failed and all ranks know it, so that they exchange nothing any more."""

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around what all ranks do. If it raises on one, it raises on all, at their next exchange or at the end."""
        try:
            yield
        except BaseException as error:
            self._agree(f"{type(error).__name__}: {in_one_line(error)}")
            raise
        self.agree()

    def agree(self) -> None:
        """Waits for all ranks. Raises RuntimeError if one of them has failed so far."""
        self._agree(None)

    def check(self, mmap: bool, sharded: bool, shard_strategy: str | None) -> None:
        """Raises FlashPackError for options that these ranks cannot have."""
        if sharded:
            resolve_shard_strategy(shard_strategy)
        if self.count > 1 and mmap:
            raise FlashPackError("mmap=True maps the file on every rank, so that there is nothing to distribute")
        if is_distributed() and _is_nccl_alone() and self.device.type != "cuda":
            raise FlashPackError(f"distributed loading with the NCCL backend needs a cuda device, got {self.device}")

    @contextmanager
    def checkpoint(self, path: StrPath) -> Iterator[Checkpoint]:
        """Yields the checkpoint that rank `src` opens, until the end. Other ranks need not see the files."""
        if self.rank == self.src:
            with open_checkpoint(path) as checkpoint:
                self._send_headers(checkpoint)
                yield checkpoint
        else:
            received = self._receive_headers(name_of(path))
            yield received.renamed(path.names) if isinstance(path, Checkpoint) else received

    def _send_headers(self, checkpoint: Checkpoint) -> None:
        if self.count > 1:
            headers = [(os.fspath(file), *rest) for file, *rest in checkpoint.native.headers]
            self.agree()
            self._send([self.device.type, headers, checkpoint.native.weight_map], self.src)

    def _receive_headers(self, path: str) -> Checkpoint:
        self.agree()
        device_type, headers, weight_map = self._send(None, self.src)
        if self.device.type != device_type:  # Ranks would wait for each other in two backends.
            raise FlashPackError(f"ranks load to different devices: {self.device.type} and {device_type}")
        return Checkpoint(path, _native.checkpoint_of_headers(path, [tuple(header) for header in headers], weight_map))

    def wanted_by_any(self, checkpoint: Checkpoint, wanted: list[Entry]) -> list[Entry]:
        """Returns the entries that any rank wants, because models and ignored names may differ between ranks."""
        entries = checkpoint.entries() if self.count > 1 else []
        if not entries:
            return wanted
        names = {entry.name for entry in wanted}
        mask = torch.tensor([entry.name in names for entry in entries], dtype=torch.uint8, device=self._message_device)
        self.agree()
        dist.all_reduce(mask, dist.ReduceOp.MAX)
        return [entry for entry, is_wanted in zip(entries, mask.tolist(), strict=True) if is_wanted]

    def read_blocks(self, wanted: Wanted, device: torch.device, options: ReadOptions) -> Filled:
        """Does as read_blocks of _memory, but rank `src` reads, and the others get its bytes. All want the same.

        Blocks that have been read are passed on while the rest is being read.
        """
        if self.count == 1:
            return read_blocks(wanted, device, options)
        self.agree()
        filling = make_room(wanted, device, options) if self.rank == self.src else None
        window = None
        # The rank that reads has its blocks on the CPU if its engine cannot use the device.
        if filling is not None and filling.side.device.type != device.type:
            # Once the others wait for bytes, this rank must not run out of memory.
            largest = max((block.memory.numel() for block in filling.blocks), default=0)
            window = torch.empty(min(largest, _WINDOW_BYTES), dtype=torch.uint8, device=device)
        self.agree()
        verify = self._send(options.verify, self.src)  # The places of tensors in blocks depend on it.
        if filling is not None:
            with closing(fill(wanted.checkpoint, [filling], options, as_stream=True)) as arrivals:
                for [numbers] in arrivals:
                    if numbers:
                        self._pass_on(filling.blocks, numbers, window)
            self._pass_on([], [], None)
            filled = filling.filled()
        else:
            home = CPU if device.type == "cpu" else device
            plan = wanted.plan(device, verify)
            filled = Filled(allocate(plan, home, home), plan.places, home, None)
            while self._pass_on(filled.blocks, None, None):
                pass
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        return filled

    def _pass_on(self, blocks: Sequence[Block], numbers: list[int] | None, window: torch.Tensor | None) -> bool:
        """Broadcasts the blocks whose numbers rank `src` gives, and returns whether there were any.

        `window`: memory of the device for what was read elsewhere; None if it was read there.
        """
        self.agree()
        numbers = self._send(numbers, self.src)
        for number in numbers or ():
            self._broadcast(blocks[number].memory, window)
        return bool(numbers)

    def _broadcast(self, memory: torch.Tensor, window: torch.Tensor | None) -> None:
        for begin in range(0, memory.numel(), _WINDOW_BYTES):
            part = memory[begin : begin + _WINDOW_BYTES]
            dist.broadcast(part if window is None else window[: part.numel()].copy_(part), self.src)

    def _agree(self, failure: str | None) -> None:
        """Exchanges with all ranks whether they have failed. Raises RuntimeError if others have, but not this one."""
        if self.count == 1 or self._parted:
            return
        self._parted = True  # If the exchange fails, it stays so.
        last_failed = torch.tensor(-1 if failure is None else self.rank, device=self._message_device)
        dist.all_reduce(last_failed, dist.ReduceOp.MAX)
        who = int(last_failed.item())
        if who < 0:
            self._parted = False
            return
        reason = self._send(failure, who)
        if failure is None:
            raise RuntimeError(f"distributed loading failed on another rank, {who}: {reason}")

    def _send(self, message: Any, sender: int) -> Any:
        """Returns the message of rank `sender`, which JSON can express, on every rank."""
        body = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8).to(self._message_device)
        size = torch.tensor(body.numel(), device=self._message_device)
        dist.broadcast(size, sender)
        if self.rank != sender:
            body = torch.empty(int(size.item()), dtype=torch.uint8, device=self._message_device)
        dist.broadcast(body, sender)
        return json.loads(body.cpu().numpy().tobytes())

    @property
    def _message_device(self) -> torch.device:
        if not _is_nccl_alone():
            return CPU
        return self.device if self.device.type == "cuda" else torch.device("cuda")


def ranks_of_group(device: str | torch.device, src: int = 0) -> Ranks:
    """Returns the ranks of the process group. Raises RuntimeError without one, FlashPackError if it has no `src`."""
    if not is_distributed():
        raise RuntimeError("distributed loading needs an initialized torch.distributed process group")
    count = dist.get_world_size()
    if not 0 <= src < count:
        raise FlashPackError(f"src must be a rank below {count}, got {src}")
    return Ranks(dist.get_rank(), count, src, torch.device(device))


def join_ranks(device: str | torch.device, rank: int | None, local_rank: int | None, world_size: int | None) -> Ranks:
    """Returns the ranks of the process group, which is made for several ranks if need be; else this process alone."""
    maybe_init_distributed(rank, local_rank, world_size)
    if is_distributed():
        return ranks_of_group(device)
    logger.info("no process group, and a world size of 1: this process loads alone")
    return Ranks()


def resolve_shard_strategy(strategy: str | None = None) -> str:
    """Returns the strategy's name in lower case; None stands for FLASHPACK_SHARD_STRATEGY or the default.

    A strategy has no effect, because one rank reads. Raises FlashPackError for an unknown name that is given, but
    ignores one in the environment.
    """
    name = (os.environ.get("FLASHPACK_SHARD_STRATEGY", "") if strategy is None else strategy).strip().lower()
    if name in SHARD_STRATEGIES:
        return name
    if strategy is not None:
        raise FlashPackError(f"unknown shard strategy '{strategy}'; known are {', '.join(SHARD_STRATEGIES)}")
    return DEFAULT_SHARD_STRATEGY


def _is_nccl_alone() -> bool:
    return dist.get_backend() in ("nccl", "cuda:nccl")
