from __future__ import annotations

import errno
import json
import logging
import os
import pickle

import flashpack
import pytest
import torch
from flashpack.deserialization import FlashTensorStorage, iterate_from_flash_tensor, read_flashpack_file
from support import assert_bit_equal, footer_bytes, random_tensor, run_python, unprivileged, write_file

RECORD = {"name": "a", "shape": [2, 4], "offset": 0, "length": 8}
SECOND = {"name": "b", "shape": [8], "offset": 8, "length": 8}
V3 = {
    "format": "flashpack_v3",
    "target_dtype": "float32",
    "align_bytes": 0,
    "total_elems": 16,
    "index": [RECORD, SECOND],
}
BLOCK = {"dtype": "float32", "offset_bytes": 0, "length_bytes": 64, "length_elems": 16}
V4 = {
    "format": "flashpack_v4",
    "align_bytes": 0,
    "total_payload_bytes": 64,
    "total_elems": 16,
    "macroblocks": [BLOCK],
    "index": [RECORD | {"macroblock": 0}],
}


def with_record(**changes):
    return V3 | {"index": [RECORD | changes, SECOND]}


def with_block(**changes):
    return V4 | {"macroblocks": [BLOCK | changes]}


HOSTILE = {
    "unknown format": (V3 | {"format": "flashpack_v9"}, "Unexpected format"),
    "no object": (b"[1]", ""),
    "not UTF-8": (b'{"format":"\xff"}', ""),
    "no JSON": (b"{", ""),
    "text after the JSON": (json.dumps(V3).encode() + b"x", ""),
    "nested deeply": (b"[" * 100_000, ""),
    "duplicate keys": (json.dumps(V3).encode()[:-1] + b',"total_elems":16}', ""),
    "an integer beyond 64 bits": (V3 | {"total_elems": 1 << 80}, ""),
    "unknown dtype": (V3 | {"target_dtype": "Tensor"}, "Unsupported dtype string"),
    "payload past the end": (V3 | {"total_elems": 1 << 40}, ""),
    "sizes that overflow": (V3 | {"total_elems": (1 << 62) + 1}, ""),
    "no macroblocks": (V4 | {"macroblocks": []}, "Missing macroblock metadata"),
    "a block beyond the payload": (with_block(offset_bytes=32), "macroblock 0"),
    "a block of two sizes": (with_block(length_bytes=60), "macroblock 0"),
    "a block between elements": (with_block(offset_bytes=2, length_bytes=32, length_elems=8), "macroblock 0"),
    "an unknown encoding": (with_block(fpz={"codec": "zstd"}), "fpz"),
    "overlapping blocks": (
        V4 | {"macroblocks": [BLOCK, BLOCK | {"offset_bytes": 32, "length_bytes": 32, "length_elems": 8}]},
        "overlap",
    ),
    "a record of no block": (V4 | {"index": [RECORD | {"macroblock": 3}]}, "references macroblock"),
    "a negative offset": (with_record(offset=-8), '"a"'),
    "a record past its block": (with_record(offset=1 << 40), '"a"'),
    "a record whose end overflows": (with_record(offset=(1 << 63) - 4), '"a"'),
    "a shape of another length": (with_record(shape=[3, 3]), '"a"'),
    "a negative dimension": (with_record(shape=[-2, -4]), '"a"'),
    "overlapping records": (with_record(offset=4), ""),
    "a name twice": (V3 | {"index": [RECORD, SECOND | {"name": "a"}]}, '"a"'),
    "a misaligned record": (V3 | {"align_bytes": 64}, "misaligned"),
    "a number as text": (with_record(length="8"), ""),
    "a fraction": (with_record(length=8.5), ""),
    "a name that is a number": (with_record(name=7), ""),
    "an index that is an object": (V3 | {"index": {}}, ""),
    "negative alignment": (V3 | {"align_bytes": -1}, ""),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_footers_are_refused_by_every_reader(what, tmp_path):
    footer, message = HOSTILE[what]
    path = write_file(tmp_path / "hostile.flashpack", footer)
    model = torch.nn.Linear(2, 2)
    for read in (
        flashpack.get_flashpack_file_metadata,
        read_flashpack_file,
        flashpack.revert_from_file,
        lambda path: flashpack.assign_from_file(model, path),
    ):
        with pytest.raises(flashpack.FlashPackError, match=r"hostile\.flashpack") as caught:
            read(path)
        assert message in str(caught.value)
    assert not flashpack.is_flashpack_file(path)


@pytest.mark.parametrize(
    ("raw", "message"),
    [(b"", "File too small"), (b"tiny", "File too small"), (bytes(64), "Bad magic")],
)
def test_what_is_no_flashpack_file_is_said_to_be_none(raw, message, tmp_path):
    path = tmp_path / "other"
    path.write_bytes(raw)
    with pytest.raises(flashpack.FlashPackError, match=message):
        flashpack.get_flashpack_file_metadata(path)
    assert not flashpack.is_flashpack_file(path)


def test_a_path_of_bytes_is_a_path_for_all(pack):
    path = os.fsencode(pack({"a": torch.ones(2)}))
    assert flashpack.is_flashpack_file(path)
    assert flashpack.load_file(path).keys() == {"a"}


@pytest.mark.parametrize("cut", [1, 8, 16, 200])
def test_a_file_that_lost_its_end_is_refused(cut, pack):
    path = pack({"a": torch.ones(100)})
    os.truncate(path, path.stat().st_size - cut)
    with pytest.raises(flashpack.FlashPackError, match=r"0\.flashpack"):
        flashpack.revert_from_file(path)


READERS = [flashpack.get_flashpack_file_metadata, read_flashpack_file, flashpack.revert_from_file]


@pytest.mark.parametrize("read", READERS)
def test_a_missing_file_is_file_not_found_with_its_name(read, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        read(tmp_path / "missing")
    assert caught.value.errno == errno.ENOENT
    assert caught.value.filename == str(tmp_path / "missing")


@pytest.mark.parametrize("read", READERS)
def test_a_directory_is_an_is_a_directory_error(read, tmp_path):
    with pytest.raises(IsADirectoryError):
        read(tmp_path)


@pytest.mark.parametrize("read", READERS)
def test_an_unreadable_file_is_a_permission_error(read, pack):
    path = pack({"a": torch.ones(1)})
    path.chmod(0)
    with unprivileged(), pytest.raises(PermissionError) as caught:
        read(path)
    assert caught.value.filename == str(path)


def test_paths_that_are_not_utf8_keep_their_bytes_in_errors():
    with pytest.raises(FileNotFoundError) as caught:
        flashpack.get_flashpack_file_metadata("/missing/\udcff")
    assert caught.value.filename == "/missing/\udcff"


@pytest.mark.parametrize("device", ["meta", "mps", torch.device("meta")])
def test_other_devices_are_refused(device, pack):
    with pytest.raises(flashpack.FlashPackError, match="Unsupported device"):
        read_flashpack_file(pack({"a": torch.ones(1)}), device=device)


def test_blocks_are_one_flat_tensor_per_dtype_and_may_be_written_to(pack):
    path = pack({"a": torch.ones(4, 2), "b": torch.arange(3)})
    before = path.read_bytes()
    storage, metadata = read_flashpack_file(path)
    assert len(storage) == 2
    assert [(block.dtype, block.dim()) for block in storage.blocks] == [(torch.float32, 1), (torch.int64, 1)]
    assert storage.device == torch.device("cpu")
    views = dict(iterate_from_flash_tensor(storage, metadata))
    storage.block(0).zero_()
    assert not views["a"].any()
    assert path.read_bytes() == before


def test_a_block_says_how_its_bytes_came(pack, caplog):
    path = pack({"a": torch.ones(1 << 20)})
    with caplog.at_level(logging.INFO, logger="flashpack"):
        storage, _ = read_flashpack_file(path)
    assert storage.stats["requested_bytes"] == 4 << 20
    assert storage.stats["backend"] in ("io_uring", "workers")
    assert storage.stats["direct_bytes"] + storage.stats["buffered_bytes"] >= 4 << 20
    assert "GB/s" in caplog.text


def test_reading_adds_the_macroblock_to_records_as_the_reference_does(pack):
    path = pack({"a": torch.ones(1)})
    _, metadata = read_flashpack_file(path)
    assert metadata["index"][0]["macroblock"] == 0
    given = flashpack.get_flashpack_file_metadata(path)
    assert read_flashpack_file(path, metadata=given)[1] is given


@pytest.mark.parametrize(
    "change", [{"total_elems": 8}, {"target_dtype": "float16"}, {"format": "x"}, {"total_elems": None}]
)
def test_metadata_of_another_file_is_refused(change, pack):
    path = pack({"a": torch.ones(4)})
    metadata = flashpack.get_flashpack_file_metadata(path) | change
    with pytest.raises(flashpack.FlashPackError, match="not that of this file"):
        read_flashpack_file(path, metadata=metadata)


@pytest.mark.parametrize(
    "change",
    [
        {"offset": -32},
        {"offset": 1 << 70},
        {"offset": 0.0},
        {"length": 5},
        {"length": True},
        {"shape": [2, -1, -2]},
        {"shape": None},
        {"shape": ["4"]},
        {"shape": [8], "length": 8},
        {"macroblock": 1},
        {"macroblock": -1},
        {"macroblock": "0"},
    ],
)
@pytest.mark.parametrize("align_bytes", [0, 128])
def test_a_record_that_does_not_fit_its_block_is_named(change, align_bytes, pack):
    storage, metadata = read_flashpack_file(pack({"a": torch.ones(4)}, align_bytes=align_bytes))
    metadata["index"][0].update(change)
    with pytest.raises(flashpack.FlashPackError, match=r"Could not get tensor|references macroblock|misaligned"):
        list(iterate_from_flash_tensor(storage, metadata))


MALFORMED = [None, {}, {"index": None}, {"index": {}}, {"index": [7]}, {"index": [{}]}, {"index": [{"name": 7}]}]


@pytest.mark.parametrize("malformed", MALFORMED, ids=str)
def test_metadata_without_records_of_names_is_refused_before_anything_is_read(malformed, pack, monkeypatch):
    with pytest.raises(flashpack.FlashPackError, match=r"no list 'index'|no object with a name"):
        list(iterate_from_flash_tensor(torch.ones(4), malformed))
    path = pack({"a": torch.ones(4)})
    metadata = flashpack.get_flashpack_file_metadata(path)
    del metadata["index"]
    monkeypatch.delattr(flashpack.deserialization, "read_storage")
    with pytest.raises(flashpack.FlashPackError, match=r"no list 'index'|no object with a name|not that of this file"):
        read_flashpack_file(path, metadata=metadata | (malformed or {}))


def test_a_plain_tensor_is_a_storage_of_one_block():
    metadata = {"index": [{"name": "a", "shape": [], "offset": 1, "length": 1}]}
    assert dict(iterate_from_flash_tensor(torch.arange(3), metadata)) == {"a": torch.tensor(1)}
    assert FlashTensorStorage([]).device == torch.device("cpu")


def test_iteration_skips_what_is_ignored(pack):
    storage, metadata = read_flashpack_file(pack({name: torch.ones(1) for name in ("a.w", "b.w", "c.bias", "d")}))
    names = [
        name
        for name, _ in iterate_from_flash_tensor(
            storage, metadata, ignore_names=["d"], ignore_prefixes=["a."], ignore_suffixes=[".bias"]
        )
    ]
    assert names == ["b.w"]


def test_reverted_tensors_keep_file_order_and_own_their_memory(pack):
    source = {"small": torch.ones(2), "large": torch.ones(1000)}
    tensors = flashpack.revert_from_file(pack(source))
    assert list(tensors) == ["large", "small"]
    assert len(pickle.dumps(tensors["small"])) < 2000
    tensors["large"].zero_()
    assert_bit_equal({"small": tensors["small"]}, {"small": source["small"]})


@pytest.mark.parametrize("harm", ["os.truncate(path, 0)", "open(path, 'r+b').write(bytes(1 << 20))"])
def test_what_becomes_of_a_file_does_not_concern_what_was_loaded_from_it(pack, harm):
    path = pack({"a": torch.ones(1 << 18)})
    # Who touches a map of a file that lost its end is killed.
    code = f"""
import os, flashpack
path = {os.fspath(path)!r}
tensors = flashpack.revert_from_file(path)
{harm}
print(tensors["a"].sum().item())
"""
    assert run_python(code) == f"{float(1 << 18)}\n"


def test_tensors_made_in_inference_mode_are_ordinary_ones(pack):
    path = pack({"a": torch.ones(3)})
    with torch.inference_mode():
        tensor = flashpack.revert_from_file(path)["a"]
        block = read_flashpack_file(path)[0].block(0)
    assert not tensor.is_inference()
    assert not block.is_inference()


def test_a_default_device_does_not_move_what_is_loaded(pack):
    path = pack({"a": torch.ones(3), "none": torch.empty(0)})
    with torch.device("meta"):
        tensors = flashpack.revert_from_file(path)
    assert {tensor.device.type for tensor in tensors.values()} == {"cpu"}


def test_a_mapped_file_is_lazy_private_and_equal(pack):
    source = {
        "a": random_tensor((1000, 3)),
        "b": torch.arange(5),
        "none": torch.empty(0, 2),
        "zero_dim": torch.tensor(1.5),
    }
    path = pack(source)
    before = path.read_bytes()
    storage, metadata = read_flashpack_file(path, mmap=True)
    assert storage.stats is None
    assert_bit_equal(dict(iterate_from_flash_tensor(storage, metadata)), source)
    storage.block(0).zero_()
    assert path.read_bytes() == before
    assert_bit_equal(flashpack.revert_from_file(path), source)


def test_mapping_to_another_device_is_refused(pack):
    with pytest.raises(flashpack.FlashPackError, match="Unsupported device"):
        read_flashpack_file(pack({"a": torch.ones(1)}), device="cuda", mmap=True)


def test_harmless_oddities_are_logged(tmp_path, caplog):
    footer = V3 | {"total_elems": 16}
    path = write_file(tmp_path / "gap.flashpack", footer, payload=bytes(80))
    flashpack.get_flashpack_file_metadata(path)
    assert "gap.flashpack" in caplog.text
    assert json.loads(footer_bytes(path)) == footer
