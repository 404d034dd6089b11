"""libflashpack.so exports the functions of the C API alone, and asks for no more than the machine that built it has."""

import os
import re
import subprocess
import unittest
from pathlib import Path

LIBRARY = os.environ["FLASHPACK_LIBRARY"]
HEADERS = sorted((Path(__file__).resolve().parents[2] / "include/flashpack").glob("flashpack*.h"))
SYMBOLS = Path(__file__).with_name("symbols.txt")


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def exported() -> list[str]:
    lines = run("nm", "--dynamic", "--defined-only", "--without-symbol-versions", LIBRARY).splitlines()
    return sorted(line.split()[-1] for line in lines if line.split()[-2] != "A")


def declared() -> list[str]:
    text = "".join(header.read_text() for header in HEADERS)
    return sorted(re.findall(r"^\w[\w* ]*[ *](flashpack_\w+)\(", text, re.MULTILINE))


class LibraryTest(unittest.TestCase):
    maxDiff = None

    def test_it_exports_what_the_list_says(self) -> None:
        self.assertEqual(exported(), SYMBOLS.read_text().split())

    def test_it_exports_what_the_headers_declare(self) -> None:
        self.assertEqual(exported(), declared())

    def test_every_symbol_has_the_version_of_the_api(self) -> None:
        lines = run("nm", "--dynamic", "--defined-only", "--with-symbol-versions", LIBRARY).splitlines()
        versions = {line.split("@@")[1] for line in lines if "@@" in line}
        self.assertEqual(versions, {"FLASHPACK_1"})

    def test_its_name_has_the_major_version(self) -> None:
        major = os.environ["FLASHPACK_VERSION"].split(".")[0]
        self.assertIn(f"Library soname: [libflashpack.so.{major}]", run("readelf", "--dynamic", LIBRARY))

    def test_it_is_never_unloaded(self) -> None:
        self.assertIn("NODELETE", run("readelf", "--dynamic", LIBRARY))

    def test_it_wants_no_newer_libstdcxx_than_its_compiler_has(self) -> None:
        wanted = set(re.findall(r"Name: ((?:GLIBCXX|CXXABI)_[\d.]+)", run("readelf", "--version-info", LIBRARY)))
        runtime = run(os.environ["FLASHPACK_CXX"], "-print-file-name=libstdc++.so.6").strip()
        offered = set(re.findall(r"Name: ((?:GLIBCXX|CXXABI)_[\d.]+)", run("readelf", "--version-info", runtime)))
        self.assertTrue(wanted)
        self.assertEqual(wanted - offered, set())
