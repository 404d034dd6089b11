"""Loads of checkpoints to a CUDA device, beside disk, link and memory, and beside the peers that are installed.

Tables, in this order: `start` of an engine, `parts` of a load alone, loads of `blocks-2`, `small-2` and `blocks-8`
(large or small tensors, GiB), a `sweep` of the engine's options. Every contender has a process of its own, kept alive,
and they take turns. All bytes that arrive are compared on the device with a checksum of the source tensors. A contender
that is not installed is named and left out, one that fails, too. OUT.json and OUT.md are saved after each measurement.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from contenders import Contender, Tensors, checksum, decoder_tensors, in_turns, small_tensors
from device_work import DEVICE, LOADERS, work
from page_cache import PageCacheError, make_cold, make_warm

STATES = ("cold", "page cache")
TABLES = ("start", "parts", "blocks-2", "small-2", "blocks-8", "sweep")
THREADS = sorted({1, 4, 8, 16, min(32, os.cpu_count() or 1)})
PARTS = {
    "h2d": [f"h2d {mib} {streams}" for mib in (4, 16) for streams in (1, 2, 4)],
    "memcpy": [f"memcpy {threads}" for threads in THREADS],
    "disk": [f"disk {threads}" for threads in (8, 16, 32)],
}
BESIDE = {"cold": ("disk", "h2d"), "page cache": ("memcpy", "h2d")}
ANSWER_LIMIT_S = 60.0
MIB = 1 << 20
DEFAULT_OPTIONS: dict[str, int | str] = {}
SWEEP = [
    DEFAULT_OPTIONS,
    {"verify": "always"},
    *({"chunk_bytes": mib * MIB} for mib in (1, 2, 8, 16)),
    *({"queue_depth": depth} for depth in (4, 16, 32)),
    *({"staging_bytes": mib * MIB} for mib in (32, 128, 256)),
    *({"workers": workers} for workers in (2, 4, 8, 16)),
    {"chunk_bytes": 8 * MIB, "queue_depth": 16, "staging_bytes": 256 * MIB},
    {"chunk_bytes": 16 * MIB, "queue_depth": 16, "staging_bytes": 512 * MIB},
    {"queue_depth": 32, "staging_bytes": 256 * MIB, "workers": 16},
    {"verify": "always", "staging_bytes": 64 * MIB, "workers": 8},
    {"verify": "always", "workers": 16},
]


class Turn(NamedTuple):
    """The job of a contender when it is its turn."""

    contender: Contender
    job: str
    row: str
    file: Path | None = None
    """The file that has to be cold or cached before."""
    expected: int | None = None


class Record:
    """All that was measured, on disk at any time."""

    def __init__(self, out: Path, about: dict[str, Any]) -> None:
        self.out = out
        self.result: dict[str, Any] = {**about, "failed": {}, "measurements": []}

    def add(self, table: str, state: str, row: str, counts: bool, answer: dict[str, Any]) -> None:
        self.result["measurements"].append({"table": table, "state": state, "row": row, "counts": counts, **answer})
        self.save()

    def fail(self, table: str, row: str, reason: str) -> None:
        self.result["failed"][f"{table}: {row}"] = reason
        self.save()

    def has_failed(self, table: str, row: str) -> bool:
        return f"{table}: {row}" in self.result["failed"]

    def save(self) -> None:
        """Each file is whole at any time."""
        contents = {".json": json.dumps(self.result, indent=1) + "\n", ".md": as_markdown(self.result)}
        for suffix, text in contents.items():
            draft = self.out.with_suffix(suffix + ".draft")
            draft.write_text(text)
            draft.replace(self.out.with_suffix(suffix))

    def best_part(self, part: str) -> str:
        rates = {job: rate(self.result, "parts", "", job) for job in PARTS[part]}
        return max(rates, key=lambda job: rates[job] or 0.0)


def rows_of(result: dict[str, Any], table: str, state: str, row: str) -> list[dict[str, Any]]:
    """Without the first round, which pays for what happens once in a process, if there was another."""
    found = [m for m in result["measurements"] if m["table"] == table and m["row"] == row and state in ("", m["state"])]
    return [m for m in found if m["counts"]] or found


def rounds_of(result: dict[str, Any], table: str, state: str, row: str) -> str:
    """How many there were; `first` when there was only the one that should not count."""
    found = rows_of(result, table, state, row)
    if not found:
        return ""
    return str(len(found)) if found[0]["counts"] else "first"


def rate(result: dict[str, Any], table: str, state: str, row: str) -> float | None:
    rates = [m["bytes"] / m["seconds"] / 1e9 for m in rows_of(result, table, state, row)]
    return statistics.median(rates) if rates else None


def median_of(result: dict[str, Any], table: str, state: str, row: str, key: str) -> float | None:
    values = [m[key] for m in rows_of(result, table, state, row) if m.get(key) is not None]
    return statistics.median(values) if values else None


def limit_of(result: dict[str, Any], table: str, state: str) -> float | None:
    """The slower of what a load needs, in the rounds of that table."""
    rates = [rate(result, table, state, part) for part in BESIDE[state]]
    return None if None in rates else min(r for r in rates if r is not None)


def cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def load_cells(result: dict[str, Any], table: str, state: str, row: str) -> list[str]:
    speed, limit = rate(result, table, state, row), limit_of(result, table, state)
    size = median_of(result, table, state, row, "bytes")
    cpu, driver, first, peak = (
        median_of(result, table, state, row, key)
        for key in ("cpu_seconds", "driver_seconds", "first_tensor_seconds", "host_peak_mib")
    )
    return [
        rounds_of(result, table, state, row),
        cell(speed, ".2f"),
        cell(speed / limit if speed and limit else None, ".2f"),
        cell(cpu / size * 1e9 if cpu is not None and size else None, ".3f"),
        cell(driver / size * 1e9 if driver is not None and size else None, ".4f"),
        cell(first * 1000 if first is not None else None, ".0f"),
        cell(peak, ".0f"),
    ]


def load_table(result: dict[str, Any], table: str, rows: Sequence[str]) -> list[str]:
    columns = ("rounds", "GB/s", "of the limit", "CPU s/GB", "driver CPU s/GB", "first tensor ms", "host MiB")
    heads = [f"{state} {column}" for state in STATES for column in columns]
    lines = [f"| {table} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for row in rows:
        cells = [text for state in STATES for text in load_cells(result, table, state, row)]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return lines


def as_markdown(result: dict[str, Any]) -> str:
    lines = [
        "{device}, {cpus} CPUs, Linux {kernel}, torch {torch}; `{command}`.".format(**result),
        "Medians, in turns, without the first round where there was another. "
        "The limit is min(disk, h2d) for a cold file and min(memcpy, h2d) for a cached one.",
    ]
    for table in TABLES:
        rows = list(dict.fromkeys(m["row"] for m in result["measurements"] if m["table"] == table))
        if not rows:
            continue
        lines.append("")
        if table == "start":
            lines += ["| start of the first engine | ms | the next ones | host MiB of each |", "|---|---|---|---|"]
            lines += [start_line(result, row) for row in rows]
        elif table == "parts":
            lines += ["| part | GB/s |", "|---|---|"]
            lines += [f"| {row} | {cell(rate(result, table, '', row), '.2f')} |" for row in rows]
        else:
            lines += load_table(result, table, rows)
    lines += [""] + [f"failed: {row}: {reason}" for row, reason in result["failed"].items()]
    lines += [f"not installed: {', '.join(result['not_installed'])}"] if result["not_installed"] else []
    return "\n".join(lines).strip() + "\n"


def start_line(result: dict[str, Any], row: str) -> str:
    measured = rows_of(result, "start", "", row)[-1]
    following = statistics.median(measured["next_seconds"])
    return f"| {row} | {measured['seconds'] * 1000:.1f} | {following * 1000:.1f} | {measured['engine_mib']:.0f} |"


class Budget:
    """Seconds, shared evenly among what is still to be done."""

    def __init__(self, seconds: float, shares: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.end = clock() + seconds
        self.shares = shares

    def next_share(self) -> float:
        """The time at which the next of the shares ends."""
        left = max(0.0, self.end - self.clock())
        share = left / max(1, self.shares)
        self.shares -= 1
        return self.clock() + share


def take_turns(
    record: Record, table: str, state: str, turns: Sequence[Turn], rounds: int, end: float, budget: Budget
) -> None:
    """Every one has a turn before the budget ends, and then as many as there is time for in this share of it."""
    for number, (turn, counts) in enumerate(in_turns(turns, rounds)):
        if budget.clock() > (budget.end if number < len(turns) else end):
            return
        take_turn(record, table, state, turn, counts)


def take_turn(record: Record, table: str, state: str, turn: Turn, counts: bool) -> None:
    """One that has failed in this table has no more turns in it."""
    if record.has_failed(table, turn.row):
        return
    try:
        if turn.file is not None:
            (make_cold if state == "cold" else make_warm)(turn.file)
        answer = turn.contender.ask(turn.job)
        if turn.expected is not None and answer["checksum"] != turn.expected:
            raise RuntimeError(f"wrong bytes on the device, {state}")
        record.add(table, state, turn.row, counts, answer)
    except PageCacheError as error:
        print(f"left out: {table}: {turn.row}: {error}", file=sys.stderr)
    except (RuntimeError, OSError) as error:
        record.fail(table, turn.row, str(error))


class Bench:
    def __init__(self, options: argparse.Namespace, record: Record, budget: Budget) -> None:
        self.options, self.record, self.budget = options, record, budget
        self.contenders: dict[str, Contender] = {}

    def contender(self, name: str) -> Contender:
        """Its process, started with those of the others that take part."""
        if name not in self.contenders:
            environment = dict(os.environ)
            own = folder_of(self.options.packages, LOADERS[name].package) if name in LOADERS else None
            if own is not None:
                environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(own), os.environ.get("PYTHONPATH")]))
            command = [sys.executable, __file__, "--worker", name, "--dir", str(self.options.dir)]
            self.contenders[name] = Contender(name, command, environment, limit_s=ANSWER_LIMIT_S)
        return self.contenders[name]

    def close(self) -> None:
        for contender in self.contenders.values():
            contender.close()
        self.contenders.clear()

    def turns(self, table: str, state: str, turns: Sequence[Turn]) -> None:
        rounds = min(3, self.options.rounds) if table == "parts" else self.options.rounds
        take_turns(self.record, table, state, turns, rounds, self.budget.next_share(), self.budget)

    def start(self) -> None:
        for name in ("start", "start in a context"):
            contender = self.contender(name)
            take_turn(self.record, "start", "", Turn(contender, "start", name), True)
        self.close()

    def parts(self) -> None:
        with checkpoint(self.options.dir, "blocks-2", self.options.scale) as (folder, _):
            file = folder / "model.flashpack"
            for state, part in (("", "h2d"), ("page cache", "memcpy"), ("cold", "disk")):
                jobs = [
                    Turn(self.contender("parts"), f"{folder.name} {job}", job, file if state else None)
                    for job in PARTS[part]
                ]
                self.turns("parts", state, jobs)

    def loads(self, table: str) -> None:
        with checkpoint(self.options.dir, table, self.options.scale) as (folder, expected):
            names = [n for n in LOADERS if n not in self.record.result["not_installed"]]
            for state in STATES:
                turns = [
                    Turn(self.contender("parts"), f"{table} {self.record.best_part(p)}", p, folder / "model.flashpack")
                    for p in BESIDE[state]
                ]
                turns += [
                    Turn(self.contender(name), table, name, folder / LOADERS[name].file, expected) for name in names
                ]
                self.turns(table, state, turns)

    def sweep(self) -> None:
        with checkpoint(self.options.dir, "blocks-2", self.options.scale) as (folder, _):
            for state in STATES:
                turns = [
                    Turn(
                        self.contender("engines"), f"blocks-2 {json.dumps(o)}", in_words(o), folder / "model.flashpack"
                    )
                    for o in SWEEP
                ]
                self.turns("sweep", state, turns)

    def run(self, table: str) -> None:
        if table in ("start", "parts", "sweep"):
            getattr(self, table)()
        else:
            self.loads(table)


def in_words(options: dict[str, int | str]) -> str:
    def word(value: int | str) -> str:
        return f"{value // MIB} MiB" if isinstance(value, int) and value >= MIB else str(value)

    return ", ".join(f"{key} {word(value)}" for key, value in options.items()) or "default"


@contextmanager
def checkpoint(folder: Path, table: str, scale: float) -> Iterator[tuple[Path, int]]:
    """The files of a table, and the checksum of their tensors."""
    import flashpack
    from safetensors.torch import save_file

    kind, gib = table.split("-")
    made = folder / table
    made.mkdir()
    try:
        tensors: Tensors = (decoder_tensors if kind == "blocks" else small_tensors)(float(gib) * scale)
        flashpack.pack_to_file(tensors, made / "model.flashpack", target_dtype=None)
        save_file(tensors, made / "model.safetensors")
        expected = checksum({name: tensor.to(DEVICE) for name, tensor in tensors.items()})
        del tensors
        torch.cuda.empty_cache()
        os.sync()
        yield made, expected
    finally:
        shutil.rmtree(made)


def folder_of(packages: Path | None, package: str) -> Path | None:
    own = packages / package if packages is not None else None
    return own if own is not None and own.is_dir() else None


def is_installed(packages: Path | None, package: str) -> bool:
    if package == "flashpack" or folder_of(packages, package) is not None:
        return True
    return importlib.util.find_spec(package.replace("-", "_")) is not None if "." not in package else False


def is_ours(failed: str) -> bool:
    row = failed.partition(": ")[2]
    return row not in LOADERS or LOADERS[row].package == "flashpack"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)} (default: all)")
    parser.add_argument("--dir", type=Path, default=Path(), help="folder on the disk to measure")
    parser.add_argument("--seconds", type=float, default=300, help="after so long no further round begins")
    parser.add_argument("--rounds", type=int, default=7, help="at most, after one that does not count")
    parser.add_argument("--scale", type=float, default=1, help="of the sizes of all checkpoints")
    parser.add_argument("--packages", type=Path, help="folder with one more folder of packages for each contender")
    parser.add_argument("--out", type=Path, default=Path("device_bench"), help="for OUT.json and OUT.md")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if unknown := set(options.tables) - set(TABLES):
        parser.error(f"no such table: {', '.join(sorted(unknown))}")
    options.tables = [table for table in TABLES if table in (options.tables or TABLES)]
    return options


def about(options: argparse.Namespace) -> dict[str, Any]:
    packages = {name: loader.package for name, loader in LOADERS.items()}
    return {
        "device": torch.cuda.get_device_name(0),
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "torch": torch.__version__,
        "command": " ".join(["tools/device_bench.py", *sys.argv[1:]]),
        "not_installed": [name for name, package in packages.items() if not is_installed(options.packages, package)],
    }


def main() -> int:
    options = parse()
    if options.worker:
        work(options.worker, options.dir)
        return 0
    if not torch.cuda.is_available():
        print("no CUDA device that torch can use", file=sys.stderr)
        return 1
    shares = {"start": 0, "parts": 3}
    budget = Budget(options.seconds, sum(shares.get(table, len(STATES)) for table in options.tables))
    record = Record(options.out, about(options))
    bench = Bench(options, record, budget)
    try:
        for table in options.tables:
            bench.run(table)
    finally:
        record.save()
        bench.close()
        print(options.out.with_suffix(".md").read_text(), end="")
    return int(any(is_ours(name) for name in record.result["failed"]))


if __name__ == "__main__":
    sys.exit(main())
