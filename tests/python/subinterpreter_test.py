"""An import in a subinterpreter is refused, and leaves the main interpreter what it was."""

from __future__ import annotations

import importlib.util

import flashpack
import pytest
import torch
from support import run_python

MODULE = next((name for name in ("_interpreters", "_xxsubinterpreters") if importlib.util.find_spec(name)), None)

CODE = """
import importlib, sys
interpreters = importlib.import_module({module!r})
if {main_first}:
    import flashpack
# Since 3.13, Python itself refuses modules like this one, unless the subinterpreter is of the old kind.
other = interpreters.create("legacy") if sys.version_info >= (3, 13) else interpreters.create()
try:
    failed = interpreters.run_string(other, "import flashpack")
    print("imported" if failed is None else failed.formatted)
except interpreters.RunFailedError as error:
    print(error)
import flashpack
print(flashpack.load_file({path!r})["a"].tolist())
interpreters.destroy(other)
print(flashpack.load_file({path!r})["a"].tolist())
"""


@pytest.mark.skipif(MODULE is None, reason="this Python has no module for subinterpreters")
@pytest.mark.parametrize("main_first", [True, False])
def test_a_subinterpreter_gets_an_import_error_and_the_main_one_goes_on(main_first, tmp_path):
    path = str(tmp_path / "a.flashpack")
    flashpack.save_file({"a": torch.arange(2)}, path)
    refusal, *loaded = run_python(CODE.format(module=MODULE, main_first=main_first, path=path)).splitlines()
    assert "ImportError" in refusal
    assert "this is a subinterpreter" in refusal
    assert loaded == ["[0, 1]", "[0, 1]"]
