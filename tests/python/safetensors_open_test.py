"""flashpack.safetensors.safe_open and load_file beside safetensors' own."""

from __future__ import annotations

import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import flashpack
import numpy as np
import pytest
import safetensors
import torch
from flashpack import _file
from flashpack.safetensors import CheckpointError, SafetensorError, load_file, load_model, safe_open, save_model
from safetensors.torch import load_file as their_load_file
from safetensors.torch import save_file
from support import assert_bit_equal, bits, random_tensor, run_python

THEIR_DTYPES = [
    dtype for dtype in safetensors.torch._SIZE if isinstance(dtype, torch.dtype) and "float4" not in str(dtype)
]
TENSORS = {
    "z.last": random_tensor((3, 5), torch.float16),
    "a.first": random_tensor((4, 6, 2), torch.float32),
    "scalar": torch.tensor(7.5),
    "empty": torch.empty((0, 5)),
    "odd": random_tensor((7,), torch.uint8),
}
INDICES: list[Any] = [
    ...,
    slice(None),
    (),
    0,
    -1,
    slice(1, 3),
    slice(None, None, 3),
    slice(2, 100),
    slice(-2, None),
    (slice(None), 4),
    (..., 1),
    (slice(1, 4), ..., slice(0, 1)),
    (2, slice(1, None, 2), -1),
    [],
    [0, 2],
    None,
    (None, slice(1, 3)),
    (None, 1, slice(1, 3), 1),
    torch.tensor([1, 1]),
    torch.tensor(1),
    torch.tensor([1]),
    torch.tensor([[1]]),
    np.array([1]),
    (slice(None), torch.tensor([1])),
    (torch.tensor([1]), torch.tensor([2])),
    (torch.tensor([1]), 0),
    (..., ...),
    (..., 0, ...),
    (1, ..., ...),
    torch.tensor([True, False, True, False]),
    slice(3, 3),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "a.safetensors", metadata={"framework": "pt", "note": "x"})
    return tmp_path / "a.safetensors"


@pytest.fixture(params=[None, "mmap", "pread"])
def backend(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_names_text_and_facts_are_those_that_safetensors_gives(path, backend):
    with safe_open(path, "pt", backend=backend) as ours, safetensors.safe_open(path, "pt") as theirs:
        assert ours.keys() == theirs.keys()
        assert sorted(ours.offset_keys()) == theirs.keys()
        assert ours.metadata() == theirs.metadata()
        offsets = [ours.get_tensor_meta(name).data_offsets for name in ours.offset_keys()]
        assert offsets == sorted(offsets)
        assert offsets[0][0] == 0
        assert path.stat().st_size - offsets[-1][1] == 8 + int.from_bytes(path.read_bytes()[:8], "little")
        for name in theirs.keys():  # noqa: SIM118
            assert ours.get_slice(name).get_shape() == theirs.get_slice(name).get_shape()
            assert ours.get_slice(name).get_dtype() == theirs.get_slice(name).get_dtype()
            meta = ours.get_tensor_meta(name)
            assert (meta.dtype, meta.shape) == (ours.get_slice(name).get_dtype(), ours.get_slice(name).get_shape())


def test_facts_are_those_that_the_file_had_when_it_was_opened(path, backend):
    with safe_open(path, "pt", backend=backend) as file:
        names = file.keys()
        before = [file.get_tensor_meta(name) for name in names]
        os.truncate(path, 4)
        assert [file.get_tensor_meta(name) for name in names] == before


def test_a_file_without_text_has_no_metadata(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    assert safe_open(tmp_path / "a.safetensors", "pt").metadata() is None


def test_every_tensor_has_the_bits_that_safetensors_reads(path, backend):
    expected = their_load_file(path)
    with safe_open(path, "pt", backend=backend) as file:
        assert_bit_equal({name: file.get_tensor(name) for name in file.keys()}, expected)  # noqa: SIM118
        assert_bit_equal(file.get_tensors(), expected)
    assert_bit_equal(load_file(path, backend=backend), expected)
    assert list(load_file(path, backend=backend)) == safe_open(path, "pt").offset_keys()


@pytest.mark.parametrize("dtype", THEIR_DTYPES, ids=str)
def test_every_dtype_has_the_name_that_safetensors_has_for_it(tmp_path, dtype, backend):
    tensor = random_tensor((3, 4), dtype)
    save_file({"a": tensor}, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt", backend=backend) as ours:
        theirs = safetensors.safe_open(tmp_path / "a.safetensors", "pt")
        assert ours.get_slice("a").get_dtype() == theirs.get_slice("a").get_dtype()
        assert ours.get_tensor("a").dtype is dtype
        assert bits(ours.get_tensor("a")) == bits(tensor)
        assert bits(ours.get_slice("a")[1:, 2]) == bits(tensor[1:, 2])


@pytest.mark.skipif(
    getattr(torch, "float4_e2m1fn_x2", 0) not in safetensors.torch._SIZE, reason="no packed 4-bit floats here"
)
def test_a_packed_tensor_has_the_shape_of_its_header_and_half_of_it_in_torch(tmp_path, backend):
    tensor = torch.arange(8, dtype=torch.uint8).view(2, 4).view(torch.float4_e2m1fn_x2)
    save_file({"a": tensor}, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt", backend=backend) as file:
        assert file.get_slice("a").get_shape() == [2, 8]
        assert file.get_tensor_meta("a") == ("F4", [2, 8], (0, 8))
        assert file.get_tensor("a").shape == (2, 4)
        assert bits(file.get_slice("a")[1:].view(torch.uint8)) == bytes([4, 5, 6, 7])


@pytest.mark.parametrize("index", INDICES, ids=repr)
def test_a_slice_gives_what_torch_gives(path, backend, index):
    expected = TENSORS["a.first"][index]
    with safe_open(path, "pt", backend=backend) as file:
        part = file.get_slice("a.first")[index]
    assert part.shape == expected.shape
    assert bits(part) == bits(expected)


@pytest.mark.parametrize("index", [4, (0, 0, 0, 0), (0, -7)], ids=repr)
def test_an_index_outside_of_the_tensor_is_an_index_error(path, backend, index):
    with safe_open(path, "pt", backend=backend) as file, pytest.raises(IndexError):
        file.get_slice("a.first")[index]


def test_tensors_have_memory_of_their_own_unless_the_file_is_to_be_mapped(path):
    size = path.stat().st_size
    owned, mapped = load_file(path), load_file(path, backend="mmap")
    with path.open("r+b") as file:
        file.write(bytes(size))
    assert bits(owned["odd"]) == bits(TENSORS["odd"])
    assert bits(mapped["odd"]) == bytes(7)
    mapped["odd"].fill_(1)
    assert path.read_bytes() == bytes(size)


def test_slices_outlive_the_block_but_the_file_does_not(path, backend):
    with safe_open(path, "pt", backend=backend) as file:
        part = file.get_slice("odd")
    assert bits(part[2:5]) == bits(TENSORS["odd"][2:5])
    for call in (file.keys, file.offset_keys, file.metadata, file.get_tensors, file.prefetch):
        with pytest.raises(SafetensorError, match="closed"):
            call()
    with pytest.raises(SafetensorError, match="closed"):
        file.get_tensor("odd")


def test_no_descriptor_is_left_open(path, backend):
    before = len(os.listdir("/proc/self/fd"))
    with safe_open(path, "pt", backend=backend) as file:
        part = file.get_slice("odd")
        assert len(part[...]) == 7
    del part
    assert len(os.listdir("/proc/self/fd")) == before


def test_threads_may_share_a_file(path, backend):
    expected = their_load_file(path)
    with safe_open(path, "pt", backend=backend) as file, ThreadPoolExecutor(4) as pool:
        slices = {name: file.get_slice(name) for name in file.keys() * 20}
        for name, part in zip(slices, pool.map(lambda each: each[...], slices.values()), strict=True):
            assert bits(part) == bits(expected[name])


def test_a_name_that_the_file_lacks_is_an_error_of_both_libraries(path):
    with safe_open(path, "pt") as file:
        for call in (file.get_tensor, file.get_slice, file.get_tensor_meta):
            for kind in (SafetensorError, flashpack.FlashPackError):
                with pytest.raises(kind, match=r"a\.safetensors does not contain tensor nope"):
                    call("nope")


@pytest.mark.parametrize(
    "content", [b"", bytes(20), b"\x05\0\0\0\0\0\0\0{}   " * 3, b"version https://git-lfs.github.com/spec/v1"]
)
def test_a_file_that_is_no_checkpoint_is_an_error_of_both_libraries(tmp_path, content):
    (tmp_path / "bad").write_bytes(content)
    for kind in (SafetensorError, flashpack.FlashPackError, CheckpointError):
        with pytest.raises(kind, match="bad"):
            safe_open(tmp_path / "bad", "pt")
        with pytest.raises(kind, match="bad"):
            load_file(tmp_path / "bad")


def test_a_file_that_is_not_there_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        safe_open(tmp_path / "none", "pt")
    assert caught.value.filename == str(tmp_path / "none")


def test_a_backend_that_does_not_exist_is_refused(path):
    with pytest.raises(SafetensorError, match="backend"):
        safe_open(path, "pt", backend="nonsense")  # type: ignore[arg-type]


def test_flashpack_files_are_read_under_the_same_names(pack, backend):
    tensors = {"a": torch.randn(4, 3), "b": random_tensor((5,), torch.complex128)}
    path = pack(tensors, metadata={"note": "x"})
    with safe_open(path, "pt", backend=backend) as file:
        assert_bit_equal(file.get_tensors(), tensors)
        assert file.metadata() == {"note": "x"}
        assert file.get_tensor_meta("a").dtype == "F32"
        assert file.get_slice("b").get_dtype() == "C128"


def test_another_framework_gets_what_safetensors_makes(path):
    with safe_open(path, framework="np") as file:
        assert isinstance(file, safetensors.safe_open)
        assert isinstance(file.get_tensor("odd"), np.ndarray)


@pytest.mark.parametrize("device", ["mps", "npu:0", "nonsense"])
def test_other_devices_are_left_to_safetensors(path, device, monkeypatch):
    asked = []
    monkeypatch.setattr(
        flashpack.safetensors.torch, "_original_open", lambda *args, **options: asked.append((args, options))
    )
    monkeypatch.setattr(
        flashpack.safetensors.torch, "_original_load", lambda *args, **options: asked.append((args, options))
    )
    safe_open(path, "pt", device, backend="pread")
    load_file(path, device)
    assert asked == [((path, "pt", device), {"backend": "pread"}), ((path, device), {})]


def test_every_other_name_is_that_of_safetensors():
    import flashpack.safetensors.torch

    for ours in (flashpack.safetensors, flashpack.safetensors.torch):
        for name in ("save", "load", "storage_ptr", "_remove_duplicate_names"):
            assert getattr(ours, name) is getattr(safetensors.torch, name)
        for name in ("SafetensorError", "deserialize", "serialize", "serialize_file"):
            assert getattr(ours, name) is getattr(safetensors, name)
        with pytest.raises(AttributeError, match=f"module '{ours.__name__}' has no attribute 'nonsense'"):
            _ = ours.nonsense


IMPORTS = ["import flashpack.safetensors as safetensors", "from flashpack import safetensors"]


@pytest.mark.parametrize("imports", IMPORTS)
def test_a_program_that_uses_safetensors_torch_changes_its_import_alone(tmp_path, imports):
    code = f"""
{imports}
import torch
safetensors.torch.save_file({{"a": torch.arange(3)}}, {str(tmp_path / "a.flashpack")!r})
print(safetensors.torch.load_file({str(tmp_path / "a.flashpack")!r})["a"].tolist())
linear = torch.nn.Linear(2, 2)
safetensors.torch.save_model(linear, {str(tmp_path / "b.flashpack")!r})
print(safetensors.torch.load_model(linear, {str(tmp_path / "b.flashpack")!r}))
from flashpack.safetensors.torch import load_file
assert load_file is safetensors.load_file is safetensors.torch.load_file
"""
    assert run_python(code) == "[0, 1, 2]\n(set(), [])\n"


def test_modules_for_other_frameworks_are_those_of_safetensors(path):
    import flashpack.safetensors.numpy
    import safetensors.numpy

    assert Path(flashpack.safetensors.numpy.__file__) == Path(safetensors.numpy.__file__)
    assert isinstance(flashpack.safetensors.numpy.load_file(path)["odd"], np.ndarray)


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(3, 3)
        self.b = self.a
        self.c = torch.nn.Linear(3, 2)


def test_load_model_fills_a_model_with_tied_weights_as_safetensors_does(tmp_path, backend):
    torch.manual_seed(0)
    model, again = Tied(), Tied()
    save_model(model, str(tmp_path / "a.safetensors"))
    missing, unexpected = load_model(again, tmp_path / "a.safetensors", backend=backend)
    assert not missing
    assert not unexpected
    assert_bit_equal(again.state_dict(), model.state_dict())


def test_load_model_takes_tied_weights_from_a_directory_or_an_index_of_flashpack_files(tmp_path, backend):
    model = Tied()
    for name in ("one", "shards"):
        (tmp_path / name).mkdir()
    save_model(model, str(tmp_path / "one" / "model.flashpack"))
    state = model.state_dict()
    files = {name: f"{number:02}.flashpack" for number, name in enumerate(state)}
    for name, file in files.items():
        flashpack.pack_to_file({name: state[name]}, tmp_path / "shards" / file)
    index = tmp_path / "shards" / "model.flashpack.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    for source in (tmp_path / "one", tmp_path / "shards", index):
        again = Tied()
        missing, unexpected = load_model(again, source, backend=backend)
        assert not missing
        assert not unexpected
        assert_bit_equal(again.state_dict(), state)


def test_load_model_names_what_is_missing_and_unexpected(tmp_path):
    tensors = {"a.weight": torch.ones(3, 3), "a.bias": torch.ones(3), "c.weight": torch.ones(2, 3), "d": torch.ones(1)}
    save_file(tensors, tmp_path / "a.safetensors")
    missing, unexpected = load_model(Tied(), tmp_path / "a.safetensors", strict=False)
    assert list(missing) == ["c.bias"]
    assert list(unexpected) == ["d"]
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "d"'):
        load_model(Tied(), tmp_path / "a.safetensors")


def test_a_handle_refuses_to_be_pickled(path):
    with safe_open(path, "pt") as file, pytest.raises(TypeError, match="cannot pickle"):
        pickle.dumps(file)


def test_an_error_within_a_read_is_not_taken_for_an_index_that_torch_has_to_apply(path, monkeypatch):
    def fail(*_: object) -> None:
        raise TypeError("a mistake within")

    with safe_open(path, "pt") as file:
        part = file.get_slice("a.first")
        monkeypatch.setattr(_file.TensorSlice, "_read", fail)
        with pytest.raises(TypeError, match="a mistake within"):
            part[1:]


def test_several_files_are_read_as_one(tmp_path, backend):
    parts = {"1": {"a": random_tensor((4, 3)), "c": random_tensor((2,))}, "2": {"b": random_tensor((5,), torch.int8)}}
    paths = [tmp_path / f"{name}.safetensors" for name in parts]
    for path, tensors in zip(paths, parts.values(), strict=True):
        save_file(tensors, path)
    index = tmp_path / "model.safetensors.index.json"
    files = {name: path.name for path, tensors in zip(paths, parts.values(), strict=True) for name in tensors}
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    expected = parts["1"] | parts["2"]
    for source in (paths, index, tmp_path):
        with safe_open(source, "pt", backend=backend) as file:
            assert file.keys() == ["a", "b", "c"]
            assert file.offset_keys() == ["a", "c", "b"]
            assert file.get_tensor_meta("b").data_offsets == (0, 5)
            assert_bit_equal(file.get_tensors(), expected)
            assert bits(file.get_slice("b")[1:3]) == bits(expected["b"][1:3])
            assert_bit_equal(dict(file.prefetch()), expected)
        assert_bit_equal(load_file(source, backend=backend), expected)


def test_what_is_mapped_cannot_be_verified(path):
    with pytest.raises(SafetensorError, match=r'backend="mmap".*verify="always"'):
        safe_open(path, backend="mmap", verify="always")
