"""What happens to a file, and to its path, between the reading of its footer and that of its payload."""

from __future__ import annotations

import contextlib
import errno
import os
import warnings

import flashpack
import pytest
import torch
from flashpack._checkpoint import open_checkpoint
from flashpack.deserialization import read_flashpack_file


def assigned(path, **options):
    model = torch.nn.Module()
    model.a = torch.nn.Parameter(torch.full((1000,), 7.0))
    flashpack.assign_from_file(model, path, **options)
    return {"a": model.a.detach()}


READERS = {
    "load_file": flashpack.load_file,
    "load_file, mapped": lambda path: flashpack.load_file(path, mmap=True),
    "revert_from_file": flashpack.revert_from_file,
    "read_flashpack_file": lambda path: {"a": read_flashpack_file(path)[0].block(0)[:1000]},
    "read_flashpack_file, mapped": lambda path: {"a": read_flashpack_file(path, mmap=True)[0].block(0)[:1000]},
    "assign_from_file": assigned,
    "assign_from_file, mapped": lambda path: assigned(path, mmap=True),
    "assign_from_file, as blocks": lambda path: assigned(path, keep_flash_ref_on_model=True),
    "open_file": lambda path: {"a": flashpack.open_file(path).get("a")},
    "open_file, a slice": lambda path: {"a": flashpack.open_file(path).get_slice("a")[:]},
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_a_file_replaced_between_footer_and_payload_is_read_to_its_end(reader, pack, after_the_footer):
    path, other = pack({"a": torch.ones(1000)}), pack({"a": torch.zeros(1000)})
    after_the_footer(lambda: os.replace(other, path))
    assert torch.equal(reader(path)["a"], torch.ones(1000))


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_a_file_changed_between_footer_and_payload_is_an_error(reader, pack, after_the_footer):
    path = pack({"a": torch.ones(1000)})
    after_the_footer(lambda: os.truncate(path, path.stat().st_size + 1))
    with pytest.raises(OSError, match="changed") as caught:
        reader(path)
    assert caught.value.errno == errno.ESTALE
    assert caught.value.filename == str(path)


def test_a_file_replaced_while_it_is_verified_is_verified_to_its_end(pack, after_the_footer):
    path, other = pack({"a": torch.ones(1000)}), pack({"b": torch.zeros(10)})
    after_the_footer(lambda: os.replace(other, path))
    assert flashpack.verify_file(path)["verified_bytes"] == 4000


def descriptors_of(path):
    """Those of this process that are open files at `path`."""
    descriptors = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
    return [int(os.path.basename(fd)) for fd in descriptors if os.path.realpath(fd) == str(path)]


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_no_descriptor_is_left_open_whether_the_load_succeeds_or_not(reader, pack):
    path, corrupt = pack({"a": torch.ones(1000)}), pack({"a": torch.ones(1000)})
    corrupt.write_bytes(b"x" + corrupt.read_bytes()[1:])
    reader(path)
    with contextlib.suppress(flashpack.FlashPackError):
        reader(corrupt)
    assert descriptors_of(path) == descriptors_of(corrupt) == []


def test_an_open_file_is_read_wherever_its_path_leads_by_now(pack, tmp_path, monkeypatch):
    path, other = pack({"a": torch.ones(1000)}), pack({"a": torch.zeros(1000)})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(path.parent)
    with flashpack.open_file(path.name) as file:
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert torch.equal(file.get("a"), torch.ones(1000))
        os.replace(other, path)
        assert torch.equal(file.get_slice("a")[3:7], torch.ones(4))
        path.unlink()
        assert torch.equal(file["a"], torch.ones(1000))


def test_an_open_file_can_be_closed_and_then_not_be_read(pack):
    file = flashpack.open_file(pack({"a": torch.ones(1000)}))
    part = file.get_slice("a")
    file.close()
    file.close()
    assert list(file) == ["a"]
    for read in (lambda: file.get("a"), lambda: part[:2]):
        with pytest.raises(ValueError, match="closed"):
            read()


def test_an_open_file_that_is_dropped_closes_itself_without_a_warning(pack):
    path = pack({"a": torch.ones(1000)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        file = flashpack.open_file(path)
        assert len(descriptors_of(path)) == 1
        del file
    assert descriptors_of(path) == []


def test_a_change_is_seen_whatever_the_system_remembers_of_the_file(pack, monkeypatch):
    path = pack({"a": torch.ones(1000)})
    with open_checkpoint(path) as checkpoint:
        (file,) = checkpoint.files()
        remembered = os.fstat(file.fd)
        # On a network file system, fstat may answer so for minutes.
        monkeypatch.setattr(os, "fstat", lambda fd: remembered)
        assert file.is_unchanged()
        os.utime(path, ns=(0, 0))
        assert not file.is_unchanged()
    with pytest.raises(OSError, match="Bad file descriptor") as raised:
        file.is_unchanged()
    assert raised.value.filename == str(path)


def test_a_program_that_is_started_inherits_no_descriptor(pack):
    path = pack({"a": torch.ones(1000)})
    with flashpack.open_file(path):
        assert [os.get_inheritable(fd) for fd in descriptors_of(path)] == [False]


def test_a_prefetch_reads_the_file_whose_footer_it_knows(pack, after_the_footer):
    path, other = pack({"a": torch.ones(1000)}), pack({"b": torch.zeros(10)})
    after_the_footer(lambda: os.replace(other, path))
    prefetch = flashpack.prefetch_flashpack_file(path)
    prefetch.wait()
    assert prefetch.progress() == (4000, 4000)
