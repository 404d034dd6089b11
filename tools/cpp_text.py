"""Reads C++ as text, as far as tools/tidy.py needs it: without comments and strings, its types, its functions."""

from __future__ import annotations

import re
from collections.abc import Iterator

_CPP_NOISE = re.compile(
    r'//[^\n]*|/\*.*?\*/|R"(?P<tag>[^()\s\\]*)\(.*?\)(?P=tag)"|"(?:\\.|[^"\\\n])*"'
    r"|(?<![0-9A-Za-z_])'(?:\\.|[^'\\\n])*'",
    re.DOTALL,
)


def without_comments_and_strings(cpp: str) -> str:
    """The code alone, every line where it was."""
    return _CPP_NOISE.sub(lambda m: "\n" * m.group().count("\n") or " ", cpp)


# A brace after one of these, with no parameter list in between, opens a scope and not a body.
_SCOPE = re.compile(r"\b(?:namespace|class|struct|union|enum|extern)\b[^()]*$")
_NOT_CODE = re.compile(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*|\balignas\([^()]*\)|\[\[.*?\]\]", re.MULTILINE)


def types_in_namespaces(code: str) -> Iterator[tuple[int, str]]:
    """(line, qualified name) of every type that is defined in a namespace with a name."""
    code = _NOT_CODE.sub(lambda m: "\n" * m.group().count("\n"), code)
    scopes: list[str | None] = []  # None is a scope in which a type may have the name of another one.
    header_start = 0
    for match in re.finditer(r"[{};]", code):
        header = code[header_start : match.start()]
        header_start = match.end()
        if match.group() == "}" and scopes:
            scopes.pop()
        if match.group() != "{":
            continue
        namespace = re.search(r"\bnamespace\s+([\w:]+)\s*$", header)
        defined = re.search(
            r"\b(?:class|struct|union|enum(?:\s+class)?)\s+(\w+(?:::\w+)*)\s*(?:final\b|:(?!:)|$)", header.rstrip()
        )
        if defined and "(" not in header and None not in scopes:
            at = code.rfind(defined[1], 0, match.start() - len(header) + defined.end(1))
            yield code.count("\n", 0, at) + 1, "::".join([*filter(None, scopes), defined[1]])
        scopes.append(namespace[1] if namespace else None)


def cpp_functions(code: str) -> Iterator[tuple[int, int]]:
    """(first line, number of lines) of every outermost function body, lambdas counted with what holds them."""
    code = _NOT_CODE.sub(lambda m: "\n" * m.group().count("\n"), code)
    header_start, depth, body_start = 0, 0, None
    for match in re.finditer(r"[{};]", code):
        at, mark = match.start(), match.group()
        if body_start is None:
            header = code[header_start:at]
            if mark == "{" and "(" in header and not _SCOPE.search(header):
                body_start, depth = header_start + len(header) - len(header.lstrip()), 1
            header_start = at + 1
        elif mark != ";":
            depth += 1 if mark == "{" else -1
            continues = re.match(r"\s*(?:,|\{|catch\b)", code[at + 1 :])
            if depth == 0 and not continues:
                first = code.count("\n", 0, body_start) + 1
                yield first, code.count("\n", body_start, at) + 1
                body_start, header_start = None, at + 1
