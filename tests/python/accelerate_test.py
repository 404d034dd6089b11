"""flashpack.accelerate(): what it puts in place of what, and what is left to safetensors."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import struct
import subprocess
import sys
import types
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import flashpack
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from flashpack import _accelerate
from flashpack.safetensors import safe_open
from safetensors.torch import save_file
from support import assert_bit_equal, random_tensor, run_python

ORIGINAL = safetensors.safe_open
TENSORS = {"a": random_tensor((4, 3)), "b": random_tensor((5,), torch.bfloat16)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module that took safe_open from safetensors when it was imported, under a name of its own."""
    made = types.ModuleType("an_importer")
    made.its_open = ORIGINAL  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "an_importer", made)
    return made


def test_every_binding_is_replaced_and_restored_to_the_same_object(module):
    with flashpack.accelerate() as acceleration:
        for owner, name in ((safetensors, "safe_open"), (safetensors.torch, "safe_open"), (module, "its_open")):
            assert getattr(owner, name) is _accelerate.safe_open
        assert {"safetensors.safe_open", "safetensors.torch.safe_open", "an_importer.its_open"} <= set(
            acceleration.patched()
        )
        assert "an_importer.its_open" in repr(acceleration)
        module.later = safetensors.safe_open
    for owner, name in ((safetensors, "safe_open"), (safetensors.torch, "safe_open"), (module, "its_open")):
        assert getattr(owner, name) is ORIGINAL
    assert module.later is ORIGINAL
    assert acceleration.patched() == []
    assert "undone" in repr(acceleration)


def test_handles_are_instances_of_what_opened_them(path):
    theirs = ORIGINAL(path, "pt")
    with flashpack.accelerate():
        for handle in (safetensors.safe_open(path, "pt"), safetensors.safe_open(path, "numpy"), theirs):
            assert isinstance(handle, safetensors.safe_open)
        assert not isinstance(path, safetensors.safe_open)


def test_the_original_comes_back_when_the_last_of_several_is_undone():
    outer = flashpack.accelerate()
    with flashpack.accelerate():
        pass
    assert safetensors.safe_open is _accelerate.safe_open
    outer.undo()
    outer.undo()
    assert safetensors.safe_open is ORIGINAL


def test_an_error_in_the_block_undoes_it():
    with pytest.raises(KeyError), flashpack.accelerate():
        raise KeyError
    assert safetensors.safe_open is ORIGINAL


def test_safetensors_loads_through_this_package(path):
    with flashpack.accelerate():
        assert isinstance(safetensors.safe_open(path, framework="pt"), safe_open)
        assert isinstance(safetensors.safe_open(filename=path, framework="torch", device="cpu"), safe_open)
        assert_bit_equal(safetensors.torch.load_file(path), TENSORS)
        model = torch.nn.Module()
        for name, tensor in TENSORS.items():
            model.register_buffer(name, torch.zeros_like(tensor))
        safetensors.torch.load_model(model, path)
    assert_bit_equal(model.state_dict(), TENSORS)


def test_on_the_cpu_tensors_are_mapped_as_by_safetensors_unless_pread_is_asked_for(path):
    with flashpack.accelerate():
        mapped = safetensors.safe_open(path, "pt").get_tensors()
        owned = safetensors.safe_open(path, "pt", backend="pread").get_tensors()
    path.write_bytes(bytes(path.stat().st_size))
    assert not mapped["a"].any()
    assert torch.equal(owned["a"], TENSORS["a"])


@pytest.mark.skipif(torch.__version__ < "2.15", reason="this torch.load does not know safetensors")
def test_torch_load_goes_through_this_package(path, monkeypatch):
    opened = note_opened(monkeypatch)
    with flashpack.accelerate():
        assert_bit_equal(torch.load(path), TENSORS)
    assert opened == [str(path)]


def test_other_frameworks_and_devices_are_left_to_safetensors(path):
    with flashpack.accelerate():
        assert isinstance(safetensors.safe_open(path, framework="np").get_tensor("a"), np.ndarray)
        assert np.array_equal(safetensors.numpy.load_file(numpy_file(path))["a"], [1])
        with pytest.raises(safetensors.SafetensorError, match="device nonsense is invalid"):
            safetensors.safe_open(path, framework="pt", device="nonsense")


def numpy_file(beside: Path) -> Path:
    safetensors.numpy.save_file({"a": np.array([1])}, beside.with_name("n.safetensors"))
    return beside.with_name("n.safetensors")


@pytest.mark.parametrize("device", ["meta", "mps", "nonsense"])
def test_devices_are_left_to_safetensors_also_when_it_is_in_force_before_the_first_file_is_opened(path, device):
    code = f"""
import flashpack, safetensors
def result():
    try:
        with safetensors.safe_open({str(path)!r}, "pt", {device!r}) as file:
            return str(type(file))
    except Exception as error:
        return repr(error)
expected = result()
flashpack.accelerate()
print(result() == expected)
"""
    assert run_python(code) == "True\n"


def test_a_file_that_only_safetensors_can_read_is_left_to_it(tmp_path):
    header = json.dumps(
        {
            "six": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]},
            "u": {"dtype": "U8", "shape": [1], "data_offsets": [3, 4]},
        }
    ).encode()
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(header)) + header + bytes([0, 0, 0, 9]))
    try:
        ORIGINAL(tmp_path / "a", "pt")
    except safetensors.SafetensorError:
        pytest.skip("this safetensors does not know 6-bit floats")
    with flashpack.accelerate():
        assert safetensors.safe_open(tmp_path / "a", "pt").get_tensor("u").tolist() == [9]


@pytest.mark.parametrize("content", [None, b"", b"\x05\0\0\0\0\0\0\0{}   x", bytes(64)])
def test_errors_of_files_are_those_of_safetensors(tmp_path, content):
    if content is not None:
        (tmp_path / "a").write_bytes(content)
    with pytest.raises(Exception) as theirs:
        ORIGINAL(tmp_path / "a", "pt")
    with flashpack.accelerate(), pytest.raises(type(theirs.value)) as ours:
        safetensors.safe_open(tmp_path / "a", "pt")
    assert str(ours.value) == str(theirs.value)


def note_opened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    opened = []
    original = flashpack.safetensors.torch.open_file
    monkeypatch.setattr(
        flashpack.safetensors.torch, "open_file", lambda path, *a, **k: opened.append(path) or original(path, *a, **k)
    )
    return opened


def test_a_fifo_is_not_left_to_safetensors_which_would_wait_for_its_writer(tmp_path):
    fifo = tmp_path / "a.safetensors"
    os.mkfifo(fifo)
    both_ends = os.open(fifo, os.O_RDWR)  # Otherwise this test would wait, too, where the original is called.
    try:
        with flashpack.accelerate(), pytest.raises(flashpack.FlashPackError, match="not a regular file"):
            safetensors.torch.load_file(fifo)
    finally:
        os.close(both_ends)


@pytest.mark.parametrize(("value", "replaced"), [("1", True), ("0", False), ("", False)])
def test_the_environment_decides_when_flashpack_is_imported(value, replaced):
    code = f"import sys; sys.path[:] = {sys.path!r}; import safetensors, flashpack; print(safetensors.safe_open)"
    environment = os.environ | {"FLASHPACK_ACCELERATE": value}
    command = [sys.executable, "-S", "-c", code]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    assert ("flashpack" in printed) is replaced


FEW_DESCRIPTORS = """
import os, resource, sys
import flashpack, safetensors, torch
path, spare = sys.argv[1], int(sys.argv[2])
with flashpack.accelerate():
    safetensors.safe_open(path, "pt").get_tensor("a")
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    held = []
    try:
        while True:
            held.append(os.dup(0))
    except OSError:
        for descriptor in held[:spare]:
            os.close(descriptor)
    try:
        safetensors.safe_open(path, "pt").get_tensor("a")
    except OSError as error:
        print(error.errno, error.filename)
"""


@pytest.mark.parametrize("spare", [0, 1], ids=["to open the file", "to map it"])
def test_a_lack_of_descriptors_is_told_as_such_and_names_the_file(path, spare):
    assert run_python(FEW_DESCRIPTORS, path, spare) == f"{errno.EMFILE} {path}\n"


def test_an_installed_package_is_in_force_when_python_starts_and_brings_in_no_torch():
    site = distribution("flashpack").locate_file("")
    assert (Path(str(site)) / "flashpack_accelerate.pth").is_file()
    code = f"""
import os, sys
os.environ["FLASHPACK_ACCELERATE"] = "1"
sys.path[:] = {sys.path!r}
import site
site.addsitedir({str(site)!r})
import safetensors
print(safetensors.safe_open.__module__, "torch" in sys.modules)
"""
    assert run_python(code) == "flashpack._accelerate False\n"


def test_modules_that_wait_for_their_first_use_are_not_loaded(tmp_path, monkeypatch):
    file = tmp_path / "broken_at_first_use.py"
    file.write_text("raise ImportError('it was loaded')")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    spec.loader = importlib.util.LazyLoader(spec.loader)
    lazy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lazy)
    nameless = types.ModuleType("nameless")
    del nameless.__name__
    monkeypatch.setitem(sys.modules, file.stem, lazy)
    monkeypatch.setitem(sys.modules, "nameless", nameless)
    with flashpack.accelerate() as acceleration:
        assert "safetensors.safe_open" in acceleration.patched()


def test_modules_of_transformers_that_are_imported_after_the_first_file_was_opened_are_wrapped_too(path, monkeypatch):
    def stand_in(name: str, **functions: Any) -> types.SimpleNamespace:
        module = types.SimpleNamespace(__name__=name, **functions)
        monkeypatch.setitem(sys.modules, f"transformers.{name}", module)
        return module

    class DtensorShardOperation:
        def shard_tensor(self, source: Any, device: Any) -> Any:
            return source

    def copy(tensor: Any, device: Any = None, *, dtype: Any = None) -> Any:
        return tensor

    monkeypatch.setattr(_accelerate, "_on_device", lambda tensor, device: (tensor, device))
    monkeypatch.delitem(sys.modules, "transformers.distributed.sharding_utils", raising=False)
    loading = stand_in("core_model_loading", _materialize_copy=copy)
    with flashpack.accelerate() as acceleration:
        safetensors.safe_open(path, "pt")
        assert loading._materialize_copy(1, device=2) == (1, 2)
        assert loading._materialize_copy(1, 2, dtype=3) == (1, 2)
        assert loading._materialize_copy(tensor=1) == (1, None)
        with pytest.raises(TypeError, match="tensor"):
            loading._materialize_copy(device=2)
        stand_in("distributed.sharding_utils", DtensorShardOperation=DtensorShardOperation)
        safetensors.safe_open(path, "pt")
        assert DtensorShardOperation().shard_tensor(1, 2) == (1, 2)
        assert loading._materialize_copy(1, device=2) == (1, 2)
        assert "core_model_loading._materialize_copy" in acceleration.patched()
    assert loading._materialize_copy is copy
    assert DtensorShardOperation().shard_tensor(1, 2) == 1
