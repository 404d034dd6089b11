"""What this package tells, as text that cannot drive a terminal. Names in files may be anything."""

from __future__ import annotations

import logging

logger = logging.getLogger("flashpack")


def printable(text: str) -> str:
    """`text` with escape sequences in place of control characters and of others that are not printed."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def in_one_line(error: BaseException) -> str:
    """Puts what a library says, which may take several lines, into a message of ours."""
    return printable(" ".join(line.strip() for line in str(error).splitlines()))


def printable_lines(text: str) -> str:
    """The same, line by line."""
    return "\n".join(map(printable, text.splitlines()))


class PrintableFormatter(logging.Formatter):
    """For what other libraries log, too, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record))


def _make_printable(record: logging.LogRecord) -> bool:
    """Whatever the application does with it. A message is one line, or a name could add lines of its own."""
    record.msg, record.args = printable(record.getMessage()), ()
    return True


logger.addFilter(_make_printable)
