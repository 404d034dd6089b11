import flashpack
import pytest
import torch
from flashpack import _engine
from flashpack._native import Engine, open_checkpoint
from support import random_tensor

MIB = 1 << 20


def load(engine, path, size_bytes):
    target = torch.zeros(size_bytes, dtype=torch.uint8)
    # An odd address, so that every byte takes a slot.
    stats = engine.load(open_checkpoint(path), [(0, 1, size_bytes - 1, target.data_ptr())])
    return target[:-1], stats


def test_an_engine_takes_the_options_it_is_given(tmp_path):
    path = tmp_path / "a.flashpack"
    source = random_tensor((9 * MIB,), torch.uint8, 0)
    flashpack.pack_to_file({"a": source}, path, target_dtype=None)
    loaded, small = load(Engine(chunk_bytes=MIB, queue_depth=2, staging_bytes=2 * MIB, workers=1), path, 9 * MIB)
    assert torch.equal(loaded, source[1:])
    loaded, usual = load(Engine(), path, 9 * MIB)
    assert torch.equal(loaded, source[1:])
    assert small["operations"] > 2 * usual["operations"]


@pytest.mark.parametrize(
    "options", [{"chunk_bytes": 3 * MIB}, {"queue_depth": 0}, {"staging_bytes": 1}, {"workers": 65}], ids=str
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError):
        Engine(**options)


def test_a_signal_handler_may_load_while_its_thread_makes_an_engine(monkeypatch):
    made = []

    class Interrupted:
        def __init__(self, *args, **options):
            made.append(self)
            if len(made) == 1:
                assert _engine._lock.acquire(timeout=30), "the handler would wait for its own thread"
                _engine._lock.release()
                assert _engine.engine() is made[1]

    monkeypatch.setattr(_engine, "Engine", Interrupted)
    monkeypatch.setattr(_engine, "_engines", {})
    assert _engine.engine() is made[1]
    assert len(made) == 2
