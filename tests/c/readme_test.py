"""The C program in the README compiles without a warning, and lists the tensors of a file."""

import os
import re
import subprocess
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = Path(os.environ["FLASHPACK_LIBRARY"])


class ReadmeTest(unittest.TestCase):
    def test_its_program_runs(self) -> None:
        (program,) = re.findall(r"^```c\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
        with tempfile.TemporaryDirectory() as folder:
            source, binary = Path(folder, "readme.c"), Path(folder, "readme")
            source.write_text(program)
            warnings = ("-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror")
            where = ("-I", str(ROOT / "include"), str(LIBRARY), f"-Wl,-rpath,{LIBRARY.parent}")
            subprocess.run((os.environ["FLASHPACK_CC"], *warnings, str(source), "-o", str(binary), *where), check=True)
            found = subprocess.run((str(binary), str(ROOT / "tests/golden/v3_bf16.flashpack")), capture_output=True)
        self.assertEqual(found.returncode, 0, found.stderr)
        self.assertRegex(found.stdout.decode(), r"^w: bfloat16 at 0x\w+\nb: bfloat16 at 0x\w+\n$")
