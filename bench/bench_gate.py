"""Holds rows of engine_bench against the least and the most that bench/gate.json allows them.

The rows are ratios to a roofline that the same run has measured, so that a slow disk or a busy neighbour, which slows
both, does not count against the engine. A row that misses is measured once more with twice the rounds, because other
programs may have disturbed one side of it.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PASSED, BELOW, NOT_RUN = 0, 1, 2
ROOFLINE = "roof_GB/s"

Rows = dict[str, dict[str, Any]]


class Bound(NamedTuple):
    """What one figure of a row may be at the worst."""

    row: str
    figure: str
    value: float
    least: bool
    """Whether the value is a least one; otherwise it is a most."""
    tolerance: float
    """The part of the value by which the figure may miss it."""

    @property
    def limit(self) -> float:
        return self.value * (1 - self.tolerance if self.least else 1 + self.tolerance)

    def held_by(self, figure: float) -> bool:
        return figure >= self.limit if self.least else figure <= self.limit


class Result(NamedTuple):
    bound: Bound
    figure: float | None
    problem: str = ""
    """Why there is no figure."""

    @property
    def missed(self) -> bool:
        return self.figure is not None and not self.bound.held_by(self.figure)

    @property
    def verdict(self) -> str:
        if self.figure is None:
            return f"NOT MEASURED: {self.problem}"
        return "MISSED" if self.missed else "held"


def bounds_of(gate: dict[str, Any]) -> list[Bound]:
    """A row may have a tolerance of its own, or one for its least or its most figures.

    Raises KeyError, TypeError, ValueError or AttributeError for a gate of another shape.
    """
    bounds = []
    for row, limits in gate["rows"].items():
        for kind, least in (("least", True), ("most", False)):
            for figure, value in limits.get(kind, {}).items():
                tolerance = limits.get("tolerance", {})
                if isinstance(tolerance, dict):
                    tolerance = (gate["tolerance"] | tolerance)[kind]
                bounds.append(Bound(row, figure, float(value), least, float(tolerance)))
    return bounds


def rows_of(report: str) -> Rows:
    """The rows of a report of Google Benchmark by the names that they were registered with.

    Raises ValueError if the report is damaged.
    """
    try:
        found = json.loads(report)["benchmarks"]
        return {row["name"].split("/iterations:")[0].removesuffix("/real_time"): row for row in found}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a report of Google Benchmark: {error!r}") from error


def _is_positive(number: Any) -> bool:
    return isinstance(number, int | float) and math.isfinite(number) and number > 0


def compare(rows: Rows, bounds: list[Bound]) -> list[Result]:
    """One result for each bound, in their order."""
    results = []
    for bound in bounds:
        row = rows.get(bound.row)
        if row is None:
            problem = "the run has no such row"
        elif row.get("error_occurred"):
            problem = str(row.get("error_message", "an error"))
        elif ROOFLINE in row and not _is_positive(row[ROOFLINE]):
            problem = f"its roofline is {row[ROOFLINE]}"
        elif not isinstance(row.get(bound.figure), int | float) or not math.isfinite(row[bound.figure]):
            problem = f"{bound.figure} is {row.get(bound.figure, 'not there')}"
        else:
            results.append(Result(bound, float(row[bound.figure])))
            continue
        results.append(Result(bound, None, problem))
    return results


def of_both(first: Result, second: Result) -> Result:
    """The result of a figure that was measured twice: it misses only if it has missed both times."""
    if first.figure is not None and (not first.missed or second.figure is None):
        return first
    return second


def exit_code(results: list[Result]) -> int:
    if any(result.missed for result in results):
        return BELOW
    return NOT_RUN if any(result.figure is None for result in results) else PASSED


def complaint(result: Result) -> str:
    bound = result.bound
    if result.figure is None:
        return f"{bound.row}: {bound.figure} was not measured: {result.problem}"
    side = "below" if bound.least else "above"
    return f"{bound.row}: {bound.figure} is {result.figure:.3f}, {side} {bound.limit:.3f}"


def table(results: list[Result], again: set[str]) -> str:
    lines = [f"{'row':44} {'figure':16} {'is':>7} {'wanted':>9} {'limit':>7}"]
    for result in results:
        bound = result.bound
        figure = "" if result.figure is None else f"{result.figure:.3f}"
        wanted = f"{'>=' if bound.least else '<='} {bound.value:g}"
        note = ", measured twice" if bound.row in again else ""
        lines.append(
            f"{bound.row:44} {bound.figure:16} {figure:>7} {wanted:>9} {bound.limit:7.3f}  {result.verdict}{note}"
        )
    return "\n".join(lines)


def measure(program: Path, file: Path, gate: dict[str, Any], rows: list[str], rounds: int) -> Rows:
    """Raises OSError or ValueError."""
    wanted = "|".join(re.escape(row).replace(r"\-", "-") for row in rows)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [str(program), "--file", str(file), "--size_gib", str(gate["size_gib"])]
        command += ["--rounds", str(rounds), f"--benchmark_filter=^({wanted})/"]
        command += [f"--benchmark_out={report}", "--benchmark_out_format=json"]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode != 0:
            raise OSError(f"{program.name} ended with {done.returncode}: {done.stderr.strip()}")
        return rows_of(report.read_text(encoding="utf-8"))


def run(program: Path, folder: Path, gate: dict[str, Any]) -> tuple[list[Result], set[str]]:
    """The results, and the rows that were measured twice."""
    bounds = bounds_of(gate)
    file = folder / "bench_gate.flashpack"
    try:
        results = compare(measure(program, file, gate, list(gate["rows"]), gate["rounds"]), bounds)
        again = {result.bound.row for result in results if result.missed or result.figure is None}
        if again:
            second = compare(measure(program, file, gate, sorted(again), 2 * gate["rounds"]), bounds)
            results = [of_both(a, b) if a.bound.row in again else a for a, b in zip(results, second, strict=True)]
    finally:
        file.unlink(missing_ok=True)
    return results, again


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench_gate", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("."), help="where, on the disk to measure")
    parser.add_argument("--gate", type=Path, default=ROOT / "bench" / "gate.json")
    parser.add_argument("--program", type=Path, default=ROOT / "build" / "release" / "bench" / "engine_bench")
    options = parser.parse_args()
    try:
        gate = json.loads(options.gate.read_text(encoding="utf-8"))
        results, again = run(options.program, options.folder, gate)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        print(f"bench_gate: could not run: {error}", file=sys.stderr)
        return NOT_RUN
    print(table(results, again))
    code = exit_code(results)
    for result in results:
        if result.missed or result.figure is None:
            print(f"bench_gate: {complaint(result)}", file=sys.stderr)
    print(f"bench_gate: {('passed', 'a row is below', 'a row could not be measured')[code]}")
    return code


if __name__ == "__main__":
    sys.exit(main())
