import json
import os
import subprocess
import sys
from pathlib import Path

import device_bench
import pytest
from contenders import Contender

ROOT = Path(__file__).parents[2]
ABOUT = {"device": "a device", "cpus": 2, "kernel": "6", "torch": "2", "command": "c", "not_installed": ["a peer"]}


class InProcess(Contender):
    """Answers with a rate and a checksum of its own, or fails; the clock goes on by what it says."""

    def __init__(self, clock, seconds=1.0, checksum=7, error=None):
        self.clock, self.seconds, self.checksum, self.error, self.jobs = clock, seconds, checksum, error, []

    def ask(self, job):
        self.jobs.append(job)
        self.clock.now += self.seconds
        if self.error is not None:
            raise self.error
        return {"bytes": 2_000_000_000, "seconds": self.seconds, "checksum": self.checksum, "cpu_seconds": 0.5}


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def record(tmp_path):
    return device_bench.Record(tmp_path / "out", ABOUT)


def in_turns(record, contenders, clock, seconds, rounds=7, shares=1, state="cold"):
    budget = device_bench.Budget(seconds, shares, clock)
    turns = [device_bench.Turn(contender, "job", row, None, 7) for row, contender in contenders.items()]
    device_bench.take_turns(record, "blocks-2", state, turns, rounds, budget.next_share(), budget)


def saved(record):
    return json.loads(record.out.with_suffix(".json").read_text())


def test_who_brings_wrong_bytes_or_fails_is_named_and_the_others_go_on(record, clock):
    contenders = {
        "flashpack": InProcess(clock),
        "safetensors": InProcess(clock, checksum=8),
        "fastsafetensors": InProcess(clock, error=RuntimeError("no such symbol")),
    }
    in_turns(record, contenders, clock, 100, rounds=2)
    assert saved(record)["failed"] == {
        "blocks-2: safetensors": "wrong bytes on the device, cold",
        "blocks-2: fastsafetensors": "no such symbol",
    }
    assert [len(contender.jobs) for contender in contenders.values()] == [3, 1, 1]
    assert {m["row"] for m in saved(record)["measurements"]} == {"flashpack"}


@pytest.mark.parametrize(
    ("failed", "ours"),
    [("blocks-2: flashpack", True), ("sweep: default", True), ("blocks-2: flashpack-0.4.5", False)],
)
def test_only_a_failure_of_ours_fails_the_whole(failed, ours):
    assert device_bench.is_ours(failed) is ours


def test_what_was_measured_is_on_disk_at_once(record, clock):
    class Looks(InProcess):
        def ask(self, job):
            self.seen = saved(record)["measurements"] if self.jobs else []
            return super().ask(job)

    contenders = {"flashpack": Looks(clock), "safetensors": Looks(clock)}
    in_turns(record, contenders, clock, 100, rounds=1)
    assert len(contenders["flashpack"].seen) == 3
    assert "| flashpack | 1 | 2.00 |" in record.out.with_suffix(".md").read_text()
    assert sorted(p.name for p in record.out.parent.iterdir()) == ["out.json", "out.md"]


def test_every_one_has_a_turn_in_its_share_of_the_time_and_none_when_it_is_over(record, clock):
    contenders = {name: InProcess(clock, seconds=2) for name in ("a", "b", "c")}
    in_turns(record, contenders, clock, 100, shares=50)
    assert [len(contender.jobs) for contender in contenders.values()] == [1, 1, 1]
    in_turns(record, contenders, clock, 9, shares=1)
    assert [len(contender.jobs) for contender in contenders.values()] == [2, 3, 3]
    in_turns(record, contenders, clock, 3, shares=1)
    assert [len(contender.jobs) for contender in contenders.values()] == [3, 4, 3]


def test_shares_that_end_early_leave_their_time_to_the_others(clock):
    budget = device_bench.Budget(90, 3, clock)
    assert budget.next_share() == 30
    clock.now = 10
    assert budget.next_share() == 50
    assert budget.next_share() == 90
    clock.now = 95
    assert budget.next_share() == 95


def test_rates_are_medians_without_the_first_round_held_against_the_slower_part(record):
    seconds = {"disk": [9, 1, 1], "h2d": [9, 0.5, 0.5], "flashpack": [9, 2, 4, 2], "peer": [4]}
    for row, values in seconds.items():
        for number, value in enumerate(values):
            answer = {"bytes": 2_000_000_000, "seconds": value, "cpu_seconds": 0.5, "host_peak_mib": 64}
            if row == "flashpack":
                answer["driver_seconds"] = 0.01
            record.add("blocks-2", "cold", row, number > 0, answer)
    text = record.out.with_suffix(".md").read_text()
    assert "| flashpack | 3 | 1.00 | 0.50 | 0.250 | 0.0050 |  | 64 |  |  |  |  |  |  |  |" in text
    assert "| peer | first | 0.50 | 0.25 | 0.250 |  |  | 64 |" in text
    assert "not installed: a peer" in text


def test_a_run_on_a_stand_in_for_the_device(tmp_path):
    (tmp_path / "disk").mkdir()
    path = [str(ROOT / "tests/support/stand_in"), *filter(None, sys.path)]
    command = [sys.executable, ROOT / "tools/device_bench.py", "small-2", "--rounds", "1", "--scale", "0.01"]
    command += ["--dir", tmp_path / "disk", "--out", tmp_path / "out"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    result = json.loads((tmp_path / "out.json").read_text())
    assert done.returncode == 0, done.stderr + str(result["failed"])
    assert (tmp_path / "out.md").read_text() == done.stdout
    assert list((tmp_path / "disk").iterdir()) == []
    rows = {(m["state"], m["row"]) for m in result["measurements"]}
    for state in ("cold", "page cache"):
        for row in ("flashpack", "flashpack, not verified", "flashpack, safetensors file", "safetensors", "h2d"):
            assert (state, row) in rows
    load = next(m for m in result["measurements"] if m["row"] == "flashpack")
    assert load["first_tensor_seconds"] <= load["seconds"]
    assert load["bytes"] >= 0.02 * (1 << 30)
