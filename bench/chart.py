"""Draws what bench/compare.py measured: bars for the first and the second load of a process, cold and cached.

usage: python bench/chart.py COMPARE.json CHART.svg     (or CHART.png; needs matplotlib)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

STATES = ("cold", "page cache")
TITLES = {"cold": "from the disk", "page cache": "from the page cache"}
COLOURS = {True: ("#1f6f54", "#7fc6a8"), False: ("#6b7280", "#c3c8d0")}
ROOFLINE = "roofline"
# A loader with one of these words in its name has no bars, because a map copies nothing, and a load into tensors that
# are there needs no memory.
OTHERS = ("mapped", "into tensors")


def bars(result: dict[str, Any], state: str) -> list[tuple[str, float, float]]:
    """Returns name, GB/s of the first load and of the second, fastest first load first."""
    rows = [
        (name, states[state]["first_gb_per_s"], states[state]["second_gb_per_s"])
        for name, states in result["rows"].items()
        if state in states and name != ROOFLINE and not any(word in name for word in OTHERS)
    ]
    return sorted(rows, key=lambda row: -row[1])


def is_ours(name: str) -> bool:
    return name.split(",")[0] == "flashpack"


def draw(result: dict[str, Any], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "flashpack"  # The same figures give the same file.
    pyplot.rcParams["svg.fonttype"] = "none"
    height = 0.9 + 0.28 * max(len(bars(result, state)) for state in STATES)
    figure, panels = pyplot.subplots(1, len(STATES), figsize=(12, height), layout="constrained")
    for panel, state in zip(panels, STATES, strict=True):
        for place, (name, first, second) in enumerate(reversed(bars(result, state))):
            dark, light = COLOURS[is_ours(name)]
            panel.barh(place + 0.2, first, 0.38, color=dark)
            panel.barh(place - 0.2, second, 0.38, color=light)
            panel.text(first, place + 0.2, f" {first:.1f}", va="center", fontsize=8)
            panel.text(second, place - 0.2, f" {second:.1f}", va="center", fontsize=8)
        names = [name for name, *_ in reversed(bars(result, state))]
        panel.set_yticks(range(len(names)), names, fontsize=9)
        panel.set_title(TITLES[state], fontsize=10)
        if roofline := result["rows"].get(ROOFLINE, {}).get(state):
            rate = roofline["first_gb_per_s"]
            panel.axvline(rate, color="#b45309", linestyle="--", linewidth=1)
            panel.set_title(f"{TITLES[state]} (dashed: plain reads, {rate:.1f})", fontsize=10)
        panel.set_xlabel("GB/s; dark: first load of a process, light: second")
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
