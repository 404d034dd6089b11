"""Peers that benchmarks compare with: taken from PyPI, each release into a folder of its own; and calls of one."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from contenders import Tensors

FOLDER = Path(__file__).resolve().parent.parent / ".cache" / "peers"
PARALLEL = {"FLASHPACK_CPU_PARALLEL_READ": "1"}
"""The environment in which flashpack 0.4.5 reads a file with several threads. Otherwise it maps it."""


def folder_of(package: str) -> Path:
    """`package`: a release, as in "safetensors==0.8.0"."""
    return FOLDER / package.replace("==", "-")


def install(package: str) -> str | None:
    """Takes a release from PyPI, without torch and numpy, which are there. Returns why that failed, if it did."""
    folder = folder_of(package)
    if folder.exists():
        return None
    FOLDER.mkdir(parents=True, exist_ok=True)
    # Two benches may take the same release at once.
    with tempfile.TemporaryDirectory(dir=FOLDER, prefix=f"{folder.name}.") as temporary:
        part, without = Path(temporary, "part"), Path(temporary, "without.txt")
        without.write_text("".join(f"{name}; sys_platform == 'none'\n" for name in ("torch", "numpy", "triton")))
        command = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", sys.executable]
        command += ["--override", str(without), "--target", str(part), package]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode != 0:
            return f"cannot be installed: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}"
        try:
            part.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    return None


def environment_with(package: str) -> dict[str, str]:
    """Returns the environment of a process that imports this release, and nothing else that PYTHONPATH may name. For
    no release, "", it is that of this process.
    """
    return {**os.environ, "PYTHONPATH": str(folder_of(package))} if package else dict(os.environ)


def save_tensorizer(tensors: Tensors, path: Path, **options: Any) -> None:
    from tensorizer import TensorSerializer

    serializer = TensorSerializer(str(path), **options)
    serializer.write_state_dict(tensors)
    serializer.close()


def load_tensorizer(path: Path, **options: Any) -> Tensors:
    from tensorizer import TensorDeserializer

    with TensorDeserializer(str(path), device="cpu", **options) as file:
        return dict(file.items())
