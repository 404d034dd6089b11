"""Draws what flashpack_tune has measured: a map of chunk size by queue depth. matplotlib is needed for that alone."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from ._native import FlashPackError

_SUFFIXES = (".svg", ".png")
_TITLES = {"disk": "loads from the disk", "writes": "durable writes"}
_MIB = 1 << 20
# The rest of a cell's colour says how far below the fastest it is; half of it, and less, look the same.
_LEAST = 0.5


def check_picture(target: str) -> None:
    """Raises FlashPackError for another kind of file, or where matplotlib is missing, before time is spent."""
    if Path(target).suffix not in _SUFFIXES:
        raise FlashPackError(f"{target}: a picture is a file of {' or '.join(_SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise FlashPackError("a picture needs matplotlib, which is not installed: pip install matplotlib")


def draw(report: dict[str, Any], target: str | os.PathLike[str]) -> None:
    """Draws the object that flashpack_tune writes as JSON. Raises FlashPackError if no disk was measured."""
    tables = [name for name in _TITLES if report.get(name)]
    if not tables:
        raise FlashPackError(
            f"there is nothing to draw: in {report['directory']} all is page cache, and so neither chunk sizes nor "
            "queue depths were measured"
        )
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # The same figures give the same file, and its text stays text.
    with rc_context({"svg.hashsalt": "flashpack", "svg.fonttype": "none"}):
        figure = Figure(figsize=(6.4 * len(tables), 5.2), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(tables), squeeze=False)[0]
        for panel, name in zip(panels, tables, strict=True):
            _draw_map(panel, report, name)
        figure.suptitle(f"{report['directory']}: {report['read_bytes'] / 1e9:.2f} GB a sample", fontsize=10)
        is_svg = Path(target).suffix == ".svg"
        figure.savefig(target, dpi=150, metadata={"Date": None} if is_svg else None)


def _draw_map(panel: Any, report: dict[str, Any], name: str) -> None:
    from matplotlib.patches import Rectangle

    cells = report[name]
    chunks = sorted({cell["chunk_bytes"] for cell in cells}, reverse=True)
    depths = sorted({cell["queue_depth"] for cell in cells})
    fastest = max(cell["gb_per_s"] for cell in cells)
    grid = [[float("nan")] * len(depths) for _ in chunks]
    for cell in cells:
        x, y = depths.index(cell["queue_depth"]), chunks.index(cell["chunk_bytes"])
        grid[y][x] = cell["gb_per_s"]
        bright = cell["gb_per_s"] > 0.8 * fastest
        panel.text(x, y, f"{cell['gb_per_s']:.2f}", ha="center", va="center", color="black" if bright else "white")
    image = panel.imshow(grid, cmap="viridis", vmin=_LEAST * fastest, vmax=fastest, aspect="auto")
    panel.figure.colorbar(image, ax=panel, label="GB/s", extend="min")
    marks = [*([("best", "red", "-")] if name == "disk" else []), ("default", "black", "--")]
    for key, colour, line in marks:
        x, y = depths.index(report[key]["queue_depth"]), chunks.index(report[key]["chunk_bytes"])
        corner = (x - 0.47, y - 0.47)
        panel.add_patch(
            Rectangle(corner, 0.94, 0.94, fill=False, edgecolor=colour, linestyle=line, linewidth=2.5, label=key)
        )
    panel.set_xticks(range(len(depths)), depths)
    panel.set_yticks(range(len(chunks)), [f"{chunk // _MIB}" for chunk in chunks])
    panel.set_xlabel("queue depth, direct operations in flight")
    panel.set_ylabel("chunk size, MiB")
    panel.set_title(f"{_TITLES[name]}, GB/s; white cells were not measured", fontsize=10)
    panel.legend(loc="upper left", bbox_to_anchor=(0, -0.12), ncols=2, facecolor="lightgrey", fontsize=9)
