"""What the installed module needs of a system, which is what the wheels of tools/wheel.sh need, too."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = Path(importlib.util.find_spec("flashpack").origin).parent
# These are everywhere, and the versions of their symbols say what else is needed.
OF_THE_SYSTEM = {"libc.so.6", "libm.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}


def objdump(option: str, path: Path) -> str:
    return subprocess.run(["objdump", option, path], capture_output=True, text=True, check=True).stdout


def needed(path: Path) -> set[str]:
    return set(re.findall(r"NEEDED +(\S+)", objdump("-p", path)))


@pytest.fixture
def module():
    (found,) = PACKAGE.glob("_native*.so")
    return found


def test_libraries_that_are_not_the_systems_are_beside_the_module_once(module):
    assert {path.name for path in PACKAGE.glob("*.so*")} - {module.name} == needed(module) - OF_THE_SYSTEM


def test_the_program_needs_no_library_that_the_module_does_not_bring(module):
    program = PACKAGE / "flashpack_tune"
    assert needed(program) - OF_THE_SYSTEM <= needed(module) - OF_THE_SYSTEM
    assert re.search(r"RUNPATH +\$ORIGIN\n|RPATH +\$ORIGIN\n", objdump("-p", program))


def test_no_symbol_is_newer_than_the_platform_that_the_wheels_are_for(module):
    platform = re.search(r"manylinux_(\d+)_(\d+)", (ROOT / "tools/wheel.sh").read_text())
    versions = {
        tuple(map(int, version))
        for path in [*PACKAGE.glob("*.so*"), PACKAGE / "flashpack_tune"]
        for version in re.findall(r"GLIBC_(\d+)\.(\d+)", objdump("-T", path))
    }
    assert versions
    assert max(versions) <= tuple(map(int, platform.groups()))


def test_other_modules_see_nothing_of_this_one_but_its_entry(module):
    symbols = [line for line in objdump("-T", module).splitlines() if re.match("[0-9a-f]{16} ", line)]
    defined = [line.split()[-1] for line in symbols if "*UND*" not in line]
    assert defined == ["PyInit__native"]
