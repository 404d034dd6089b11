"""Contenders that take turns, each in a process of its own, and the tensors they move."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from page_cache import PageCacheError

Tensors = dict[str, torch.Tensor]
Item = TypeVar("Item")

SEED = 0
"""The seed of the numbers in generated tensors."""
STRIDE = 4099
"""Each generated tensor begins so many elements behind the one before in the numbers that they share."""


class Contender:
    """A process that answers each line it reads with a line of JSON; see `serve`."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        ours: bool = False,
        limit_s: float | None = None,
    ) -> None:
        """`limit_s`: how long an answer may take before the process is killed."""
        self.name = name
        self.ours = ours
        self.limit_s = limit_s
        self.failure: str | None = None
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, job: str) -> dict[str, Any]:
        """Raises PageCacheError if the page cache could not be made as the job needs it, which is no failure of the
        contender; RuntimeError if that fails.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(job + "\n")
        self.process.stdin.flush()
        # A line is an answer, so that nothing of it waits in the buffer of the stream.
        if not select.select([self.process.stdout], [], [], self.limit_s)[0]:
            self.process.kill()
            raise RuntimeError(f"{self.name} did not answer within {self.limit_s:g} s")
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} died with status {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "page_cache" in answer:
            raise PageCacheError(answer["page_cache"])
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return answer

    def attempt(self, job: str, check: Callable[[dict[str, Any]], None]) -> dict[str, Any] | None:
        """The answer, once `check` has let it pass. A peer that fails is out from then on, with its reason, and answers
        None; our own failure is raised.
        """
        if self.failure is not None:
            return None
        try:
            answer = self.ask(job)
            check(answer)
        except PageCacheError:
            raise
        except (RuntimeError, OSError) as error:
            if self.ours:
                raise
            self.failure = str(error)
            return None
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # It has died with a job unread.
            self.process.stdin.close()
        self.process.wait()


def serve(answer: Callable[[str], dict[str, Any]]) -> None:
    """The other end of a Contender: until the end of standard input. All other prints go to standard error."""
    # An interrupt of the terminal or of a limit reaches every process, and tracebacks would hide what was measured.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            result = answer(line.strip())
        except PageCacheError as error:
            result = {"page_cache": str(error)}
        except Exception as error:
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(result), file=answers, flush=True)


def in_turns(items: Sequence[Item], rounds: int) -> Iterator[tuple[Item, bool]]:
    """Every item once per round, another one first each time, and whether it counts: the first round is one more, and
    pays for what happens once in a process.
    """
    for turn in range(rounds + 1):
        first = turn % len(items)
        for item in [*items[first:], *items[:first]]:
            yield item, turn > 0


def publish(result: Mapping[str, Any], text: str, out: Path | None) -> None:
    """Prints `text`; to OUT.json and OUT.md, too, when there is an `out`."""
    if out is not None:
        out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
        out.with_suffix(".md").write_text(text)
    print(text, end="")


def decoder_tensors(size_gib: float) -> Tensors:
    """Those of a decoder in bfloat16, the same every time; at least so many bytes."""
    shapes = decoder_shapes(size_gib)
    return _layers(size_gib, shapes, 4 * shapes["q"][0] ** 2)


def decoder_shapes(size_gib: float) -> dict[str, tuple[int, ...]]:
    """The shapes of a layer of decoder_tensors()."""
    # One wide layer has more than a small model has in all.
    width = 4096 if size_gib >= 0.125 else 512
    return {"q": (width, width), "k": (width // 4, width), "up": (3 * width, width), "norm": (width,)}


def small_tensors(size_gib: float) -> Tensors:
    """The same in tensors of 2 to 512 KiB, as adapters, quantised weights and mixtures of small experts have them."""
    shapes = {"scale": (1024,), "down": (32, 1024), "up": (64, 1024), "out": (256, 1024)}
    return _layers(size_gib, shapes, 4 << 20)


def _layers(size_gib: float, shapes: Mapping[str, tuple[int, ...]], block_elems: int) -> Tensors:
    tensors: Tensors = {}
    # Making random numbers takes longer than loading them: all tensors are parts of one block, each from elsewhere.
    generator = torch.Generator().manual_seed(SEED)
    block = torch.randint(-(1 << 15), 1 << 15, (block_elems,), dtype=torch.int16, generator=generator)
    block = block.view(torch.bfloat16)
    size_bytes = 0
    while size_bytes < size_gib * (1 << 30):
        for part, shape in shapes.items():
            elements = torch.Size(shape).numel()
            begin = len(tensors) * STRIDE % (block.numel() - elements)
            tensor = block[begin : begin + elements].clone().view(shape)
            tensors[f"layers.{len(tensors) // len(shapes)}.{part}"] = tensor
            size_bytes += tensor.nbytes
    return tensors


def module_of(tensors: Tensors) -> torch.nn.Module:
    """Returns a module that has these tensors as its parameters, under their names."""
    module = torch.nn.Module()
    for name, tensor in tensors.items():
        owner = module
        *path, last = name.split(".")
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, torch.nn.Module())
            owner = owner.get_submodule(part)
        owner.register_parameter(last, torch.nn.Parameter(tensor, requires_grad=False))
    return module


def checksum(tensors: Tensors) -> int:
    """A sum over names, places and bytes, computed where the tensors are, many small ones at a time."""
    total = 0
    for names in _batches(tensors, 64 << 20):
        words = torch.cat([tensors[name].detach().contiguous().reshape(-1).view(torch.uint8) for name in names])
        words = torch.nn.functional.pad(words, (0, -words.numel() % 4)).view(torch.int32)
        weights = torch.arange(1, words.numel() + 1, dtype=torch.int64, device=words.device)
        words_sum = int((words.to(torch.int64) * weights).sum())
        total = (total * 1_000_003 + words_sum + sum("".join(names).encode())) % (1 << 64)
    return total


def _batches(tensors: Tensors, limit_bytes: int) -> Iterator[list[str]]:
    """Sorted names, each batch of at most so many bytes or of one tensor."""
    batch: list[str] = []
    size_bytes = 0
    for name in sorted(tensors):
        if batch and size_bytes + tensors[name].nbytes > limit_bytes:
            yield batch
            batch, size_bytes = [], 0
        batch.append(name)
        size_bytes += tensors[name].nbytes
    if batch:
        yield batch
