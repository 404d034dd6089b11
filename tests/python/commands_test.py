from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import stat
import typing
import zipfile

import flashpack
import pytest
import safetensors.torch
import torch
from checkpoints import STATE, halves, names_in, save_index
from flashpack import FlashPackError, commands
from flashpack._conversion import map_tensors
from support import assert_bit_equal


@pytest.fixture
def safetensors_file(tmp_path):
    safetensors.torch.save_file(STATE, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("filter_kwargs_for_method", "kwargs method"),
        (
            "convert_to_flashpack",
            "model_or_state_dict_or_path_or_repo_id destination_path=None dtype=None ignore_names=None "
            "ignore_prefixes=None ignore_suffixes=None use_transformers=False use_diffusers=False silent=True **kwargs",
        ),
        *(
            (
                f"convert_to_flashpack_from_{what}",
                f"{first} {destination} dtype=None ignore_names=None ignore_prefixes=None ignore_suffixes=None "
                f"silent=True{rest}",
            )
            for what, first, destination, rest in [
                ("state_dict", "state_dict", "destination_path", ""),
                ("model", "model", "destination_path", ""),
                ("state_dict_file", "path", "destination_path=None", ""),
                ("diffusers_repo_id_or_dir", "model_dir", "destination_path", " **kwargs"),
                ("transformers_repo_id_or_dir", "model_dir", "destination_path", " **kwargs"),
            ]
        ),
        ("revert_from_flashpack", "path destination_path=None silent=True force=False"),  # The reference has no force.
    ],
)
def test_signatures_are_those_of_the_reference(function, arguments):
    bare = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in inspect.signature(getattr(commands, function)).parameters.values()
    ]
    assert " ".join(map(str, bare)) == arguments


def test_arguments_are_filtered_by_name_unless_any_is_taken():
    def some(a, b=0): ...
    def every(a, **rest): ...

    assert commands.filter_kwargs_for_method({"a": 1, "c": 2}, some) == {"a": 1}
    assert commands.filter_kwargs_for_method({"a": 1, "c": 2}, every) == {"a": 1, "c": 2}


def test_dicts_and_modules_convert_to_the_destination_that_they_must_have(tmp_path):
    module = torch.nn.Linear(3, 4)
    for source, expected in ((STATE, STATE), (module, module.state_dict())):
        path = tmp_path / "a.flashpack"
        assert commands.convert_to_flashpack(source, path) == os.fspath(path)
        assert_bit_equal(flashpack.revert_from_file(path), dict(expected))
        with pytest.raises(AssertionError, match="destination_path is required"):
            commands.convert_to_flashpack(source)


@pytest.mark.parametrize("dtype", ["float64", torch.float64])
def test_names_can_be_left_out_and_values_cast(tmp_path, dtype):
    path = tmp_path / "a.flashpack"
    commands.convert_to_flashpack(STATE, path, dtype, ["count"], ["b"], ["f"])
    expected = {name: STATE[name].to(torch.float64) for name in ("weight", "scale")}
    assert_bit_equal(flashpack.revert_from_file(path), expected)


def test_a_safetensors_file_converts_to_a_file_beside_it(safetensors_file):
    result = commands.convert_to_flashpack(safetensors_file)
    assert result == os.fspath(safetensors_file.with_suffix(".flashpack"))
    assert_bit_equal(flashpack.revert_from_file(result), STATE)


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin", "last.ckpt", "no_suffix", "x.flashpack.d/model.pth"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_of_torch_save_converts_and_stays_what_it_is(tmp_path, name, zipped):
    source = tmp_path / name
    source.parent.mkdir(exist_ok=True)
    torch.save(STATE, source, _use_new_zipfile_serialization=zipped)
    before = source.read_bytes()
    result = commands.convert_to_flashpack(os.fspath(source))
    assert result == os.fspath(source.parent / f"{source.stem}.flashpack")
    assert_bit_equal(flashpack.revert_from_file(result), STATE)
    assert source.read_bytes() == before


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_an_index_converts_the_tensors_of_all_its_shards(tmp_path, suffix):
    first, second = halves()
    shards = {f"m-00001-of-00002.{suffix}": first, f"m-00002-of-00002.{suffix}": second}
    index = save_index(tmp_path / f"m.{suffix}.index.json", shards)
    result = commands.convert_to_flashpack(index)
    assert result == os.fspath(tmp_path / "m.flashpack")
    assert_bit_equal(flashpack.revert_from_file(result), STATE)


def test_checkpoints_are_mapped_and_not_copied_to_memory(tmp_path, safetensors_file):
    torch.save(STATE, tmp_path / "model.pt")
    first, second = halves()
    save_index(tmp_path / "m.safetensors.index.json", {"a.safetensors": first, "b.safetensors": second})
    for name in ("model.safetensors", "model.pt", "m.safetensors.index.json"):
        tensors = map_tensors(tmp_path / name)
        with open("/proc/self/maps") as file:
            mapped = [line.split() for line in file if f" {tmp_path}/" in line]
        ranges = [[int(end, 16) for end in line[0].split("-")] for line in mapped]
        for tensor in tensors.values():
            assert any(begin <= tensor.data_ptr() < end for begin, end in ranges), name


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (os.fspath(self.path),)


def test_nothing_in_a_pickle_is_run(tmp_path):
    torch.save({"weight": torch.ones(3), "evil": Runs(tmp_path / "ran")}, tmp_path / "model.pt")
    with pytest.raises(FlashPackError, match=r"model\.pt.*more in it than tensors"):
        commands.convert_to_flashpack(tmp_path / "model.pt")
    assert names_in(tmp_path) == ["model.pt"]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.safetensors", b"nonsense", "a.safetensors"),
        ("a.safetensors", b"", "a.safetensors"),
        ("a.bin", b"nonsense", "a.bin is not a file that torch.save wrote"),
        ("a.pt", b"", "a.pt"),
        ("a.pt", b"PK\x03\x04nonsense", "a.pt"),
        ("a.safetensors.index.json", b"[]", "not the index of a sharded checkpoint"),
        ("a.safetensors.index.json", b"{", "not the index of a sharded checkpoint"),
        ("a.safetensors.index.json", b'{"weight_map": {"a": 7}}', 'not the index.*the file of "a" must be a string'),
        ("a.bin.index.json", b'{"weight_map": {"a": "b", "a": "c"}}', 'has the key "a" twice'),
        ("a.safetensors.index.json", b'{"weight_map": {"a": "../b.safetensors"}}', "no file beside it"),
        ("a.safetensors.index.json", b'{"weight_map": {"a": "/b.safetensors"}}', "no file beside it"),
        ("a.safetensors.index.json", b'{"weight_map": {"a": ".."}}', "no file beside it"),
    ],
)
def test_what_is_no_checkpoint_is_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FlashPackError, match=message):
        commands.convert_to_flashpack(tmp_path / name)
    assert names_in(tmp_path) == [name]


def test_a_pickle_of_something_else_a_missing_shard_and_a_missing_tensor_are_refused(tmp_path):
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    with pytest.raises(FlashPackError, match="holds a list, not a state dict"):
        commands.convert_to_flashpack(tmp_path / "list.pt")
    torch.save({"state_dict": {"weight": torch.ones(1)}}, tmp_path / "nested.pt")
    with pytest.raises(FlashPackError, match=r"'state_dict'.*dict, not a tensor"):
        commands.convert_to_flashpack(tmp_path / "nested.pt")
    index = save_index(tmp_path / "m.safetensors.index.json", {"m1.safetensors": {"a": torch.ones(1)}})
    index.write_text(json.dumps({"weight_map": {"b": "m1.safetensors"}}))
    with pytest.raises(FlashPackError, match=r'"b" is in m1\.safetensors'):
        commands.convert_to_flashpack(index)
    (tmp_path / "m1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"m1\.safetensors"):
        commands.convert_to_flashpack(index)
    assert not list(tmp_path.glob("*.flashpack"))


def test_a_flashpack_file_is_not_converted_again(pack, tmp_path):
    path = pack(STATE)
    with pytest.raises(FlashPackError, match="flashpack file already"):
        commands.convert_to_flashpack(path, tmp_path / "b.flashpack")


def test_the_source_is_never_the_destination(tmp_path, pack):
    torch.save(STATE, tmp_path / "model.flashpack")
    (tmp_path / "link.flashpack").symlink_to("model.flashpack")
    packed = pack(STATE).rename(tmp_path / "packed.safetensors")
    first, second = halves()
    index = save_index(tmp_path / "m.safetensors.index.json", {"m1.safetensors": first, "m2.safetensors": second})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for source, destination in [
        ("model.flashpack", None),
        ("model.flashpack", "model.flashpack"),
        ("model.flashpack", "link.flashpack"),
        (index.name, "m2.safetensors"),
        (index.name, index.name),
    ]:
        with pytest.raises(FlashPackError, match=r"exists already|is the source"):
            commands.convert_to_flashpack(tmp_path / source, None if destination is None else tmp_path / destination)
    for destination in (None, packed):
        with pytest.raises(FlashPackError, match="is the source"):
            commands.revert_from_flashpack(packed, destination)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_default_destination_is_not_replaced_and_a_named_one_is(safetensors_file):
    destination = safetensors_file.with_suffix(".flashpack")
    destination.write_bytes(b"old")
    with pytest.raises(FlashPackError, match="exists already"):
        commands.convert_to_flashpack(safetensors_file)
    assert destination.read_bytes() == b"old"
    commands.convert_to_flashpack(safetensors_file, destination)
    assert_bit_equal(flashpack.revert_from_file(destination), STATE)
    with pytest.raises(FlashPackError, match="exists already"):
        commands.revert_from_flashpack(destination)
    for arguments in ({"destination_path": safetensors_file}, {"force": True}):
        safetensors_file.write_bytes(b"old")
        commands.revert_from_flashpack(destination, **arguments)
        assert_bit_equal(safetensors.torch.load_file(safetensors_file), STATE)


def test_an_index_reverts_by_default_to_a_file_of_the_name_without_suffixes(tmp_path):
    flashpack.pack_to_file(STATE, tmp_path / "model-1.flashpack")
    index = tmp_path / "model.flashpack.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(STATE, "model-1.flashpack")}))
    assert commands.revert_from_flashpack(index) == os.fspath(tmp_path / "model.safetensors")
    assert_bit_equal(safetensors.torch.load_file(tmp_path / "model.safetensors"), STATE)


def test_capital_letters_in_a_suffix_make_no_difference(tmp_path, safetensors_file):
    source = safetensors_file.rename(tmp_path / "model.SafeTensors")
    with pytest.raises(FlashPackError, match=r"call it b\.flashpack"):
        commands.convert_to_flashpack(source, tmp_path / "b.SAFETENSORS")
    packed = commands.convert_to_flashpack(source)
    assert packed == os.fspath(tmp_path / "model.flashpack")
    with pytest.raises(FlashPackError, match="would not be a flashpack file"):
        commands.revert_from_flashpack(packed, tmp_path / "b.FlashPack")
    assert_bit_equal(
        safetensors.torch.load_file(commands.revert_from_flashpack(packed, tmp_path / "b.SAFETENSORS")), STATE
    )
    shutil.copytree(tmp_path, tmp_path / "directory")
    (tmp_path / "directory" / "model.SafeTensors").rename(tmp_path / "directory" / "model.safetensors")
    result = commands.convert_to_flashpack(tmp_path / "directory", tmp_path / "c.FLASHPACK")
    assert_bit_equal(flashpack.load_file(result), STATE)


def test_what_is_neither_here_nor_on_the_hub_is_an_error(tmp_path):
    for missing in (tmp_path / "missing", "missing.safetensors", "./missing", "a/b/c"):
        with pytest.raises(FileNotFoundError, match=re.escape(str(missing))):
            commands.convert_to_flashpack(missing, tmp_path / "out")
    with pytest.raises(AssertionError, match="destination_path is required"):
        commands.convert_to_flashpack("some/repository")
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("name", ["model.fpk", "model", "x.flashpack.d/model.flashpack"])
def test_reverting_makes_a_safetensors_file_beside_the_source(tmp_path, pack, name):
    source = tmp_path / name
    source.parent.mkdir(exist_ok=True)
    pack(STATE).rename(source)
    before = source.read_bytes()
    result = commands.revert_from_flashpack(os.fspath(source))
    assert result == os.fspath(source.parent / "model.safetensors")
    assert_bit_equal(safetensors.torch.load_file(result), STATE)
    assert source.read_bytes() == before
    with safetensors.safe_open(result, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("name", ["a.pt", "a.bin", "a", "a.safetensors", "new/folder/a.pt"])
def test_reverted_files_can_be_read_by_whom_the_umask_allows_and_keep_a_mode_that_was_there(tmp_path, pack, name):
    source = pack(STATE)
    before = os.umask(0o027)
    try:
        result = commands.revert_from_flashpack(source, os.fspath(tmp_path / name))
        assert result == os.fspath(tmp_path / name)
        assert stat.S_IMODE(os.stat(result).st_mode) == 0o640
        os.chmod(result, 0o604)
        commands.revert_from_flashpack(source, result)
        assert stat.S_IMODE(os.stat(result).st_mode) == 0o604
    finally:
        os.umask(before)
    read = safetensors.torch.load_file if name.endswith(".safetensors") else torch.load
    assert_bit_equal(read(result), STATE)


def test_a_reversal_that_fails_leaves_the_old_file_and_no_other(tmp_path, pack):
    source = pack({"z": torch.ones(3, dtype=torch.complex128)})
    (tmp_path / "a.safetensors").write_bytes(b"old")
    with pytest.raises(FlashPackError, match=r"complex128.*\.pt"):
        commands.revert_from_flashpack(source, tmp_path / "a.safetensors")
    with pytest.raises(NotADirectoryError, match=r"a\.safetensors"):
        commands.revert_from_flashpack(source, tmp_path / "a.safetensors" / "b.pt")
    assert names_in(tmp_path) == ["0.flashpack", "a.safetensors"]
    assert (tmp_path / "a.safetensors").read_bytes() == b"old"


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_bytes_that_are_not_what_was_written_are_not_reverted(tmp_path, pack, name):
    source = pack(STATE)
    raw = bytearray(source.read_bytes())
    raw[100] ^= 1
    source.write_bytes(raw)
    with pytest.raises(FlashPackError, match="checksum"):
        commands.revert_from_flashpack(source, tmp_path / name)
    assert names_in(tmp_path) == [source.name]


def test_progress_of_a_reversal_counts_bytes_up_to_all_of_them(pack, monkeypatch, capsys):
    source = pack({str(i): torch.ones(250) for i in range(8)})
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    commands.revert_from_flashpack(source, silent=False)
    totals = re.findall(r"([\d.]+k)/([\d.]+k)", capsys.readouterr().err)
    assert totals
    assert totals[-1][0] == totals[-1][1]


def test_arguments_that_a_conversion_has_no_use_for_are_told_in_the_log(safetensors_file, caplog):
    commands.convert_to_flashpack(safetensors_file, variant=None, revison="main")
    assert "not used in this conversion: revison" in caplog.text
    for use in ("use_transformers", "use_diffusers"):
        with pytest.raises(FlashPackError, match="give its directory"):
            commands.convert_to_flashpack(safetensors_file, **{use: True})
    with pytest.raises(FlashPackError, match="exclude each other"):
        commands.convert_to_flashpack(safetensors_file, use_transformers=True, use_diffusers=True)


def test_annotations_resolve():
    for name in commands.__all__:
        assert typing.get_type_hints(getattr(commands, name))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_tensors_that_an_index_does_not_list_are_converted_as_the_libraries_load_them(suffix, tmp_path, caplog):
    first, second = halves()
    index = save_index(tmp_path / f"m.{suffix}.index.json", {f"m1.{suffix}": first, f"m2.{suffix}": second})
    if suffix == "bin":
        torch.save({**second, "epoch": 3}, tmp_path / "m2.bin")
    content = json.loads(index.read_text())
    for lost in ("bias", "count"):
        del content["weight_map"][lost]
    index.write_text(json.dumps(content))
    assert_bit_equal(flashpack.load_file(commands.convert_to_flashpack(index)), STATE)
    assert "does not list, but its files have: bias, count" in caplog.text


@pytest.mark.parametrize(
    ("name", "message"), [(1, "tensor name 1 is a int"), ("a\ud800", "cannot be written as UTF-8")]
)
def test_a_tensor_whose_name_no_file_can_have_is_refused_and_not_left_out(name, message, tmp_path):
    index = save_index(tmp_path / "m.bin.index.json", {"m1.bin": {"a": torch.ones(1)}})
    torch.save({"a": torch.ones(1), name: torch.ones(2)}, tmp_path / "m1.bin")
    with pytest.raises(FlashPackError, match=message):
        commands.convert_to_flashpack(index)


def test_a_tensor_that_is_in_several_files_and_in_no_list_is_refused(tmp_path):
    first, second = halves()
    files = {"m1.safetensors": first, "m2.safetensors": second | {"bias": first["bias"] + 1}}
    index = save_index(tmp_path / "m.safetensors.index.json", files)
    content = json.loads(index.read_text())
    del content["weight_map"]["bias"]
    index.write_text(json.dumps(content))
    with pytest.raises(FlashPackError, match=r'm1.*m2.* both have "bias", and the index does not list it'):
        commands.convert_to_flashpack(index)


@pytest.mark.parametrize(
    "tensors",
    [
        {"mask": torch.ones(1).expand(1 << 34)},
        dict.fromkeys(map(str, range(2000)), torch.ones(1 << 20).as_strided((4096, 1 << 19), (64, 1))),
    ],
    ids=["one number", "overlapping rows"],
)
@pytest.mark.parametrize("archive", [True, False])
def test_a_small_pickle_does_not_fill_the_disk(tensors, archive, tmp_path):
    bomb = tmp_path / "bomb.pt"
    torch.save(tensors, bomb, _use_new_zipfile_serialization=archive)
    with pytest.raises(flashpack.FlashPackError, match=r"bomb\.pt has tensors of \d+ bytes in all"):
        commands.convert_to_flashpack(bomb)
    assert [path.name for path in tmp_path.iterdir()] == ["bomb.pt"]


def test_tied_and_expanded_tensors_are_converted(tmp_path):
    weight = torch.randn(50, 1000)
    tied = {f"layers.{i}": weight for i in range(48)} | {"mask": torch.ones(1, 1).expand(300, 300)}
    torch.save(tied, tmp_path / "tied.pt")
    assert_bit_equal(flashpack.load_file(commands.convert_to_flashpack(tmp_path / "tied.pt")), tied)


def test_an_archive_with_compressed_records_is_not_unpacked(tmp_path, monkeypatch):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data/99", bytes(10 << 20))
    read = []
    unpack = zipfile.ZipExtFile.read
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda file, n=-1: read.append(file.name) or unpack(file, n))
    with pytest.raises(flashpack.FlashPackError, match="is damaged"):
        commands.convert_to_flashpack(tmp_path / "a.pt")
    assert "a/data/99" not in read
