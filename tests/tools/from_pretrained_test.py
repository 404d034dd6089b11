import from_pretrained
import pytest


def answer(checksum=1, seconds=1.0):
    return {"seconds": seconds, "cpu_seconds": 0.25, "peak_of_bytes": 1.02, "bytes": 800_000_000, "checksum": checksum}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(5000))
    return tmp_path


def test_both_ways_are_measured_in_turns_in_both_states(monkeypatch, folder):
    asked = []

    def sample(name, way, state, folder):
        asked.append((state, way))
        return answer(seconds=2.0 if way == "as it is" else 1.0)

    monkeypatch.setattr(from_pretrained, "sample", sample)
    samples = from_pretrained.measure("Llama", folder, rounds=2)
    ways = from_pretrained.WAYS
    assert asked == [(state, way) for state in from_pretrained.STATES for way in (*ways, *ways[::-1])]
    table = from_pretrained.as_markdown({"Llama": samples})
    assert "| Llama, as it is | 0.80 | 2.00 | 0.25 | 1.02 | 2.00 | 0.25 | 1.02 |" in table
    assert "| Llama, accelerate() | 0.80 | 1.00 | 0.25 | 1.02 | 1.00 | 0.25 | 1.02 |" in table


def test_another_bit_stops_the_comparison(monkeypatch, folder):
    monkeypatch.setattr(
        from_pretrained, "sample", lambda name, way, state, folder: answer(checksum=1 if way == "as it is" else 2)
    )
    with pytest.raises(RuntimeError, match="different bytes"):
        from_pretrained.measure("Llama", folder, rounds=1)
