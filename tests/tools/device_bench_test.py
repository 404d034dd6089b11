from pathlib import Path

import device_bench
import pytest
import torch
from contenders import Contender


class InProcess(Contender):
    """Answers with a rate and a checksum of its own."""

    def __init__(self, name, checksum=0, seconds=1.0):
        self.name, self.checksum, self.seconds = name, checksum, seconds
        self.failure, self.ours = None, name in device_bench.OURS
        self.rates, self.jobs = {}, []

    def ask(self, job):
        self.jobs.append(job)
        return {"bytes": 2_000_000_000, "seconds": self.seconds, "checksum": self.checksum}


@pytest.fixture
def measured(monkeypatch):
    """(the checksum that is brought, the expected one) -> rooflines and contenders after two rounds."""
    monkeypatch.setattr(device_bench, "prepare", lambda path, state: None)

    def run(brought, expected):
        rooflines = InProcess("rooflines", seconds=0.5)
        contenders = [InProcess("flashpack", brought), InProcess("safetensors", 99)]
        device_bench.measure(contenders, rooflines, Path(), 2, expected)
        return rooflines, contenders

    return run


def test_wrong_bytes_of_ours_on_the_device_end_the_measurement(measured):
    with pytest.raises(RuntimeError, match="flashpack brought wrong bytes"):
        measured(7, 8)


def test_rates_are_held_against_the_slower_part_and_a_peer_that_fails_is_out(measured, monkeypatch):
    rooflines, contenders = measured(7, 7)
    assert contenders[1].rates == {}
    assert contenders[0].rates == {"cold": [2.0, 2.0], "page cache": [2.0, 2.0]}
    assert contenders[0].jobs == ["load"] * 6
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a device")
    text = device_bench.as_markdown(device_bench.report(contenders, rooflines), "command")
    assert "| flashpack | 2.00 | 0.50 | 2.00 | 0.50 |" in text
    assert "| safetensors | safetensors brought wrong bytes" in text
