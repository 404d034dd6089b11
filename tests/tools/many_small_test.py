import many_small
import pytest
from contenders import Contender, checksum

COUNT = 50


@pytest.fixture
def files(tmp_path):
    tensors = many_small.many_tensors(COUNT)
    many_small.make_files(tmp_path, tensors)
    return tmp_path, tensors


@pytest.mark.parametrize("name", [name for name in many_small.WAYS if not name.startswith("flashpack 0")])
def test_every_way_gives_a_model_the_values_of_the_file(name, files):
    folder, tensors = files
    if name.startswith("safetensors"):
        pytest.importorskip("safetensors")
    answer = many_small.load_once(many_small.WAYS[name], folder, tensors)
    assert answer["checksum"] == checksum(tensors)
    assert answer["seconds"] > 0


def test_a_way_that_leaves_a_model_as_it_was_is_found_out(files):
    folder, tensors = files
    answer = many_small.load_once(many_small.Way(lambda model, folder: None), folder, tensors)
    assert answer["checksum"] != checksum(tensors)


class InProcess(Contender):
    """Answers that it took another millisecond each time."""

    def __init__(self, name, checksum):
        self.name, self.checksum, self.loads = name, checksum, 0
        self.ours, self.failure = name.startswith("flashpack"), None

    def ask(self, job):
        self.loads += 1
        return {"seconds": self.loads / 1000, "cpu_seconds": 0.5, "checksum": self.checksum}


def test_the_first_round_does_not_count_and_a_peer_with_other_bytes_is_out():
    result = many_small.measure([InProcess("flashpack", 1), InProcess("a peer", 2)], 3, expected=1)
    assert result["rows"] == {"flashpack": {"seconds": 0.003, "cpu_seconds": 0.5}}
    text = many_small.as_markdown(result | {"count": 10_000})
    assert "| 10,000 tensors of 4 KiB" in text
    assert "| flashpack | 3.0 | 500.0 |" in text
    assert "| a peer | loaded other bytes | |" in text
    with pytest.raises(RuntimeError, match="other bytes"):
        many_small.measure([InProcess("flashpack", 2)], 1, expected=1)
