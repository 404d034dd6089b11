"""`flashpack tune`, which runs the program of the package."""

import contextlib
import json
import os
import pty
import subprocess
import sys

import pytest
from click.testing import CliRunner
from flashpack import _programs, _tune
from flashpack.__main__ import main
from flashpack._native import FlashPackError


def run(*arguments, **environment):
    """Runs the command as a process, because the program writes to the process's own standard output."""
    command = [sys.executable, "-m", "flashpack", "tune", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})


def stand_in(directory, text):
    path = directory / "flashpack_tune"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def on_path(tmp_path, monkeypatch):
    """Makes the package look as if it came without the program, and returns the only directory on PATH."""
    monkeypatch.setattr(_programs, "_HERE", tmp_path / "package")
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin"


def test_the_program_of_the_package_measures_and_tells(tmp_path):
    done = run(tmp_path, "--size_gib", "0.02", "--budget", "1s", "--dry_run", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["page_cache"][0]["gb_per_s"] > 0
    assert list(tmp_path.iterdir()) == []


def test_probe_shows_what_the_machine_allows_and_why_a_place_has_no_profile(tmp_path):
    def probe(*arguments):
        command = [sys.executable, "-m", "flashpack", "probe", *map(str, arguments)]
        environment = {**os.environ, "XDG_CONFIG_HOME": str(tmp_path)}
        return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, env=environment)

    report = json.loads(probe("--json", tmp_path).stdout)
    assert report["direct_io"]["value"]
    assert "none applies: " in report["profile"]["value"]
    assert "profile" not in json.loads(probe("--json").stdout)
    missing = probe(tmp_path / "missing")
    assert missing.returncode == 1
    assert str(tmp_path / "missing") in missing.stderr


def test_the_exit_status_of_the_program_is_that_of_the_command(tmp_path):
    missing = run(tmp_path / "missing")
    assert missing.returncode == 1
    assert "missing" in missing.stderr
    assert run("--budget", "0").returncode == 2
    assert run("--device", "gpu").returncode == 2
    empty = run("--device", "", tmp_path)
    assert empty.returncode == 2
    assert "--device: has an empty value" in empty.stderr


def test_a_gpu_that_is_not_there_is_told(tmp_path):
    missing = run(tmp_path, "--device", "cuda:99")
    assert missing.returncode == 1
    assert "cuda:99: " in missing.stderr
    assert list(tmp_path.iterdir()) == []


def test_without_the_program_of_the_package_the_one_on_path_is_run_with_all_options(on_path):
    stand_in(on_path, 'printf "%s\\n" "$@" > "${0%/*}/arguments"; exit 3')
    flags = ["--verify", "--writes", "--backend", "--policy", "--dry_run", "--json"]
    options = ["--device", "cuda:1", "--budget", "20s", "--size_gib", "0.5", *flags]
    assert CliRunner().invoke(main, ["tune", *options, "--", "-a b"]).exit_code == 3
    passed = (on_path / "arguments").read_text().splitlines()
    assert passed == ["--device=cuda:1", "--budget=20s", "--size_gib=0.5", *flags, "--", "-a b"]


def test_a_program_that_is_not_there_is_told_with_what_would_bring_it(on_path):
    result = CliRunner().invoke(main, ["tune"])
    assert result.exit_code == 1
    assert "there is no flashpack_tune" in result.stderr
    assert "libcli11-dev" in result.stderr


def test_a_signal_that_ends_the_program_is_no_success(on_path):
    stand_in(on_path, "kill -TERM $$")
    assert CliRunner().invoke(main, ["tune"]).exit_code == 128 + 15


CELLS = [
    {"chunk_bytes": chunk << 20, "queue_depth": depth, "workers": 0, "gb_per_s": speed}
    for chunk, depth, speed in ((4, 8, 2.25), (1, 2, 0.91), (16, 32, 2.5))
]
REPORT = {
    "directory": "/models",
    "device": "cpu",
    "read_bytes": 10**9,
    "default": CELLS[0],
    "best": CELLS[2],
    "disk": CELLS,
    "page_cache": [{**CELLS[0], "gb_per_s": 77.77}],
    "writes": [],
}
SLOTS = [
    {**CELLS[0], "chunk_bytes": chunk << 20, "workers": workers, "staging_bytes": staging << 20, "gb_per_s": speed}
    for chunk, workers, staging, speed in ((4, 0, 96, 35.25), (1, 0, 24, 40.75), (1, 4, 24, 43.25), (2, 0, 48, 36.5))
]
GPU_REPORT = {
    "directory": "/models",
    "device": "cuda:0",
    "read_bytes": 10**9,
    "default": SLOTS[0],
    "best": SLOTS[2],
    "disk": [SLOTS[0]],
    "page_cache": SLOTS,
    "writes": [],
}


@pytest.mark.parametrize("writes", [[], CELLS], ids=["reads", "writes"])
def test_a_picture_has_the_speeds_the_axes_and_the_settings_that_matter(tmp_path, writes):
    pytest.importorskip("matplotlib")
    _tune.draw({**REPORT, "writes": writes}, tmp_path / "map.svg")
    drawn = (tmp_path / "map.svg").read_text()
    for text in ("2.25", "0.91", "2.50", "queue depth", "chunk size, MiB", "GB/s", "default", "best", "/models"):
        assert text in drawn, text
    assert ("durable writes" in drawn) == bool(writes)
    _tune.draw(REPORT, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_loads_to_a_gpu_has_the_staging_memory_and_the_fastest_number_of_workers(tmp_path):
    pytest.importorskip("matplotlib")
    _tune.draw(GPU_REPORT, tmp_path / "map.svg")
    drawn = (tmp_path / "map.svg").read_text()
    for text in ("35.25", "43.25", "36.50", "staging memory, MiB", ">96<", ">24<", "loads from the page cache", "best"):
        assert text in drawn, text
    assert "40.75" not in drawn
    _tune.draw(REPORT, tmp_path / "host.svg")
    assert "77.77" not in (tmp_path / "host.svg").read_text()


def test_the_same_figures_give_the_same_picture(tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("a.svg", "b.svg"):
        _tune.draw(REPORT, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_the_picture_is_drawn_of_what_the_program_has_measured_whatever_it_could_keep(on_path, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "report").write_text(json.dumps(REPORT))
    stand_in(
        on_path,
        f'for each; do case $each in --json_file=*) /bin/cp {tmp_path}/report "${{each#*=}}";; esac; done; exit 3',
    )
    assert CliRunner().invoke(main, ["tune", "--picture", str(tmp_path / "map.svg")]).exit_code == 3
    assert "2.25" in (tmp_path / "map.svg").read_text()


def test_a_picture_that_cannot_be_made_is_told_before_anything_is_measured(on_path, tmp_path, monkeypatch):
    stand_in(on_path, 'echo > "${0%/*}/ran"')
    result = CliRunner().invoke(main, ["tune", "--picture", str(tmp_path / "map.jpg")])
    assert result.exit_code == 1
    assert "a picture is a file of .svg or .png" in result.stderr
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = CliRunner().invoke(main, ["tune", "--picture", str(tmp_path / "map.svg")])
    assert result.exit_code == 1
    assert "pip install matplotlib" in result.stderr
    assert not (on_path / "ran").exists()


def test_where_no_disk_was_measured_there_is_no_picture_and_that_is_said(tmp_path):
    with pytest.raises(FlashPackError, match="nothing to draw: in /models all is page cache"):
        _tune.draw({**REPORT, "disk": []}, tmp_path / "map.svg")


def test_on_a_terminal_the_map_has_colours_unless_they_are_not_wanted(tmp_path):
    def shown(**environment):
        terminal, child = pty.openpty()
        options = ["--size_gib", "0.02", "--budget", "1s", "--dry_run"]
        process = subprocess.Popen(
            [_programs.find("flashpack_tune"), *options, tmp_path],
            stdout=child,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "TERM": "xterm", "NO_COLOR": "", **environment},
        )
        os.close(child)
        output = b""
        with contextlib.suppress(OSError):  # EIO: the other end is closed, and all has been read.
            while chunk := os.read(terminal, 65536):
                output += chunk
        assert process.wait() == 0
        os.close(terminal)
        return output

    coloured = shown()
    if b"chunk, depth" not in coloured:
        pytest.skip("this file system keeps its pages")
    assert b"\x1b[48;5;" in coloured
    assert b"\x1b" not in shown(NO_COLOR="1")
    assert b"\x1b" not in shown(TERM="dumb")


def test_a_picture_that_has_no_place_is_refused_before_anything_is_measured(on_path, tmp_path):
    stand_in(on_path, 'touch "${0%/*}/measured"')
    result = CliRunner().invoke(main, ["tune", "--picture", str(tmp_path / "missing" / "x.svg")])
    assert result.exit_code == 1
    assert "missing is no directory" in result.stderr
    assert os.listdir(on_path) == ["flashpack_tune"]


def test_a_measurement_that_has_failed_is_not_drawn(on_path, tmp_path):
    pytest.importorskip("matplotlib")
    stand_in(on_path, 'for each; do case $each in --json_file=*) : > "${each#*=}";; esac; done; exit 1')
    result = CliRunner().invoke(main, ["tune", "--picture", str(tmp_path / "x.svg")])
    assert result.exit_code == 1
    assert result.stderr == ""


def test_a_command_that_is_ended_ends_the_program(on_path, monkeypatch):
    told = 'trap \'echo > "${0%/*}/ended"; exit 1\' TERM; : > "${0%/*}/ready"'
    stand_in(on_path, f"ulimit -t 30; {told}; while :; do :; done")
    monkeypatch.setenv("PATH", f"{on_path}:/bin:/usr/bin")
    code = f"""
import os, pathlib, signal, subprocess
from flashpack import _programs
from flashpack.__main__ import main

home = pathlib.Path({str(on_path)!r})
_programs._HERE = home / "package"
wait = subprocess.Popen.wait

def signalled(process, *arguments, **options):
    if process.poll() is None and not (home / "sent").exists():
        while not (home / "ready").exists():
            pass
        (home / "sent").touch()
        os.kill(os.getpid(), signal.SIGTERM)
    return wait(process, *arguments, **options)

subprocess.Popen.wait = signalled
main(["tune"])
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 128 + 15
    assert (on_path / "ended").exists()
