"""The time that it takes to give a model of many small tensors its values, from Python and from the page cache.

Every contender has a process of its own, kept alive, and they take turns. Each load is of a new model, whose tensors
are there. The bytes of all are checked after it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import torch  # noqa: E402
from contenders import Contender, Tensors, checksum, in_turns, module_of, publish, serve  # noqa: E402
from page_cache import warm  # noqa: E402
from peers import PARALLEL, environment_with, install  # noqa: E402

ELEMENTS = 1024
OWN_FILE = "many_small.flashpack"
SAFETENSORS_FILE = "many_small.safetensors"


def many_tensors(count: int) -> Tensors:
    """Tensors of 4 KiB, the same every time. A hundred are in a module, because the time of load_state_dict grows with
    the square of the number of modules that one module has.
    """
    rows = torch.randn(count, ELEMENTS, generator=torch.Generator().manual_seed(0))
    return {f"layers.{number // 100}.part_{number % 100}": row.clone() for number, row in enumerate(rows)}


def make_files(folder: Path, tensors: Tensors) -> None:
    import flashpack

    flashpack.pack_to_file(tensors, folder / OWN_FILE)
    flashpack.save_file(tensors, folder / SAFETENSORS_FILE)
    for file in (OWN_FILE, SAFETENSORS_FILE):
        warm(folder / file)


def by_flashpack(model: torch.nn.Module, folder: Path, file: str, **options: Any) -> None:
    import flashpack

    # The reference takes paths as strings only.
    flashpack.assign_from_file(model, str(folder / file), **options)


def by_safetensors(model: torch.nn.Module, folder: Path, assign: bool) -> None:
    from safetensors.torch import load_file

    model.load_state_dict(load_file(folder / SAFETENSORS_FILE), assign=assign)


class Way(NamedTuple):
    load: Callable[[torch.nn.Module, Path], None]
    package: str = ""
    """The release that is taken from PyPI; nothing for what the environment has."""
    environment: dict[str, str] = {}  # noqa: RUF012  A tuple's default is not changed.


WAYS = {
    "flashpack, assign_from_file": Way(partial(by_flashpack, file=OWN_FILE)),
    "flashpack, assign_from_file, in place": Way(partial(by_flashpack, file=OWN_FILE, in_place=True)),
    "flashpack, assign_from_file of a safetensors file": Way(partial(by_flashpack, file=SAFETENSORS_FILE)),
    "flashpack, assign_from_file, mapped and not read": Way(partial(by_flashpack, file=OWN_FILE, mmap=True)),
    "safetensors 0.8.0, load_file + load_state_dict": Way(partial(by_safetensors, assign=False), "safetensors==0.8.0"),
    "safetensors 0.8.0, load_file + load_state_dict(assign=True), mapped and not read": Way(
        partial(by_safetensors, assign=True), "safetensors==0.8.0"
    ),
    "flashpack 0.4.5, assign_from_file, parallel": Way(
        partial(by_flashpack, file=OWN_FILE), "flashpack==0.4.5", PARALLEL
    ),
    "flashpack 0.4.5, assign_from_file, mapped and not read": Way(
        partial(by_flashpack, file=OWN_FILE), "flashpack==0.4.5"
    ),
}


def load_once(way: Way, folder: Path, tensors: Tensors) -> dict[str, Any]:
    model = module_of({name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
    started, cpu = time.perf_counter(), time.process_time()
    way.load(model, folder)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return {"seconds": seconds, "cpu_seconds": cpu, "checksum": checksum(dict(model.named_parameters()))}


def work(name: str, folder: Path, count: int) -> None:
    """The process of one contender."""
    tensors = many_tensors(count)
    serve(lambda job: load_once(WAYS[name], folder, tensors))


def contender_of(name: str, folder: Path, count: int) -> Contender:
    command = [sys.executable, __file__, "--worker", name, "--dir", str(folder), "--count", str(count)]
    way = WAYS[name]
    return Contender(name, command, environment_with(way.package) | way.environment, ours=not way.package, limit_s=300)


def measure(contenders: list[Contender], rounds: int, expected: int) -> dict[str, Any]:
    """Returns medians by name, and the reasons of those that are out."""

    def check(answer: dict[str, Any]) -> None:
        if answer["checksum"] != expected:
            raise RuntimeError("loaded other bytes")

    samples: dict[str, list[dict[str, Any]]] = {contender.name: [] for contender in contenders}
    for contender, counts in in_turns(contenders, rounds):
        answer = contender.attempt("load", check)
        if counts and answer is not None:
            samples[contender.name].append(answer)
    failures = {contender.name: contender.failure for contender in contenders if contender.failure is not None}
    rows = {
        name: {key: statistics.median(answer[key] for answer in answers) for key in ("seconds", "cpu_seconds")}
        for name, answers in samples.items()
        if name not in failures
    }
    return {"rows": rows, "missing": failures}


def as_markdown(result: dict[str, Any]) -> str:
    lines = [f"| {result['count']:,} tensors of 4 KiB, page cache | ms | CPU ms |", "|---|---|---|"]
    for name, row in result["rows"].items():
        lines.append(f"| {name} | {row['seconds'] * 1e3:.1f} | {row['cpu_seconds'] * 1e3:.1f} |")
    lines += [f"| {name} | {reason} | |" for name, reason in result["missing"].items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("many_small"), help="folder for the files")
    parser.add_argument("--count", type=int, default=10_000, help="number of tensors")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="for OUT.json and OUT.md")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.dir, options.count)
        return 0
    options.dir.mkdir(parents=True, exist_ok=True)
    tensors = many_tensors(options.count)
    make_files(options.dir, tensors)
    reasons = {name: install(way.package) if way.package else None for name, way in WAYS.items()}
    contenders = [contender_of(name, options.dir, options.count) for name in WAYS if reasons[name] is None]
    try:
        result = measure(contenders, options.rounds, checksum(tensors))
    finally:
        for contender in contenders:
            contender.close()
    result["count"] = options.count
    result["missing"] |= {name: reason for name, reason in reasons.items() if reason is not None}
    publish(result, as_markdown(result), options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
