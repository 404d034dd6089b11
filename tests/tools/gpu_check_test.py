import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def check(tmp_path):
    """Runs the script in a tree of its own, with the given programs first in PATH."""
    (tmp_path / "tree/tools").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").symlink_to(sys.executable)
    for name in ("gpu_check.sh", "lib.sh", "tally.py"):
        shutil.copy(TOOLS / name, tmp_path / "tree/tools")

    def run(*arguments, programs=(), **variables):
        for name in programs:
            (tmp_path / "bin" / name).write_text("#!/bin/sh\necho 'GPU 0: of the test'\n")
            (tmp_path / "bin" / name).chmod(0o755)
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "GPU_CHECK_DIR": str(tmp_path), **variables}
        command = ["bash", tmp_path / "tree/tools/gpu_check.sh", *arguments]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    run.tree = tmp_path / "tree"
    return run


def test_a_step_that_is_none_is_refused_before_anything_is_done(check):
    done = check("check", "out", "load", "tabel", programs=["nvidia-smi"])
    assert done.returncode == 1
    assert done.stderr == "no such step: tabel\n"
    assert not (check.tree.parent / "out").exists()


def test_what_should_have_been_carried_and_is_not_is_named(check):
    carried = check.tree / ".gpu"
    (carried / "debs").mkdir(parents=True)
    (carried / "manifest").write_text("debs/liburing-dev_2.3-3_amd64.deb\npip/pip-26-none-any.whl\n")
    (carried / "pip").mkdir()
    (carried / "pip/pip-26-none-any.whl").touch()
    done = check("step", "carried", "out")
    assert done.returncode == 1
    assert done.stdout.splitlines()[0] == "not carried: liburing-dev_2.3-3_amd64.deb"
    assert "not carried: pip" not in done.stdout


def test_what_is_not_carried_is_named_at_the_end_of_its_step_too(check):
    (check.tree / ".gpu").mkdir()
    (check.tree / ".gpu/manifest").write_text("cuda/nvidia_cuda_crt-13.whl\n")
    done = check("check", "out", "carried", programs=["nvidia-smi"], GPU_CHECK_SECONDS="20")
    assert done.returncode == 1
    assert "\nnot carried: nvidia_cuda_crt-13.whl\n" in done.stdout


def test_without_anything_carried_the_machine_has_to_have_it(check):
    done = check("step", "carried", "out")
    assert (done.returncode, done.stdout) == (0, "nothing is carried: the machine has to have it all\n")


def test_steps_for_which_no_time_is_left_have_failed(check):
    done = check("check", "out", "load", "table", programs=["nvidia-smi"], GPU_CHECK_SECONDS="0")
    assert done.returncode == 1
    lines = [f"{name}: no time is left" for name in ("carried", "load", "table")]
    assert done.stdout.splitlines()[:4] == ["GPU 0: of the test", *lines]
    assert done.stdout.endswith("0 passed, 3 failed\n")


def test_the_limits_of_the_default_steps_fit_into_nine_minutes():
    script = (TOOLS / "gpu_check.sh").read_text()
    steps = ["carried", *re.search(r"^steps=\((.*)\)", script, re.MULTILINE).group(1).split()]
    limits = re.search(r"limits=\((.*)\)", script).group(1)
    seconds = {name: int(value) for name, value in re.findall(r"\[(\w+)\]=(\d+)", limits)}
    assert sum(seconds[name] for name in steps) <= 540
    assert seconds.keys() - steps == {"process", "suite", "tune"}


def test_the_rehearsal_compiles_all_that_the_runtime_of_the_tests_consists_of():
    script = (TOOLS / "gpu_check.sh").read_text()
    compiled = set(re.search(r"for name in tests/support/\{(.*)\}; do", script).group(1).split(","))
    lists = (TOOLS.parent / "tests/support/CMakeLists.txt").read_text()
    libraries = re.findall(r"add_library\(flashpack_(?:fake_cuda|test_bulk) OBJECT (.*)\)", lists)
    assert len(libraries) == 2
    assert compiled == {source.removesuffix(".cc") for each in libraries for source in each.split()} | {
        "stand_in/cudart"
    }


def test_steps_that_are_not_named_are_the_default_ones(check):
    done = check("check", "out", programs=["nvidia-smi"], GPU_CHECK_SECONDS="0")
    named = [line.split(":")[0] for line in done.stdout.splitlines() if line.endswith(": no time is left")]
    assert named == ["carried", "load", "table", "pytest", "ctest", "memcheck", "sweep"]


@pytest.mark.parametrize(("status", "wanted"), [(0, 0), (3, 0), (1, 1)])
def test_the_tuner_shows_its_report_and_a_disk_without_a_name_is_no_failure(check, status, wanted):
    tools = check.tree / "build/gpu/tune/tools"
    tools.mkdir(parents=True)
    for name in ("flashpack_tune", "flashpack_probe"):
        (tools / name).write_text(f'#!/bin/sh\necho "{name}: $*"\nexit {status}\n')
        (tools / name).chmod(0o755)
    done = check("check", "out", "tune", programs=["nvidia-smi", "cmake"], GPU_CHECK_SECONDS="60")
    assert done.returncode == wanted, done.stdout
    assert "\nflashpack_tune: " in done.stdout
    assert " --device cuda:0 " in done.stdout
    assert "\nflashpack_probe: " in done.stdout


def test_a_step_that_is_cut_short_shows_what_it_has_found(check):
    (check.tree / "tools/device_bench.py").write_text(
        "import pathlib, sys, time\n"
        "pathlib.Path(sys.argv[sys.argv.index('--out') + 1] + '.md').write_text('| a row |\\n')\n"
        "print('under way', flush=True)\ntime.sleep(60)\n"
    )
    (check.tree / "build/gpu/site/flashpack").mkdir(parents=True)
    done = check("check", "out", "table", programs=["nvidia-smi"], GPU_CHECK_SECONDS="10")
    assert done.returncode == 1
    assert "| a row |\n" in done.stdout
    assert "FAILED   table: ended with status 124" in done.stdout


def test_a_wheel_of_other_sources_is_not_taken(check):
    for name in ("CMakeLists.txt", "pyproject.toml", "LICENSE"):
        (check.tree / name).write_text(name)
    for name in ("engine", "include", "torch_binding"):
        (check.tree / name).mkdir()
    sums = []
    for text in ("a", "b", "a"):
        (check.tree / "engine/engine.cc").write_text(text)
        (check.tree / "engine/engine.pyc").write_text(str(len(sums)))
        sums.append(check("sources").stdout)
    assert sums[0] == sums[2] != sums[1]
