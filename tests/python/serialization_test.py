from __future__ import annotations

import collections
import json
import os
import stat
import tempfile

import flashpack
import pytest
import torch
from flashpack import _native, serialization
from flashpack._device import CPU
from support import assert_bit_equal, bits, footer_bytes, random_tensor, unprivileged


class Wrapper(torch.Tensor):
    """A tensor whose bytes are elsewhere, as DTensor's and those of quantised weights are."""

    @staticmethod
    def __new__(cls, shape):
        return torch.Tensor._make_wrapper_subclass(cls, shape)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError


@pytest.fixture
def old_file(tmp_path):
    path = tmp_path / "model.flashpack"
    path.write_bytes(b"what was here before")
    yield path
    assert path.read_bytes() == b"what was here before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.flashpack"]


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        ({}, {}, "No tensors to pack"),
        ({"a": torch.ones(1)}, {"name_order": ["b"]}, "No tensors to pack"),
        ({"a": torch.ones(1)}, {"align_bytes": -1}, "align_bytes must be >= 0"),
        ({"a": torch.ones(1)}, {"target_dtype": "float33"}, "dtype='float33' is neither a torch.dtype nor the name"),
        ({"a": torch.ones(1)}, {"target_dtype": "float32"}, "packing: 'float32': pass torch.float32"),
        ({"a": torch.ones(1)}, {"target_dtype": torch.qint8}, "Unsupported dtype"),
        ({"a": torch.ones(1), "b": torch.ones(1)}, {"name_order": ["a", "b", "a"]}, "a"),
        ({"fine": torch.ones(1), "q": torch.empty(2, dtype=torch.bits8)}, {}, "'q'"),
        ({"fine": torch.ones(1), "s": torch.eye(3).to_sparse()}, {}, "'s'.*sparse"),
        ({"fine": torch.ones(1), "m": torch.empty(2, device="meta")}, {}, "'m'.*meta"),
        ({"fine": torch.ones(1), "x._extra_state": {"a": 1}}, {}, "'x._extra_state'.*dict"),
        ({"fine": torch.ones(1), "none": None}, {}, "'none'"),
        ({"fine": torch.ones(1), "w": Wrapper((2,))}, {}, "'w'.*Wrapper"),
        ({"fine": torch.ones(1), 7: torch.ones(1)}, {}, "7"),
        ({"\udc80": torch.ones(1)}, {}, "UTF-8"),
    ],
)
def test_what_cannot_be_packed_is_named_before_the_old_file_is_touched(tensors, options, message, old_file):
    with pytest.raises(flashpack.FlashPackError, match=message):
        flashpack.pack_to_file(tensors, old_file, **options)


@pytest.mark.parametrize("kind", [list, tuple, iter, lambda names: dict.fromkeys(names).keys(), set], ids=range(5))
def test_an_order_of_names_may_be_anything_that_gives_names(kind, pack):
    names = ["c", "a"]
    path = pack({name: torch.ones(1) for name in "abcd"}, name_order=kind(names))
    packed = list(flashpack.revert_from_file(path))
    assert packed == names if kind is not set else sorted(packed) == sorted(names)


def test_tensors_that_name_order_leaves_out_need_not_be_packable(pack):
    path = pack({"a": torch.ones(1), "m": torch.empty(2, device="meta")}, name_order=["a"])
    assert list(flashpack.revert_from_file(path)) == ["a"]


def test_an_interrupt_while_writing_leaves_the_old_file_and_no_other(old_file, monkeypatch):
    groups_of = serialization._groups

    def interrupted(*args):
        yield next(iter(groups_of(*args)))
        raise KeyboardInterrupt

    monkeypatch.setattr(serialization, "_groups", interrupted)
    with pytest.raises(KeyboardInterrupt):
        flashpack.pack_to_file({"a": torch.ones(1 << 20)}, old_file)


def test_a_directory_that_may_not_be_written_is_a_permission_error_with_its_path():
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o555)
        with unprivileged(), pytest.raises(PermissionError) as caught:
            flashpack.pack_to_file({"a": torch.ones(1)}, f"{directory}/a.flashpack")
        assert caught.value.filename == f"{directory}/a.flashpack"
        assert os.listdir(directory) == []


def test_a_directory_as_destination_is_an_os_error_with_its_path(tmp_path):
    directory = tmp_path / "taken"
    directory.mkdir()
    with pytest.raises(OSError, match="taken"):
        flashpack.pack_to_file({"a": torch.ones(1)}, directory)
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]
    assert list(directory.iterdir()) == []


def test_a_file_where_a_directory_should_be_is_an_os_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        flashpack.pack_to_file({"a": torch.ones(1)}, tmp_path / "file" / "a.flashpack")


def test_missing_directories_are_made(tmp_path):
    path = tmp_path / "x" / "y" / "a.flashpack"
    flashpack.pack_to_file({"a": torch.ones(1)}, path)
    assert flashpack.is_flashpack_file(path)


def test_a_bare_file_name_is_written_to_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flashpack.pack_to_file({"a": torch.ones(1)}, "a.flashpack")
    assert flashpack.is_flashpack_file(tmp_path / "a.flashpack")


def test_a_new_file_can_be_read_by_whom_the_umask_allows(tmp_path):
    path = tmp_path / "a.flashpack"
    before = os.umask(0o027)
    try:
        flashpack.pack_to_file({"a": torch.ones(1)}, path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.fixture
def small_buffers(monkeypatch):
    monkeypatch.setattr(serialization, "_BUFFER_BYTES", 8 * 4096)
    return 8 * 4096


def test_what_is_converted_in_parts_comes_back_whole(pack, small_buffers):
    source = {str(seed): random_tensor((7, 50 * seed), seed=seed) for seed in range(1, 40)}
    source["long"] = random_tensor((5 * small_buffers + 3,), torch.bfloat16)
    source["one_long_row"] = random_tensor((1, 3, small_buffers))[:, ::2]
    source["long_rows"] = random_tensor((small_buffers, 3)).t()
    source["conjugated"] = random_tensor((small_buffers,), torch.complex64).nan_to_num().conj()
    source["scalar"] = torch.tensor(3.5)
    views = {name: tensor.t() if tensor.dim() == 2 else tensor for name, tensor in source.items()}
    views["expanded"] = torch.arange(7.0).expand(small_buffers, 7)
    for dtype in None, torch.float64, torch.float16:
        kept = {name: tensor for name, tensor in views.items() if dtype is None or not tensor.is_complex()}
        expected = {n: tensor.to(dtype or tensor.dtype).resolve_conj().contiguous() for n, tensor in kept.items()}
        assert_bit_equal(flashpack.revert_from_file(pack(kept, target_dtype=dtype)), expected)


def test_a_buffer_is_not_filled_again_while_it_may_be_under_way(small_buffers):
    tensors = {str(i): torch.full((3000,), float(i)) for i in range(12)}
    places = [(name, 6000 * i, 6000) for i, name in enumerate(tensors)]
    groups = serialization._groups(tensors, dict.fromkeys(tensors, torch.float16), places, CPU)
    alive = collections.deque(maxlen=_native.PACK_GROUPS - 1)
    for group in groups:
        alive.append((group, [bits(source) for source in group.sources]))
        assert all([bits(source) for source in group.sources] == before for group, before in alive)
        assert sum(size for _, size, _ in group.extents) <= small_buffers


def test_a_file_has_checksums_unless_told_otherwise(pack):
    tensors = {"a": random_tensor((5, 7))}
    with_them, without = pack(tensors), pack(tensors, checksum=False)
    assert "crc32c_per_mib" in json.loads(footer_bytes(with_them))
    assert "crc32c_per_mib" not in json.loads(footer_bytes(without))
    assert_bit_equal(flashpack.revert_from_file(with_them), flashpack.revert_from_file(without))


def test_a_module_is_packed_by_its_state_dict(pack):
    model = torch.nn.BatchNorm1d(3)
    model.register_buffer("scratch", torch.ones(1), persistent=False)
    assert_bit_equal(flashpack.revert_from_file(pack(model)), model.state_dict())


def test_progress_is_shown_where_standard_error_is_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    flashpack.pack_to_file({"a": torch.ones(1000)}, tmp_path / "a", silent=False)
    assert "4.00k/4.00k" in capsys.readouterr().err


def test_nothing_is_printed_where_it_is_not(tmp_path, capsys):
    flashpack.pack_to_file({"a": torch.ones(1000)}, tmp_path / "a", silent=False)
    flashpack.revert_from_file(tmp_path / "a", silent=False)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "within",
    [
        lambda pack: pack(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])),
        lambda pack: pack(torch.nn.UninitializedParameter()),
        lambda pack: pack(torch._efficientzerotensor((3,))),
        lambda pack: torch.vmap(pack)(torch.ones(2, 3)),
        lambda pack: torch.func.jvp(pack, (torch.ones(2),), (torch.ones(2),)),
        lambda pack: torch.func.functionalize(pack)(torch.ones(2)),
    ],
    ids=["nested", "lazy", "zero", "vmap", "jvp", "functionalize"],
)
def test_what_has_no_bytes_is_refused_by_name_before_anything_is_written(within, tmp_path):
    plain = torch.ones(2)
    with pytest.raises(flashpack.FlashPackError, match=r"cannot pack 'a\.b': it (is|has no)"):
        within(lambda tensor: flashpack.pack_to_file({"plain": plain, "a.b": tensor}, tmp_path / "x"))
    assert not any(tmp_path.iterdir())
