"""What the README says can be run as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
READMES = [ROOT / "README.md", ROOT / "torch_binding" / "python" / "README.md"]


@pytest.mark.parametrize("readme", READMES, ids=["library", "python"])
def test_the_python_examples_of_the_readme_run_one_after_the_other(readme, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", readme.read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    names: dict[str, object] = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, str(readme), "exec"), names)
