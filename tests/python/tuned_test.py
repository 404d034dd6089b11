import errno
import json
import logging
import os
import subprocess

import flashpack
import pytest
import torch
from flashpack import _engine, _programs
from flashpack._native import Engine, FlashPackError, tuned_options
from support import random_tensor

MIB = 1 << 20


@pytest.fixture
def packed(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("FLASHPACK_TUNE", raising=False)
    path = tmp_path / "a.flashpack"
    flashpack.pack_to_file({"a": random_tensor((9 * MIB,), torch.uint8, 0)}, path, target_dtype=None)
    _engine.release_engines()
    yield path
    _engine.release_engines()


@pytest.fixture(scope="module")
def key(tmp_path_factory):
    """Returns what profiles for the disk of the tests are found by, as flashpack_tune has kept it."""
    folder = tmp_path_factory.mktemp("key")
    command = [_programs.find("flashpack_tune"), "--size_gib", "0.02", "--budget", "0.1s", folder]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, "XDG_CONFIG_HOME": str(folder)}
    )
    if done.returncode == 3:
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stderr
    (profile,) = json.loads((folder / "flashpack" / "tune.json").read_text())["profiles"]
    return {name: profile[name] for name in ("storage", "file_system", "kernel", "gpu")}


@pytest.fixture
def profile(packed, key):
    """Keeps a profile for the disk of `packed`, and returns its file."""
    return keep(packed, key, chunk_bytes=MIB, queue_depth=2, workers=1)


def keep(packed, key, **values):
    file = packed.parent / "config" / "flashpack" / "tune.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"profiles": [{**key, **values}]}))
    return file


def stats_of_load(path):
    stats = {}
    loaded = flashpack.load_file(path, stats=stats, verify="never")
    assert torch.equal(loaded["a"], random_tensor((9 * MIB,), torch.uint8, 0))
    return stats


def stats_and_reason_of_load(path, caplog, level):
    """Returns the figures of a load, and why it had no profile, as the log tells once, at this level."""
    with caplog.at_level(logging.DEBUG, "flashpack"):
        stats = stats_of_load(path)
        stats_of_load(path)
    begin = f"loads like that of {path} have the defaults: "
    (record,) = [record for record in caplog.records if record.getMessage().startswith(begin)]
    assert record.levelno == level
    return stats, record.getMessage().removeprefix(begin)


def test_without_a_profile_the_engine_is_the_usual_one(packed, caplog):
    stats, reason = stats_and_reason_of_load(packed, caplog, logging.DEBUG)
    assert stats["profile"] == ""
    assert str(packed.parent / "config/flashpack/tune.json") in reason
    assert list(_engine._engines) == [(None, "")]


def test_a_profile_is_applied_to_loads_and_named_in_their_figures_and_the_log(packed, profile, caplog):
    with caplog.at_level(logging.INFO, "flashpack"):
        stats = stats_of_load(packed)
    assert stats["profile"] == f"1 MiB x 2, 1 workers of {profile}"
    assert stats["profile"] in caplog.text
    assert "have the defaults" not in caplog.text
    with flashpack.stream_tensors(packed) as stream:
        list(stream)
    assert stream.stats["profile"] == stats["profile"]
    assert len(_engine._engines) == 1
    _engine.release_engines()
    profile.unlink()
    assert stats["operations"] > stats_of_load(packed)["operations"]


def test_a_save_has_the_usual_engine(packed, profile):
    flashpack.pack_to_file({"a": torch.ones(3)}, packed.parent / "b.flashpack")
    assert list(_engine._engines) == [(None, "")]


def test_the_environment_turns_it_off(packed, profile, monkeypatch, caplog):
    monkeypatch.setenv("FLASHPACK_TUNE", "off")
    stats, reason = stats_and_reason_of_load(packed, caplog, logging.DEBUG)
    assert (stats["profile"], reason) == ("", "FLASHPACK_TUNE=off")


@pytest.mark.parametrize(
    ("damaged", "why", "level"),
    [
        ("", "is damaged", logging.WARNING),
        ("{", "is damaged", logging.WARNING),
        ('{"profiles": [7]}', "no profile", logging.DEBUG),
        ('{"profiles": [{"storage": "other"}]}', "no profile", logging.DEBUG),
    ],
    ids=repr,
)
def test_a_file_of_profiles_that_is_damaged_or_for_another_disk_is_ignored_with_a_reason(
    packed, profile, damaged, why, level, caplog
):
    profile.write_text(damaged)
    stats, reason = stats_and_reason_of_load(packed, caplog, level)
    assert stats["profile"] == ""
    assert why in reason
    assert str(profile) in reason


def test_a_profile_of_another_kernel_is_ignored_with_a_warning(packed, key, caplog):
    profile = keep(packed, {**key, "kernel": "5.10"}, chunk_bytes=MIB, queue_depth=2, workers=1)
    stats, reason = stats_and_reason_of_load(packed, caplog, logging.WARNING)
    assert stats["profile"] == ""
    assert f'the profile in {profile} is for kernel "5.10", and here it is "{key["kernel"]}"' in reason


def test_values_out_of_range_are_ignored_with_a_reason(packed, key, caplog):
    keep(packed, key, chunk_bytes=MIB, queue_depth=0, workers=1)
    stats, reason = stats_and_reason_of_load(packed, caplog, logging.WARNING)
    assert stats["profile"] == ""
    assert "out of range" in reason


def test_a_profile_is_looked_up_once_per_disk(packed, profile):
    assert stats_of_load(packed)["profile"]
    profile.unlink()
    assert stats_of_load(packed)["profile"]
    _engine.release_engines()
    assert not stats_of_load(packed)["profile"]


def test_a_profile_of_the_host_is_not_for_a_gpu(packed, profile):
    assert tuned_options(packed)[0]["queue_depth"] == 2
    assert tuned_options(packed, 0)[0] == {}


def test_where_no_engine_can_be_made_with_the_profile_loads_go_on_without_and_say_so_once(
    packed, profile, monkeypatch, caplog
):
    def limited(cuda_device, trace=None, **profile):
        if profile:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN), "start engine")
        return Engine(cuda_device, trace=trace)

    monkeypatch.setattr(_engine, "Engine", limited)
    assert stats_of_load(packed)["profile"] == ""
    assert stats_of_load(packed)["profile"] == ""
    (warning,) = caplog.records
    assert f"without the profile 1 MiB x 2, 1 workers of {profile}" in warning.getMessage()
    assert os.strerror(errno.EAGAIN) in warning.getMessage()


def test_a_profile_can_have_other_staging_memory(packed, key):
    profile = keep(packed, key, chunk_bytes=MIB, queue_depth=2, workers=1, staging_bytes=24 * MIB)
    assert tuned_options(packed)[0]["staging_bytes"] == 24 * MIB
    assert stats_of_load(packed)["profile"] == f"1 MiB x 2, 1 workers, 24 MiB of staging of {profile}"


def test_a_profile_may_say_that_nothing_was_better_than_the_defaults(packed, key, caplog):
    keep(packed, key, defaults=True)
    assert tuned_options(packed)[0] == {}
    stats, reason = stats_and_reason_of_load(packed, caplog, logging.INFO)
    assert stats["profile"] == ""
    assert "nothing was better" in reason


@pytest.mark.parametrize("backend", ["workers", "io_uring"])
def test_a_profile_may_have_the_workers_as_its_backend_and_no_other(packed, key, backend):
    profile = keep(packed, key, chunk_bytes=MIB, queue_depth=2, workers=3, backend=backend)
    stats = stats_of_load(packed)
    if backend == "workers":
        assert stats["backend"] == "workers"
        assert stats["profile"] == f"1 MiB x 2, 3 workers, reads by the workers of {profile}"
    else:
        assert stats["profile"] == ""


def test_an_engine_has_no_backend_that_a_system_may_refuse():
    with pytest.raises(FlashPackError, match="backend must be auto or workers, got io_uring"):
        Engine(backend="io_uring")
