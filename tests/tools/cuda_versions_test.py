"""The device path compiles with every CUDA runtime that it is written for, and not only with the one of this machine.

tools/test.sh fetches the headers; where it had no network, the tests are skipped.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEADERS = ROOT / ".cache/cuda"
# Another signature of a function of the runtime in each; the wheels of 12.9 are what `pip install` builds with.
VERSIONS = ("12.4", "12.8", "12.9")
WARNINGS = ("-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Wno-missing-field-initializers", "-Werror")


@pytest.fixture
def wheels(request):
    folder = HEADERS / request.param
    if not folder.is_dir():
        pytest.skip(f"no headers of CUDA {request.param}: tools/test.sh could not fetch them")
    return folder


@pytest.mark.parametrize("source", ["engine/copier_cuda.cc", "engine/gate_cuda.cc", "tests/support/fake_cudart.cc"])
@pytest.mark.parametrize("wheels", VERSIONS, indirect=True)
def test_the_device_path_compiles(wheels, source):
    include = [f"-isystem{wheels / 'nvidia' / name / 'include'}" for name in ("cuda_runtime", "cuda_nvcc")]
    command = ["g++", "-std=c++20", "-fsyntax-only", *WARNINGS, "-I.", "-Iinclude", *include, source]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("wheels", ["12.9"], indirect=True)
def test_a_build_without_a_toolkit_takes_the_runtime_of_the_wheels(wheels, tmp_path):
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.25)\nproject(finds CXX)\n"
        f"list(APPEND CMAKE_MODULE_PATH {ROOT}/engine/cmake)\nfind_package(CudaRuntime 12.4)\n"
        'message("found <${CudaRuntime_VERSION}> ${CudaRuntime_FOUND}")\n'
    )
    command = ["cmake", "-S", tmp_path, "-B", tmp_path / "build", f"-DPython3_EXECUTABLE={sys.executable}"]
    command += ["-DCMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit=ON"]
    environment = {**os.environ, "PYTHONPATH": str(wheels)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "found <12.9> TRUE" in done.stderr
