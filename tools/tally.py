#!/usr/bin/env python3
"""Counts what tools/test.sh ran, names what failed and what was skipped, and exits 1 unless all is well.

usage: tools/tally.py FOLDER   (steps.tsv, and NAME.xml in JUnit's format for every suite)
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree


@dataclass
class Tally:
    passed: int = 0
    failed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        line = f"{self.passed} passed, {len(self.failed)} failed"
        return f"{line}, {len(self.skipped)} skipped" if self.skipped else line


def add_case(tally: Tally, suite: str, case: ElementTree.Element) -> None:
    name = f"{suite}: {case.get('name')}"
    skip = case.find("skipped")
    if case.find("failure") is not None or case.find("error") is not None:
        tally.failed.append(name)
    elif skip is None:
        tally.passed += 1
    elif case.get("status") == "notrun" and not (skip.get("message") or "").startswith("SKIP_"):
        # ctest says "skipped" also of a test whose program is not there.
        tally.failed.append(f"{name}: {skip.get('message')}")
    else:
        tally.skipped.append(name)


def add_suite(tally: Tally, name: str, status: int, report: Path) -> None:
    before = len(tally.failed)
    try:
        for case in ElementTree.parse(report).iter("testcase"):
            add_case(tally, name, case)
    except (OSError, ElementTree.ParseError) as error:
        tally.failed.append(f"{name}: no report: {error}")
    if status != 0 and len(tally.failed) == before:
        tally.failed.append(f"{name}: ended with status {status}")


def tally_of(folder: Path) -> Tally:
    tally = Tally()
    for line in (folder / "steps.tsv").read_text().splitlines():
        kind, name, status = line.split("\t")
        if kind == "suite":
            add_suite(tally, name, int(status), folder / f"{name}.xml")
        elif status != "0":
            tally.failed.append(f"{name}: ended with status {status}")
        elif kind == "check":
            tally.passed += 1
    return tally


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    tally = tally_of(Path(arguments[0]))
    for name in tally.skipped:
        print(f"skipped  {name}")
    for name in tally.failed:
        print(f"FAILED   {name}")
    print(tally)
    return 1 if tally.failed or not tally.passed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
