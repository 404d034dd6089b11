"""`flashpack tune`, which runs the program of the package."""

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner
from flashpack import _tune
from flashpack.__main__ import main


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
    monkeypatch.setattr(_tune, "_HERE", tmp_path / "package")
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin"


def test_the_program_of_the_package_measures_and_tells(tmp_path):
    done = run(tmp_path, "--size_gib", "0.02", "--budget", "1s", "--dry_run", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["page_cache"][0]["gb_per_s"] > 0
    assert list(tmp_path.iterdir()) == []


def test_the_exit_status_of_the_program_is_that_of_the_command(tmp_path):
    missing = run(tmp_path / "missing")
    assert missing.returncode == 1
    assert "missing" in missing.stderr
    assert run("--budget", "0").returncode == 2


def test_without_the_program_of_the_package_the_one_on_path_is_run_with_all_options(on_path):
    stand_in(on_path, 'printf "%s\\n" "$@" > "${0%/*}/arguments"; exit 3')
    options = ["--budget", "20s", "--size_gib", "0.5", "--dry_run", "--json"]
    assert CliRunner().invoke(main, ["tune", *options, "--", "-a b"]).exit_code == 3
    passed = (on_path / "arguments").read_text().splitlines()
    assert passed == ["--budget=20s", "--size_gib=0.5", "--dry_run", "--json", "--", "-a b"]


def test_a_program_that_is_not_there_is_told_with_what_would_bring_it(on_path):
    result = CliRunner().invoke(main, ["tune"])
    assert result.exit_code == 1
    assert "there is no flashpack_tune" in result.stderr
    assert "libcli11-dev" in result.stderr


def test_a_signal_that_ends_the_program_is_no_success(on_path):
    stand_in(on_path, "kill -TERM $$")
    assert CliRunner().invoke(main, ["tune"]).exit_code == 128 + 15
