"""What the README says can be run as it stands."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from support import run_python

ROOT = Path(__file__).parent.parent.parent
READMES = [ROOT / "README.md", ROOT / "torch_binding" / "python" / "README.md"]


@pytest.mark.parametrize("readme", READMES, ids=["library", "python"])
def test_the_python_examples_of_the_readme_run_one_after_the_other(readme, tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("diffusers")
    blocks = re.findall(r"^```python\n(.*?)^```$", readme.read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    # In a process of its own, because examples patch other libraries.
    place = f"import os, sys\nsys.path[:] = {sys.path!r}\nos.chdir({str(tmp_path)!r})\n"
    run_python(place + "\n".join(blocks))
