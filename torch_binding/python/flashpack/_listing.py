"""The tensors of a checkpoint as people read them: in a terminal, an interpreter or a notebook. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from ._checkpoint import Entry
from ._logging import printable

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB", "EB")
# A notebook keeps what it has shown.
_MOST_ROWS = 500
# A name may be as long as a footer, and would widen all rows.
_WIDEST = 120


def human_bytes(size_bytes: int) -> str:
    """Returns a size in a fitting decimal unit, with three digits: "140 B", "24.2 kB"."""
    size, unit = float(size_bytes), 0
    while size >= 999.5 and unit + 1 < len(_UNITS):
        size, unit = size / 1000, unit + 1
    return f"{size_bytes} B" if unit == 0 else f"{size:#.3g}".rstrip(".") + f" {_UNITS[unit]}"


def summary_of(entries: Sequence[Entry]) -> str:
    """Returns "2 tensors, 24.2 kB"."""
    count = len(entries)
    return f"{count} {'tensor' if count == 1 else 'tensors'}, {human_bytes(sum(entry.size_bytes for entry in entries))}"


def by_name(entries: Sequence[Entry]) -> list[Entry]:
    """Returns `entries` sorted by name, with layer 2 before layer 10."""
    return sorted(
        entries, key=lambda entry: (re.sub(r"\d+", lambda digits: digits[0].zfill(20), entry.name), entry.name)
    )


def lines_of(entries: Sequence[Entry]) -> Iterator[str]:
    """Yields a line for each tensor, with name, dtype, shape and size in columns, which are no wider than 120."""
    widths = [0] * 4
    for entry in entries:
        widths = [min(max(width, len(text)), _WIDEST) for width, text in zip(widths, _row(entry), strict=True)]
    for *row, size in map(_row, entries):
        columns = "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=False))
        yield f"{columns}  {size.rjust(widths[-1])}"


def as_html(title: str, entries: Sequence[Entry]) -> str:
    """Returns a table, which is cut if it is long."""
    import html  # Here, because only notebooks need it, and its import takes time.

    rows = ["".join(f"<td>{html.escape(text)}</td>" for text in _row(entry)) for entry in entries[:_MOST_ROWS]]
    if len(entries) > _MOST_ROWS:
        rows.append(f"<td colspan=4>and {len(entries) - _MOST_ROWS} more</td>")
    head = "".join(f"<th>{name}</th>" for name in ("name", "dtype", "shape", "size"))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table><caption>{html.escape(printable(title))}</caption><tr>{head}</tr>{body}</table>"


def _row(entry: Entry) -> tuple[str, str, str, str]:
    return printable(entry.name), entry.dtype, str(list(entry.shape)), human_bytes(entry.size_bytes)
