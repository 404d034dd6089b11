import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPOIL = """
import flashpack
import torch
load = flashpack.load_file
flashpack.load_file = lambda *a: {**load(*a), "layers.0.norm": torch.zeros(4096, dtype=torch.bfloat16)}
"""
RUN = """
import sys
import device_first_load
sys.exit(device_first_load.main())
"""


@pytest.mark.parametrize(("code", "verdict"), [(RUN, "the bits are right"), (SPOIL + RUN, "WRONG BITS")])
def test_what_a_kernel_sees_after_a_load_is_compared(code, verdict, tmp_path):
    path = [str(ROOT / "tests/support/stand_in"), str(ROOT / "tools"), *filter(None, sys.path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-c", code, "--size_gib", "0.001", "--dir", tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert verdict in done.stdout, done.stderr
    assert done.returncode == (verdict == "WRONG BITS")
    assert list(tmp_path.iterdir()) == []
