"""Loads of a checkpoint to a CUDA device, beside disk, link and memory, and beside the peers that are installed.

Every contender has a process of its own, kept alive, and they take turns. What arrives is compared on the device with a
checksum of the source tensors. A contender that is not installed is named and left out.
"""

from __future__ import annotations

import argparse
import mmap
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contenders import Contender, Tensors, checksum, decoder_tensors, in_turns, publish, serve
from page_cache import drop_from_page_cache, warm

DEVICE = "cuda:0"


@contextmanager
def by_flashpack(folder: Path) -> Iterator[Tensors]:
    from flashpack.deserialization import iterate_from_flash_tensor, read_flashpack_file

    storage, metadata = read_flashpack_file(folder / "model.flashpack", DEVICE)
    yield dict(iterate_from_flash_tensor(storage, metadata))


@contextmanager
def by_safetensors(folder: Path) -> Iterator[Tensors]:
    from safetensors.torch import load_file

    yield load_file(folder / "model.safetensors", DEVICE)


@contextmanager
def by_fastsafetensors(folder: Path) -> Iterator[Tensors]:
    from fastsafetensors import fastsafe_open

    with fastsafe_open(filenames=[str(folder / "model.safetensors")], nogds=True, device=DEVICE) as file:
        yield {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@contextmanager
def by_instanttensor(folder: Path) -> Iterator[Tensors]:
    from instanttensor import safe_open

    with safe_open(str(folder / "model.safetensors"), framework="pt", device=0) as file:
        yield dict(file.tensors())


def seconds_of(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


class Rooflines:
    """The least that has to be done for a load, each part by itself. Bytes and seconds."""

    def __init__(self, folder: Path) -> None:
        from flashpack._native import Engine, read_footer

        self.path = folder / "model.flashpack"
        self.file = self.path.open("rb")
        self.footer = read_footer(self.file.fileno(), self.path)
        self.size_bytes = self.path.stat().st_size // mmap.PAGESIZE * mmap.PAGESIZE
        self.engine = Engine()
        self.memory = mmap.mmap(-1, self.size_bytes)
        self.memory.madvise(mmap.MADV_HUGEPAGE)
        self.target = torch.frombuffer(self.memory, dtype=torch.uint8)
        self.target.zero_()
        self.pinned = torch.empty(256 << 20, dtype=torch.uint8).pin_memory()
        self.on_device = torch.empty_like(self.pinned, device=DEVICE)

    def disk(self) -> tuple[int, float]:
        extents = [(0, self.size_bytes, self.target.data_ptr())]
        load = partial(self.engine.load, self.file.fileno(), self.path, extents, self.footer, "never", "direct")
        return self.size_bytes, seconds_of(load)

    def memcpy(self) -> tuple[int, float]:
        threads = min(8, os.cpu_count() or 1)
        part_bytes = -(-self.size_bytes // threads)
        view = memoryview(self.memory)

        def read(offset: int) -> None:
            end = min(offset + part_bytes, self.size_bytes)
            while offset < end:
                offset += os.preadv(file.fileno(), [view[offset : min(end, offset + (4 << 20))]], offset)

        with self.path.open("rb") as file, ThreadPoolExecutor(threads) as pool:
            offsets = range(0, self.size_bytes, part_bytes)
            return self.size_bytes, seconds_of(lambda: list(pool.map(read, offsets)))

    def h2d(self) -> tuple[int, float]:
        copies = 16
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(copies):
            self.on_device.copy_(self.pinned, non_blocking=True)
        end.record()
        end.synchronize()
        return copies * self.pinned.nbytes, begin.elapsed_time(end) / 1000

    def engine_start(self) -> tuple[int, float]:
        from flashpack._native import Engine

        return 0, seconds_of(lambda: Engine(0))


LOADERS = {
    "flashpack": by_flashpack,
    "flashpack-0.4.5": by_flashpack,
    "safetensors": by_safetensors,
    "fastsafetensors": by_fastsafetensors,
    "instanttensor": by_instanttensor,
}
OURS = ("rooflines", "flashpack")
ROOFLINES = {"cold": ["disk", "h2d"], "page cache": ["memcpy", "h2d"]}


def work(name: str, folder: Path) -> None:
    """The process of one contender: does what it reads on standard input, a line each."""
    torch.cuda.init()
    torch.ones(1, device=DEVICE)
    rooflines = Rooflines(folder) if name == "rooflines" else None

    def answer(job: str) -> dict[str, Any]:
        if rooflines is not None:
            size_bytes, seconds = getattr(rooflines, job)()
            return {"bytes": size_bytes, "seconds": seconds}
        torch.cuda.synchronize()
        started = time.perf_counter()
        with LOADERS[name](folder) as tensors:
            torch.cuda.synchronize()
            seconds = time.perf_counter() - started
            size_bytes = sum(tensor.nbytes for tensor in tensors.values())
            result = {"bytes": size_bytes, "seconds": seconds, "checksum": checksum(tensors)}
        del tensors
        torch.cuda.empty_cache()
        return result

    serve(answer)


class Loader(Contender):
    def __init__(self, name: str, folder: Path, packages: Path | None) -> None:
        self.rates: dict[str, list[float]] = {}
        environment = dict(os.environ)
        own = packages / name if packages is not None else None
        if own is not None and own.is_dir():
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(own), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, __file__, "--worker", name, "--dir", str(folder)]
        super().__init__(name, command, environment, ours=name in OURS)


def make_checkpoint(folder: Path, size_gib: float) -> int:
    """A decoder's tensors in bfloat16, as both kinds of file; returns their checksum."""
    import flashpack
    from safetensors.torch import save_file

    tensors = decoder_tensors(size_gib)
    flashpack.pack_to_file(tensors, folder / "model.flashpack", target_dtype=None)
    save_file(tensors, folder / "model.safetensors")
    return checksum(tensors)


def installed(name: str, packages: Path | None) -> bool:
    import importlib.util

    if name in OURS:
        return True
    if packages is not None and (packages / name).is_dir():
        return True
    return name != "flashpack-0.4.5" and importlib.util.find_spec(name) is not None


def prepare(path: Path, state: str) -> None:
    if state == "page cache":
        warm(path)
    elif (left := drop_from_page_cache(path)) > 0.001:
        raise RuntimeError(f"{left:.1%} of {path} could not be dropped from the page cache")


def measure(contenders: list[Loader], rooflines: Loader, folder: Path, rounds: int, expected: int) -> None:
    files = [folder / "model.flashpack", folder / "model.safetensors"]
    for state, parts in ROOFLINES.items():
        jobs = [(rooflines, part) for part in parts] + [(contender, "load") for contender in contenders]
        for (contender, job), counts in in_turns(jobs, rounds):
            for path in files:
                prepare(path, state)
            take_turn(contender, job, state, expected, counts)


def take_turn(contender: Loader, job: str, state: str, expected: int, counts: bool) -> None:
    def check(answer: dict[str, Any]) -> None:
        if job == "load" and answer["checksum"] != expected:
            raise RuntimeError(f"{contender.name} brought wrong bytes to the device ({state})")

    answer = contender.attempt(job, check)
    if counts and answer is not None:
        key = state if job == "load" else job
        contender.rates.setdefault(key, []).append(answer["bytes"] / answer["seconds"] / 1e9)


def report(contenders: list[Loader], rooflines: Loader) -> dict[str, Any]:
    roof = {part: statistics.median(rates) for part, rates in rooflines.rates.items()}
    limits = {state: min(roof[part] for part in parts) for state, parts in ROOFLINES.items()}
    starts = [rooflines.ask("engine_start")["seconds"] * 1000 for _ in range(7)]
    return {
        "device": torch.cuda.get_device_name(0),
        "kernel": platform.release(),
        "torch": torch.__version__,
        "rooflines_gb_per_s": roof,
        "limits_gb_per_s": limits,
        "engine_start_ms": statistics.median(starts),
        "loads_gb_per_s": {
            c.name: {state: statistics.median(c.rates[state]) for state in ROOFLINES}
            for c in contenders
            if c.failure is None
        },
        "failed": {c.name: c.failure for c in contenders if c.failure is not None},
        "rounds": {c.name: c.rates for c in [rooflines, *contenders]},
    }


def as_markdown(result: dict[str, Any], command: str) -> str:
    roof = result["rooflines_gb_per_s"]
    lines = [
        f"{result['device']}, Linux {result['kernel']}, torch {result['torch']}. Medians, in turns, by `{command}`.",
        f"Disk {roof['disk']:.2f} GB/s, pinned H2D {roof['h2d']:.2f}, page-cache memcpy {roof['memcpy']:.2f}; "
        f"an engine starts in {result['engine_start_ms']:.1f} ms. Bytes checked on the device in every round.",
        "",
        "| file to device | cold GB/s | of min(disk, H2D) | page cache GB/s | of min(memcpy, H2D) |",
        "|---|---|---|---|---|",
    ]
    for name, rates in result["loads_gb_per_s"].items():
        cells = [f"{rates[state]:.2f} | {rates[state] / result['limits_gb_per_s'][state]:.2f}" for state in ROOFLINES]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [f"| {name} | {reason} | | | |" for name, reason in result["failed"].items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path(), help="folder on the disk to measure")
    parser.add_argument("--size_gib", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--packages", type=Path, help="folder with one more folder of packages for each contender NAME")
    parser.add_argument("--out", type=Path, default=Path("device_bench"), help="for OUT.json and OUT.md")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.dir)
        return 0
    if not torch.cuda.is_available():
        print("no CUDA device that torch can use", file=sys.stderr)
        return 1
    expected = make_checkpoint(options.dir, options.size_gib)
    absent = [name for name in LOADERS if not installed(name, options.packages)]
    rooflines = Loader("rooflines", options.dir, options.packages)
    contenders = [Loader(n, options.dir, options.packages) for n in LOADERS if n not in absent]
    try:
        measure(contenders, rooflines, options.dir, options.rounds, expected)
        result = {**report(contenders, rooflines), "not_installed": absent}
    finally:
        for contender in [rooflines, *contenders]:
            contender.close()
    text = as_markdown(result, f"tools/device_bench.py --size_gib {options.size_gib:g} --rounds {options.rounds}")
    publish(result, text + (f"\nnot installed: {', '.join(absent)}\n" if absent else ""), options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
