"""The log of this package. Names in files may be anything, so that control characters in messages are escaped."""

from __future__ import annotations

import logging
from collections.abc import Sequence

logger = logging.getLogger("flashpack")


def printable(text: str) -> str:
    """Returns `text` with escape sequences in place of control characters and of others that are not printed."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def cut(text: str, most: int = 200) -> str:
    """Returns `text`, or its beginning and how much more there is, because a text in a file may be millions long."""
    rest = len(text) - most
    return text if rest <= 0 else f"{text[:most]}... and {rest} characters more"


def shortened(names: Sequence[str], shown: int = 20) -> str:
    """Returns a list of names for a message, which has the first ones alone if there are many, and cuts long ones."""
    more = f", and {len(names) - shown} more" if len(names) > shown else ""
    return f"[{', '.join(repr(cut(name)) for name in names[:shown])}{more}]"


def in_one_line(error: BaseException) -> str:
    """Returns the message of a library, which may have several lines, in one line for a message of ours."""
    return printable(" ".join(line.strip() for line in str(error).splitlines()))


def printable_lines(text: str) -> str:
    """Does as printable(), but keeps the lines."""
    return "\n".join(map(printable, text.splitlines()))


class PrintableFormatter(logging.Formatter):
    """Makes messages and tracebacks printable, those of other libraries, too."""

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record))


def _make_printable(record: logging.LogRecord) -> bool:
    """Makes a message printable before any handler gets it, and one line, because a name could add lines of its own."""
    record.msg, record.args = printable(record.getMessage()), ()
    return True


logger.addFilter(_make_printable)
