"""Draws what flashpack_tune has measured: maps of chunk size by queue depth, and for a GPU by staging memory.

matplotlib is needed for that alone.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from ._native import FlashPackError

_SUFFIXES = (".svg", ".png")
_TITLES = {"disk": "loads from the disk", "page_cache": "loads from the page cache", "writes": "durable writes"}
_MIB = 1 << 20
# The rest of a cell's colour says how far below the fastest it is; half of it, and less, look the same.
_LEAST = 0.5


def check_picture(target: str) -> None:
    """Raises FlashPackError for another kind of file, or where matplotlib is missing, before time is spent."""
    if Path(target).suffix not in _SUFFIXES:
        raise FlashPackError(f"{target}: a picture is a file of {' or '.join(_SUFFIXES)}")
    folder = Path(target).absolute().parent
    if not os.access(folder, os.W_OK | os.X_OK) or not folder.is_dir():
        raise FlashPackError(f"{target}: {folder} is no directory that can be written to")
    if importlib.util.find_spec("matplotlib") is None:
        raise FlashPackError("a picture needs matplotlib, which is not installed: pip install matplotlib")


def draw(report: dict[str, Any], target: str | os.PathLike[str]) -> None:
    """Draws the object that flashpack_tune writes as JSON. Raises FlashPackError if no disk was measured."""
    on_host = report["device"] == "cpu"  # There, loads from the page cache differ in workers alone.
    tables = [name for name in _TITLES if report.get(name) and not (on_host and name == "page_cache")]
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


def _place(setting: dict[str, Any], by_depth: bool) -> tuple[int, int]:
    """Returns the column and the chunk size."""
    return setting["queue_depth"] if by_depth else setting["staging_bytes"] // _MIB, setting["chunk_bytes"]


def _draw_map(panel: Any, report: dict[str, Any], name: str) -> None:
    from matplotlib.patches import Rectangle

    by_depth = name != "page_cache"
    fastest_at: dict[tuple[int, int], float] = {}
    for cell in report[name]:
        place = _place(cell, by_depth)
        fastest_at[place] = max(cell["gb_per_s"], fastest_at.get(place, 0))
    columns = sorted({column for column, _ in fastest_at})
    chunks = sorted({chunk for _, chunk in fastest_at}, reverse=True)
    fastest = max(fastest_at.values())
    grid = [[fastest_at.get((column, chunk), float("nan")) for column in columns] for chunk in chunks]
    for (column, chunk), gb_per_s in fastest_at.items():
        colour = "black" if gb_per_s > 0.8 * fastest else "white"
        x, y = columns.index(column), chunks.index(chunk)
        panel.text(x, y, f"{gb_per_s:.2f}", ha="center", va="center", color=colour)
    image = panel.imshow(grid, cmap="viridis", vmin=_LEAST * fastest, vmax=fastest, aspect="auto")
    panel.figure.colorbar(image, ax=panel, label="GB/s", extend="min")
    marks = [*([("best", "red", "-")] if name != "writes" else []), ("default", "black", "--")]
    for key, colour, line in marks:
        column, chunk = _place(report[key], by_depth)
        if (column, chunk) not in fastest_at:  # As the best one for the page cache, which was not measured alone.
            continue
        corner = (columns.index(column) - 0.47, chunks.index(chunk) - 0.47)
        panel.add_patch(
            Rectangle(corner, 0.94, 0.94, fill=False, edgecolor=colour, linestyle=line, linewidth=2.5, label=key)
        )
    panel.set_xticks(range(len(columns)), columns)
    panel.set_yticks(range(len(chunks)), [f"{chunk // _MIB}" for chunk in chunks])
    panel.set_xlabel("queue depth, direct operations in flight" if by_depth else "staging memory, MiB")
    panel.set_ylabel("chunk size, MiB")
    panel.set_title(f"{_TITLES[name]}, GB/s; white cells were not measured", fontsize=10)
    if panel.patches:
        panel.legend(loc="upper left", bbox_to_anchor=(0, -0.12), ncols=2, facecolor="lightgrey", fontsize=9)
