import flashpack
import pytest
import save_bench
import torch
from contenders import Contender

SMALL = {"layers.0.q": torch.randn(300, 70, dtype=torch.bfloat16), "layers.0.norm": torch.randn(70).bfloat16()}


class InProcess(Contender):
    """Answers that `seconds` were taken for 2 GB, and one of them on a CPU."""

    def __init__(self, name, seconds=1.0, checksum=1):
        self.name, self.seconds, self.checksum = name, seconds, checksum
        self.failure, self.ours = None, name in save_bench.OURS
        self.samples, self.jobs = [], []

    def ask(self, job):
        self.jobs.append(job)
        answer = {"bytes": 2_000_000_000, "seconds": self.seconds, "cpu_seconds": 1.0}
        return answer | ({"checksum": self.checksum, "expected": 1} if job == "check" else {})


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(save_bench, "decoder_tensors", lambda size_gib: dict(SMALL))


@pytest.mark.parametrize("name", [*save_bench.OURS, "safetensors 0.8.0", "torch.save", "torch.save, no CRC-32"])
def test_every_saver_writes_what_the_model_has_and_leaves_nothing_behind(name, small, tmp_path):
    if name.startswith("safetensors"):
        pytest.importorskip("safetensors")
    answer = save_bench.save_once(save_bench.SAVERS[name], tmp_path, 1, check=True)
    assert answer["checksum"] == answer["expected"]
    assert answer["bytes"] == sum(tensor.nbytes for tensor in SMALL.values())
    assert answer["seconds"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_saver_that_writes_wrong_bytes_is_found_out(small, tmp_path):
    def save(tensors, path):
        flashpack.pack_to_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, path)

    answer = save_bench.save_once(save_bench.Saver(save), tmp_path, 1, check=True)
    with pytest.raises(RuntimeError, match="NAME wrote wrong bytes"):
        save_bench.verify("NAME", answer)


@pytest.mark.parametrize("name", save_bench.OURS)
def test_names_say_what_is_converted_and_which_files_have_checksums(name, tmp_path):
    saver, path = save_bench.SAVERS[name], tmp_path / "file"
    source = saver.source(dict(SMALL), tmp_path)
    converted = "float32 to bfloat16" in name
    assert {tensor.dtype for tensor in source.values()} == {torch.float32 if converted else torch.bfloat16}
    saver.save(source, path)
    if "no checksums" in name:
        with pytest.raises(flashpack.FlashPackError, match="no checksums"):
            flashpack.verify_file(path)
    else:
        assert flashpack.verify_file(path)["corrupt"] == []


def test_only_counted_rounds_are_samples_and_wrong_bytes_of_a_peer_put_it_out():
    writers = [InProcess("fio 4M x 8"), InProcess("flashpack"), InProcess("torch.save", checksum=2)]
    save_bench.measure(writers, 2)
    assert [writer.jobs for writer in writers] == [["check", "save", "save"]] * 2 + [["check"]]
    assert [len(writer.samples) for writer in writers] == [2, 2, 0]
    with pytest.raises(RuntimeError, match="flashpack wrote wrong bytes"):
        save_bench.measure([InProcess("flashpack", checksum=2)], 1)


def test_rates_are_held_against_the_better_fio_and_what_is_missing_is_named():
    writers = [
        InProcess("fio 4M x 8", 0.8),
        InProcess("fio 4M x 16", 0.5),
        InProcess("flashpack"),
        InProcess("torch.save"),
    ]
    writers[3].checksum = 2
    save_bench.measure(writers, 3)
    result = save_bench.report(writers, {"safetensors 0.8.0": "no network"})
    text = save_bench.as_markdown(result, "command")
    assert "| flashpack | 2.00 | 0.50 | 0.500 |" in text
    assert "| fio 4M x 16 | 4.00 | 1.00 | 0.500 |" in text
    assert "| torch.save | torch.save wrote wrong bytes | | |" in text
    assert "| safetensors 0.8.0 | no network | | |" in text


def test_without_fio_there_is_nothing_to_hold_rates_against():
    writers = [InProcess("flashpack")]
    save_bench.measure(writers, 1)
    assert "| flashpack | 2.00 |  | 0.500 |" in save_bench.as_markdown(save_bench.report(writers, {}), "command")


def test_a_contender_that_is_missing_says_why(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(save_bench, "install", lambda package: f"no {package}")
    assert save_bench.missing("fio 4M x 8") == "fio is not installed"
    assert save_bench.missing("flashpack") is None
    assert save_bench.missing("tensorizer 2.12.1") == "no tensorizer==2.12.1"


def test_a_process_answers_for_its_contender(tmp_path):
    arguments = ["--dir", str(tmp_path), "--size_gib", "0.01"]
    writer = save_bench.Writer("flashpack", arguments)
    try:
        answer = writer.ask("save")
    finally:
        writer.close()
    assert answer["bytes"] > 0.01 * (1 << 30)
    assert answer["cpu_seconds"] > 0
    assert list(tmp_path.iterdir()) == []
