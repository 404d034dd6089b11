"""FLASHPACK_TRACE: what loads and saves do, as a file for Perfetto."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

LOADS = """
import os, sys
import flashpack
flashpack.load_file(sys.argv[1])
"""


def run(code, path, trace):
    command = [sys.executable, "-c", code, path]
    environment = {**os.environ, "FLASHPACK_TRACE": str(trace)}
    return subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=120)


def events_in(trace, killed=False):
    text = trace.read_text()
    assert text.endswith("\n]\n") != killed
    return [event for event in json.loads(text + "]" * killed) if event["ph"] == "X"]


@pytest.fixture
def path(pack):
    return pack({"a": torch.zeros(9 << 20, dtype=torch.uint8)})


def test_a_process_writes_its_steps_with_times_and_bytes(path, tmp_path):
    trace = tmp_path / "trace.json"
    result = run(LOADS, path, trace)
    assert (result.returncode, result.stderr) == (0, "")
    events = events_in(trace)
    transfers = [event for event in events if event["name"] == "transfer"]
    assert sum(event["args"]["bytes"] for event in transfers) >= 9 << 20
    reads = [event for event in events if event["name"] in ("read", "read cached")]
    assert sum(event["args"]["bytes"] for event in reads) >= 9 << 20
    for event in reads:
        assert event["args"]["path"] == str(path)
        whole = next(each for each in transfers if each["args"]["transfer"] == event["args"]["transfer"])
        assert whole["ts"] <= event["ts"] <= event["ts"] + event["dur"] <= whole["ts"] + whole["dur"] + 0.002


def test_without_the_variable_there_is_no_trace(path, tmp_path):
    assert run(LOADS, path, "").returncode == 0
    assert os.listdir(tmp_path) == [os.path.basename(path)]


def test_a_process_that_is_killed_leaves_its_transfers(path, tmp_path):
    trace = tmp_path / "trace.json"
    result = run(LOADS + "os.kill(os.getpid(), 9)\n", path, trace)
    assert result.returncode == -signal.SIGKILL
    assert "transfer" in {event["name"] for event in events_in(trace, killed=True)}


FORKS = (
    LOADS
    + """
child = os.fork()
if child == 0:
    flashpack.load_file(sys.argv[1])
    os._exit(0)
print(child)
sys.exit(os.waitpid(child, 0)[1])
"""
)


def test_a_fork_has_a_trace_of_its_own_and_leaves_that_of_its_parent_alone(path, tmp_path):
    trace = tmp_path / "trace.json"
    result = run(FORKS, path, trace)
    assert (result.returncode, result.stderr) == (0, "")
    mine = events_in(trace)
    childs = events_in(tmp_path / f"trace.{int(result.stdout)}.json", killed=True)
    assert [event["name"] for event in mine].count("transfer") == [event["name"] for event in childs].count("transfer")


RELEASES = LOADS + "flashpack.parallel_read.release_pinned_pool()\nflashpack.load_file(sys.argv[1])\n"


def test_engines_that_come_later_go_on_with_the_same_trace(path, tmp_path):
    once, twice = tmp_path / "once.json", tmp_path / "twice.json"
    assert run(LOADS, path, once).returncode == 0
    assert run(RELEASES, path, twice).returncode == 0
    assert len({event["pid"] for event in events_in(twice)}) == 2
    assert len({event["pid"] for event in events_in(once)}) == 1


def test_a_trace_that_cannot_be_written_is_a_warning(path, tmp_path):
    result = run(LOADS, path, tmp_path / "absent" / "trace.json")
    assert result.returncode == 0
    assert "there is no trace of loads and saves" in result.stderr


def test_a_fifo_that_nobody_reads_holds_up_no_load(path, tmp_path):
    os.mkfifo(tmp_path / "trace.json")
    result = run(LOADS, path, tmp_path / "trace.json")
    assert result.returncode == 0
    assert "there is no trace of loads and saves" in result.stderr
    assert "trace.json" in result.stderr


def test_a_trace_may_go_to_a_character_device(path):
    result = run(LOADS, path, "/dev/null")
    assert (result.returncode, result.stderr) == (0, "")
