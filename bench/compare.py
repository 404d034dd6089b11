"""Loads of one checkpoint into memory of the host, by this library and its peers, as their users meet them.

Every sample is a process of its own, which loads twice: the first load takes fresh memory, and the second comes after
the first one's tensors are gone. All tensors own their memory in the end, but for those of a map. Contenders take
turns. Before each load the files are dropped from the page cache, or the first half of each or all of it is read, and
that is verified. Every load's bytes are checked. Durable saves are compared by tools/save_bench.py, which has the same
peers, and many small tensors by bench/many_small.py.

Peers are taken from PyPI into .cache/peers when they are not there, and each is there at its default and at its best.
One that cannot be had, or fails, is named with its reason.

The rooflines are of one file of the same tensors, into huge pages that have been touched, in a process of their own:
bench/roofline, the least code in C++ that reads it. Without that program only the page cache has one, by threads of
Python, which do not reach that of the disk: eight of them with O_DIRECT had 1.7 to 2.9 GB/s where second loads had 2.5
to 3.1. Each row says which fraction of the roofline its first and its second load reached. Rows "into tensors" load to
memory that has been touched, as the rooflines do; the first load of all others takes fresh memory.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "bench")]

from contenders import (  # noqa: E402
    SEED,
    STRIDE,
    Contender,
    Tensors,
    checksum,
    decoder_shapes,
    decoder_tensors,
    publish,
    serve,
)
from loaders import INDEX, LOADERS, OWN_FILE, TENSORIZER, TENSORIZER_FILE, Loader, Streamed, by_safetensors  # noqa: E402
from page_cache import PageCacheError, make_cold, make_warm, resident_fraction, warm_first_half  # noqa: E402
from peers import environment_with, folder_of, install, save_tensorizer  # noqa: E402

MIB = 1 << 20
PART_BYTES = 4 * MIB
SHARDS = 4
STATES = ("cold", "half cached", "page cache")
COLUMNS = ("first", "second", "CPU", "peak", "of the roofline")
LIMIT_S = 300.0
JUDGED = [name for name, loader in LOADERS.items() if loader.owns and loader.room is None]
LEAST_SAMPLES = 3
NOISE = "Within the noise: the median is greater, but samples overlap."
NOT_SELECTED = "not selected"
ROOFLINE = "roofline"
PROGRAM = ROOT / "build" / "release" / "bench" / "roofline"
GAPS = {
    "DeepSpeed 0.19.8, DeepNVMe": "moves raw files and has no reader of checkpoints; needs libaio-dev, and minutes to "
    "compile itself at its first use",
    "InstantTensor 0.2.2": "loads to a GPU alone; tools/device_bench.py has it",
}


def make_files(folder: Path, size_gib: float) -> None:
    """Makes the same checkpoint in every format, unless it is there. Raises RuntimeError if tensorizer's is missing and
    cannot be made although the package is there.
    """
    shapes = decoder_shapes(size_gib)
    made_by = json.dumps({"size_gib": size_gib, "shards": SHARDS, "shapes": shapes, "seed": SEED, "stride": STRIDE})
    done = folder / "complete.json"
    if not done.exists() or done.read_text() != made_by:
        for path in (done, folder / TENSORIZER_FILE, *folder.glob("model-*-of-*.safetensors")):
            path.unlink(missing_ok=True)
        make_all_but_tensorizer(folder, size_gib)
        done.write_text(made_by)
    if not (folder / TENSORIZER_FILE).exists() and folder_of(TENSORIZER).exists():
        command = [sys.executable, __file__, "--worker", "serialize", "--dir", str(folder)]
        serialized = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
        if serialized.returncode != 0:
            raise RuntimeError(f"{TENSORIZER} cannot make its file: {serialized.stderr.strip()}")


def make_all_but_tensorizer(folder: Path, size_gib: float) -> None:
    import flashpack
    import torch
    from safetensors.torch import save_file

    tensors = decoder_tensors(size_gib)
    names = list(tensors)
    weight_map = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        part = names[shard * len(names) // SHARDS : (shard + 1) * len(names) // SHARDS]
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    flashpack.pack_to_file(tensors, folder / OWN_FILE, silent=True)
    torch.save(tensors, folder / "model.pt")


def serialize(folder: Path) -> None:
    """Makes tensorizer's file, where it is installed."""
    sys.path.insert(0, str(folder_of(TENSORIZER)))
    part = folder / f"{TENSORIZER_FILE}.part"
    save_tensorizer(by_safetensors(folder), part)
    part.rename(folder / TENSORIZER_FILE)


def status_mib(key: str) -> float:
    """Returns a line of /proc/self/status that is in kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    return 0.0


def prepare(folder: Path, state: str) -> None:
    for path in folder.iterdir():
        if state == "page cache":
            make_warm(path)
            continue
        make_cold(path)
        if state == "half cached":
            warm_first_half(path)
            # The index is a page or two, which are whole or not at all.
            if path.stat().st_size > MIB and abs((got := resident_fraction(path)) - 0.5) > 0.02:
                raise PageCacheError(f"{got:.0%} of {path} is in the page cache, and half was wanted")


def timed_load(loader: Loader, folder: Path, state: str) -> tuple[dict[str, Any], Tensors]:
    room = () if loader.room is None else (loader.room(folder),)
    prepare(folder, state)
    Path("/proc/self/clear_refs").write_text("5")  # The peak of memory begins anew.
    before_mib, cpu, started = status_mib("VmRSS"), time.process_time(), time.perf_counter()
    tensors = loader.load(folder, *room)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    size_bytes = sum(tensor.nbytes for tensor in tensors.values())
    peak_mib = max(0.0, status_mib("VmHWM") - before_mib)
    answer = {"seconds": seconds, "cpu_seconds": cpu, "bytes": size_bytes, "peak_mib": peak_mib}
    if isinstance(tensors, Streamed):
        answer["first_tensor_of_time"] = tensors.first_seconds / seconds
    return answer, tensors


def load_twice(loader: Loader, folder: Path, state: str) -> dict[str, Any]:
    answers = {}
    for turn in ("first", "second"):
        answer, tensors = timed_load(loader, folder, state)
        answers[turn] = answer | {"checksum": checksum({name: tensors[name] for name in sorted(tensors)})}
        del tensors
    return answers


def read_all(path: Path, threads: int, memory: memoryview) -> float:
    """Returns the seconds for reading the file into memory that is as large."""
    descriptor = os.open(path, os.O_RDONLY)

    def work(thread: int) -> None:
        for at in range(thread * PART_BYTES, len(memory), threads * PART_BYTES):
            os.preadv(descriptor, [memory[at : at + PART_BYTES]], at)

    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    seconds = time.perf_counter() - started
    os.close(descriptor)
    return seconds


def roofline_in_python(path: Path) -> dict[str, Any]:
    """Reads the page cache with one thread, and with one for each CPU."""
    # Private, because shared memory has a setting of its own for huge pages, which is usually never.
    mapping = mmap.mmap(-1, path.stat().st_size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping.madvise(mmap.MADV_HUGEPAGE)
    memory = memoryview(mapping)
    for at in range(0, len(memory), mmap.PAGESIZE):
        memory[at] = 1
    seconds = min(read_all(path, threads, memory) for threads in (1, os.cpu_count() or 1))
    return {"seconds": seconds, "cpu_seconds": 0.0, "bytes": len(memory)}


def roofline(program: Path, folder: Path, state: str) -> dict[str, Any]:
    prepare(folder, state)
    path = folder / OWN_FILE
    if program.exists():
        command = [str(program), "cold" if state == "cold" else "cached", str(path)]
        answer = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    else:
        answer = roofline_in_python(path)
    return {"first": answer | {"peak_mib": 0.0, "checksum": None}}


def states_with_roofline(program: Path) -> tuple[str, ...]:
    return ("cold", "page cache") if program.exists() else ("page cache",)


def work(name: str, folder: Path, program: Path) -> None:
    """The process of one sample: imports what it needs before the clock runs."""
    if name == ROOFLINE:
        return serve(lambda state: roofline(program, folder, state))
    import torch

    torch.zeros(1)
    return serve(lambda state: load_twice(LOADERS[name], folder, state))


def sample(name: str, folder: Path, state: str, program: Path) -> dict[str, Any]:
    """Does what sample_once() does. It tries twice, because a kernel short of memory may keep the page cache from what
    is wanted.
    """
    try:
        return sample_once(name, folder, state, program)
    except PageCacheError:
        return sample_once(name, folder, state, program)


def sample_once(name: str, folder: Path, state: str, program: Path) -> dict[str, Any]:
    """Runs one process. Raises PageCacheError if the page cache cannot be made as wanted; RuntimeError if it fails."""
    environment = dict(os.environ)
    if name != ROOFLINE:
        environment = environment_with(LOADERS[name].package) | LOADERS[name].environment
    command = [sys.executable, __file__, "--worker", name, "--dir", str(folder), "--roofline", str(program)]
    contender = Contender(name, command, environment, limit_s=LIMIT_S)
    try:
        return contender.ask(state)
    finally:
        contender.close()


class Results:
    """Samples by contender and state, and the reasons of those that are out."""

    def __init__(self, reasons: dict[str, str], program: Path = PROGRAM) -> None:
        """`program`: the one that measures the rooflines."""
        self.reasons = reasons
        self.program = program
        self.samples: dict[tuple[str, str], list[dict[str, Any]]] = {}
        self.expected: int | None = None

    def take(self, name: str, state: str, folder: Path) -> None:
        if name in self.reasons:
            return
        try:
            answer = sample(name, folder, state, self.program)
            for load in answer.values():
                self._check(name, load["checksum"])
        except (RuntimeError, OSError) as error:
            if name == ROOFLINE or LOADERS[name].ours:
                raise
            if isinstance(error, PageCacheError):
                prepare(folder, state)  # This raises, too, unless it is the peer that keeps pages busy.
            self.reasons[name] = str(error)
            return
        self.samples.setdefault((name, state), []).append(answer)

    def _check(self, name: str, found: int | None) -> None:
        if found is None:
            return
        self.expected = found if self.expected is None else self.expected
        if found != self.expected:
            raise RuntimeError(f"{name} loaded other bytes")

    def median(self, name: str, state: str, turn: str, of: Callable[[dict[str, Any]], float]) -> float | None:
        answers = [answer[turn] for answer in self.samples.get((name, state), []) if turn in answer]
        return statistics.median(map(of, answers)) if answers else None


def rate(load: dict[str, Any]) -> float:
    return float(load["bytes"] / load["seconds"] / 1e9)


def row_of(results: Results, name: str, state: str) -> dict[str, Any]:
    loads = {turn: results.median(name, state, turn, rate) for turn in ("first", "second")}
    row: dict[str, Any] = {f"{turn}_gb_per_s": value for turn, value in loads.items()} | {
        "cpu_s_per_gb": results.median(name, state, "first", lambda load: load["cpu_seconds"] / load["bytes"] * 1e9),
        "peak_of_bytes": results.median(name, state, "first", lambda load: load["peak_mib"] * MIB / load["bytes"]),
        "samples": [[round(rate(load), 3) for load in answer.values()] for answer in results.samples[name, state]],
    }
    limit = results.median(ROOFLINE, state, "first", rate)
    if limit and name != ROOFLINE:
        row["of_roofline"] = [value / limit for value in loads.values() if value]
    first = results.median(name, state, "first", lambda load: load.get("first_tensor_of_time", 0.0))
    return row | ({"first_tensor_of_time": first} if first else {})


def verdict(results: Results, state: str, turn: str) -> dict[str, Any]:
    """Says which peers have a greater median than a row of ours, among the loads to new memory of their own.

    It is beyond the noise if every sample of the peer is faster than every one of ours, and both have enough of them.
    """
    rates = {
        name: [rate(answer[turn]) for answer in results.samples[name, state]]
        for name in JUDGED
        if (name, state) in results.samples and name not in results.reasons
    }
    faster: dict[str, list[str]] = {"faster": [], "faster_in_too_few_samples": [], "faster_within_noise": []}
    for ours in (name for name in rates if LOADERS[name].ours):
        for peer in (name for name in rates if not LOADERS[name].ours):
            enough = min(len(rates[ours]), len(rates[peer])) >= LEAST_SAMPLES
            if min(rates[peer]) > max(rates[ours]):
                faster["faster" if enough else "faster_in_too_few_samples"].append(f"{peer} than {ours}")
            elif statistics.median(rates[peer]) > statistics.median(rates[ours]):
                faster["faster_within_noise"].append(f"{peer} than {ours}")
    peers = sum(not LOADERS[name].ours for name in rates)
    return {"state": state, "turn": turn, "peers": peers, "samples": min(map(len, rates.values())), **faster}


def said(found: dict[str, Any]) -> str:
    pairs = found["faster"] + [f"{pair}, in every sample" for pair in found["faster_in_too_few_samples"]]
    pairs += [f"{pair}, within the noise" for pair in found["faster_within_noise"]]
    enough = found["samples"] >= LEAST_SAMPLES
    parts = [] if enough else [f"too few samples to judge, {found['samples']} where {LEAST_SAMPLES} are the least"]
    if pairs:
        parts.append(f"faster: {'; '.join(pairs)}")
    elif enough:
        parts.append(f"no median of {found['peers']} peers is greater than any of ours")
    return f"{found['state']}, {found['turn']} load: {'; '.join(parts)}"


def report(results: Results) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name in [ROOFLINE, *LOADERS]:
        states = [state for state in STATES if (name, state) in results.samples]
        if states:
            rows[name] = {state: row_of(results, name, state) for state in states}
    judged_of_ours = [name for name in JUDGED if LOADERS[name].ours]
    states = [state for state in STATES if any((name, state) in results.samples for name in judged_of_ours)]
    verdicts = [verdict(results, state, turn) for state in states for turn in ("first", "second")]
    return {"rows": rows, "missing": results.reasons, "verdicts": [found for found in verdicts if found["peers"]]}


def machine(folder: Path) -> dict[str, Any]:
    """Facts that a figure needs to be compared with another one's."""

    def said_by(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"

    models = [line for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if "model name" in line]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": said_by("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "cpu": models[0].partition(": ")[2] if models else platform.machine(),
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "file_system": said_by("findmnt", "--noheadings", "--output", "FSTYPE", "--target", str(folder)),
    }


def not_selected(names: list[str], states: list[str]) -> dict[str, str]:
    """Returns the loaders and states that this run leaves out, with that reason."""
    return dict.fromkeys((each for each in (*STATES, *LOADERS) if each not in {*names, *states}), NOT_SELECTED)


def cells_of(name: str, row: dict[str, Any]) -> list[str]:
    keys = ["first_gb_per_s", "second_gb_per_s"] + ["cpu_s_per_gb", "peak_of_bytes"] * (name != ROOFLINE)
    cells = [f"{row[key]:.2f}" if row.get(key) is not None else "" for key in keys]
    cells += [""] * (len(COLUMNS) - 1 - len(cells))
    return [*cells, ", ".join(f"{fraction:.2f}" for fraction in row.get("of_roofline", []))]


def as_markdown(result: dict[str, Any]) -> str:
    measured = [state for state in STATES if any(state in states for states in result["rows"].values())]
    width = len(COLUMNS) * len(measured)
    heads = [f" {state}, {COLUMNS[0]} | {' | '.join(COLUMNS[1:])} |" for state in measured]
    lines = [
        f"{result['cpus']} cores of {result['cpu']}, {result['file_system']}, Linux {result['kernel']}, commit "
        f"{result['commit']}, {result['date']}. Medians of processes in turns, by `{result['command']}`. First and "
        "second load of a process, GB/s; CPU s/GB and peak memory over the size of the tensors, first load; both loads "
        "as fractions of the roofline of the same run.",
        "",
        "| into memory of their own |" + "".join(heads),
        "|---|" + "---|" * width,
    ]
    for name, states in result["rows"].items():
        cells = [cell for state in measured for cell in cells_of(name, states.get(state, {}))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [f"| {name} | {reason} |{' |' * (width - 1)}" for name, reason in result["missing"].items()]
    lines.append("")
    lines += [
        f"The first tensor of `{name}`, {state}, is there after {row['first_tensor_of_time']:.1%} of its first load."
        for name, states in result["rows"].items()
        for state, row in states.items()
        if "first_tensor_of_time" in row
    ]
    if result["verdicts"]:
        judged = f"Which peers are faster than a row of ours, where loads end with memory of their own. {NOISE}"
        lines += ["", judged, "", *(f"* {said(found)}" for found in result["verdicts"])]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dir", type=Path, default=Path("compare"), help="folder on the disk to measure, for the files"
    )
    parser.add_argument("--size_gib", type=float, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=list(LOADERS), default=list(LOADERS), metavar="NAME")
    parser.add_argument("--states", nargs="+", choices=STATES, default=list(STATES), metavar="STATE")
    parser.add_argument("--roofline", type=Path, default=PROGRAM, help="the program that measures the rooflines")
    parser.add_argument("--out", type=Path, help="for OUT.json and OUT.md")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker == "serialize":
        serialize(options.dir)
        return 0
    if options.worker:
        work(options.worker, options.dir, options.roofline)
        return 0
    reasons = {name: install(LOADERS[name].package) for name in options.only if LOADERS[name].package}
    options.dir.mkdir(parents=True, exist_ok=True)
    make_files(options.dir, options.size_gib)
    where = machine(options.dir) | {"command": shlex.join(["bench/compare.py", *sys.argv[1:]])}
    gaps = GAPS | not_selected(options.only, options.states)
    gaps |= {name: reason for name, reason in reasons.items() if reason is not None}
    with_roofline = states_with_roofline(options.roofline)
    if "cold" not in with_roofline:
        gaps["roofline, cold"] = f"no {options.roofline}, which `cmake --build --preset release` makes"
    results = Results(gaps, options.roofline)
    for state in options.states:
        for turn in range(options.rounds):
            names = [ROOFLINE] * (state in with_roofline) + options.only
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                results.take(name, state, options.dir)
            if options.out is not None:  # A run that is cut short still has figures.
                options.out.with_suffix(".json").write_text(json.dumps(where | report(results), indent=2) + "\n")
    result = where | report(results)
    publish(result, as_markdown(result), options.out)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PageCacheError as error:
        sys.exit(f"compare: {error}")
