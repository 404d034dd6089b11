"""What people do by mistake is answered with the likely cause and the cure."""

from __future__ import annotations

import errno
import io
import os
import resource
import subprocess
import sys

import flashpack
import pytest
import safetensors.torch
import torch
from checkpoints import save_index
from flashpack import FlashPackError, commands
from support import assert_bit_equal

STATE = {"weight": torch.arange(6.0).view(3, 2), "bias": torch.ones(3)}

OTHER_FILES = {
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 5\n", "git lfs pull"),
    "page": (b"<!DOCTYPE html><html>sign in</html>", "a web page.*download it again"),
    "empty": (b"", "it is empty"),
    "zeros": (bytes(4096), "download was not finished"),
    "notes": (b"notes of a meeting, which are longer than a footer", "it is a text"),
    "gzip": (b"\x1f\x8b\x08" + b"\1" * 60, "unpack it first"),
}


@pytest.fixture
def path(tmp_path):
    flashpack.pack_to_file(STATE, tmp_path / "model.flashpack")
    return tmp_path / "model.flashpack"


CALLS = {
    "load_file": flashpack.load_file,
    "open_file": flashpack.open_file,
    "assign_from_file": lambda path: flashpack.assign_from_file(torch.nn.Linear(2, 3), path),
    "read_flashpack_file": flashpack.read_flashpack_file,
    "revert_from_file": flashpack.revert_from_file,
    "verify_file": flashpack.verify_file,
    "prefetch_flashpack_file": flashpack.prefetch_flashpack_file,
    "get_flashpack_file_metadata": flashpack.get_flashpack_file_metadata,
    "stream_tensors": lambda path: next(flashpack.stream_tensors(path)),
}


@pytest.mark.parametrize("call", [flashpack.load_file, commands.convert_to_flashpack], ids=["load", "convert"])
@pytest.mark.parametrize("suffix", [".flashpack", ".safetensors", ".bin"])
@pytest.mark.parametrize(("content", "message"), OTHER_FILES.values(), ids=OTHER_FILES)
def test_a_file_that_is_no_checkpoint_is_named_for_what_it_is(content, message, suffix, call, tmp_path):
    file = tmp_path / f"file{suffix}"
    file.write_bytes(content)
    destination = () if call is flashpack.load_file else (tmp_path / "out.flashpack",)
    with pytest.raises(FlashPackError, match=rf"file\{suffix}.*{message}"):
        call(file, *destination)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_of_torch_save_is_told_how_to_be_converted(zipped, tmp_path):
    torch.save(STATE, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(FlashPackError, match=r'model\.pt.*torch\.save writes them: "flashpack convert"'):
        flashpack.load_file(tmp_path / "model.pt")


def test_a_file_that_was_cut_is_said_to_be_cut(path):
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(FlashPackError, match="it was cut, and has to be downloaded or copied again"):
        flashpack.load_file(path)


def test_safetensors_are_converted_whatever_the_file_is_called(tmp_path):
    safetensors.torch.save_file(STATE, tmp_path / "blob", metadata={"a": "b"})
    result = commands.convert_to_flashpack(tmp_path / "blob")
    assert_bit_equal(flashpack.load_file(result, metadata=(metadata := {})), STATE)
    assert metadata == {"a": "b"}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_what_is_no_path_is_told_by_its_type(call, path):
    for wrong in (None, 3, [path, 3]):
        with pytest.raises(TypeError, match=r"a path is a str or an os\.PathLike, not a (NoneType|int)"):
            call(wrong)
    with pytest.raises(TypeError, match="not a BytesIO: only files can be read"):
        call(io.BytesIO(path.read_bytes()))
    for swapped in (STATE, torch.nn.Linear(1, 1)):
        with pytest.raises(TypeError, match=r"not a (dict|Linear): the arguments may be in the wrong order"):
            call(swapped)
    with pytest.raises(FlashPackError, match=r"'a\\x00b' has a NUL character"):
        call("a\0b")


def test_lists_generators_and_bytes_are_paths_too(path):
    for paths in ([path], (path,), iter([path]), path.parent.glob("*.flashpack"), str(path).encode()):
        assert_bit_equal(flashpack.load_file(paths), STATE)


def test_arguments_in_the_wrong_order_are_told(path):
    model = torch.nn.Linear(2, 3)
    with pytest.raises(TypeError, match=r"the model comes first, and then the path.*not to a PosixPath"):
        flashpack.assign_from_file(path, model)
    with pytest.raises(TypeError, match="not to the class Linear"):
        flashpack.assign_from_file(torch.nn.Linear, path)
    with pytest.raises(TypeError, match="not a Linear: the arguments may be in the wrong order"):
        flashpack.pack_to_file("a.flashpack", model)
    for wrong in ([torch.ones(1)], torch.ones(1), model.named_parameters()):
        with pytest.raises(TypeError, match=r"a state dict or a module is packed, not a (list|Tensor|generator)"):
            flashpack.pack_to_file(wrong, path)
    for wrong in (None, 3, io.BytesIO()):
        with pytest.raises(TypeError, match="a path is a str"):
            flashpack.pack_to_file(STATE, wrong)
    with pytest.raises(FlashPackError, match="NUL"):
        flashpack.pack_to_file(STATE, "a\0b")


def test_a_conversion_whose_source_is_missing_and_whose_destination_is_there_tells_the_order(path, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No such file.*but there is the destination: the source comes first"):
        commands.convert_to_flashpack(tmp_path / "new.flashpack", path)
    with pytest.raises(FileNotFoundError, match="No such file or directory: "):
        commands.convert_to_flashpack(tmp_path / "new.flashpack", tmp_path / "other.flashpack")


@pytest.mark.parametrize("name", ["loop.safetensors", "loop"])  # The second could be a repository's, too.
@pytest.mark.parametrize(("target", "number"), [(None, errno.ELOOP), ("nowhere", errno.ENOENT)])
def test_a_link_that_leads_to_no_source_is_the_error_that_the_system_has_for_it(
    name, target, number, tmp_path, monkeypatch
):
    link = tmp_path / name
    link.symlink_to(target or name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=os.strerror(number)) as error:
        commands.convert_to_flashpack(name, tmp_path / "out")
    assert (error.value.errno, error.value.filename) == (number, name)


def test_a_pickled_module_is_named_with_the_cure(tmp_path):
    torch.save(torch.nn.Linear(1, 1), tmp_path / "module.pt")
    with pytest.raises(FlashPackError, match=r"than tensors, torch\.nn\.modules\.linear\.Linear, .*state_dict"):
        commands.convert_to_flashpack(tmp_path / "module.pt")


def test_a_reversal_does_not_write_under_the_name_of_a_flashpack_file(path, tmp_path):
    with pytest.raises(FlashPackError, match=r"a\.flashpack would not be a flashpack file"):
        commands.revert_from_flashpack(path, tmp_path / "a.flashpack")


@pytest.mark.parametrize("name", ["bf16", "BF16", "bfloat16", "torch.bfloat16"])
def test_a_dtype_may_be_called_what_people_call_it(name, path):
    assert next(flashpack.stream_tensors(path, dtype=name))[1].dtype is torch.bfloat16
    assert {tensor.dtype for tensor in flashpack.load_file(path, dtype=name).values()} == {torch.bfloat16}
    with pytest.raises(FlashPackError, match=f"dtype='{name}x' is neither a torch.dtype nor the name of one"):
        flashpack.load_file(path, dtype=f"{name}x")
    with pytest.raises(FlashPackError, match=r"Unsupported dtype for packing: .*: pass torch\.bfloat16"):
        flashpack.pack_to_file(STATE, path, target_dtype=name)


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="this torch has no such dtype")
def test_a_cast_to_packed_floats_is_refused_before_anything_is_done(path):
    before = path.read_bytes()
    with pytest.raises(FlashPackError, match="torch cannot cast to it"):
        flashpack.pack_to_file(STATE, path, target_dtype=torch.float4_e2m1fn_x2)
    with pytest.raises(FlashPackError, match="torch cannot cast to it"):
        next(flashpack.stream_tensors(path, dtype=torch.float4_e2m1fn_x2))
    assert path.read_bytes() == before


def test_tensors_below_a_key_are_found_and_converted_if_it_is_named(tmp_path):
    checkpoint = tmp_path / "last.ckpt"
    torch.save({"epoch": 3, "state_dict": STATE, "optimizer_states": [{"state": {}}]}, checkpoint)
    with pytest.raises(FlashPackError, match=r"last\.ckpt: cannot pack 'epoch'.*in 'state_dict'; --key state_dict "):
        commands.convert_to_flashpack(checkpoint)
    assert_bit_equal(flashpack.load_file(commands.convert_to_flashpack(checkpoint, key="state_dict")), STATE)
    with pytest.raises(FlashPackError, match="has no key 'model', but 'epoch', 'state_dict'"):
        commands.convert_to_flashpack(checkpoint, tmp_path / "out.flashpack", key="model")
    with pytest.raises(FlashPackError, match="holds a int, not a state dict"):
        commands.convert_to_flashpack(checkpoint, tmp_path / "out.flashpack", key="epoch")
    safetensors.torch.save_file(STATE, tmp_path / "a.safetensors")
    with pytest.raises(FlashPackError, match=r"a\.safetensors has no key 'model'"):
        commands.convert_to_flashpack(tmp_path / "a.safetensors", key="model")
    with pytest.raises(FlashPackError, match="cannot pack 'epoch': it is a int, not a tensor: tensors are in 'ema'"):
        flashpack.pack_to_file({"epoch": 1, "ema": STATE}, tmp_path / "out.flashpack")


def test_a_small_pickle_does_not_fill_the_disk_below_a_key_either(tmp_path):
    torch.save({"state_dict": {"mask": torch.ones(1).expand(1 << 34)}}, tmp_path / "bomb.pt")
    with pytest.raises(FlashPackError, match=r"bomb\.pt has tensors of \d+ bytes in all"):
        commands.convert_to_flashpack(tmp_path / "bomb.pt", key="state_dict")


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "bin", "gguf"])
def test_a_conversion_does_not_write_under_the_name_of_another_kind_of_file(suffix, tmp_path):
    safetensors.torch.save_file(STATE, tmp_path / "a.safetensors")
    for source in (tmp_path / "a.safetensors", tmp_path):
        with pytest.raises(FlashPackError, match=rf"b\.{suffix} would be a flashpack file .*: call it b\.flashpack"):
            commands.convert_to_flashpack(source, tmp_path / f"b.{suffix}")
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_what_is_a_flashpack_file_already_is_told_which_command_turns_it_back(path, tmp_path):
    with pytest.raises(FlashPackError, match='is a flashpack file already; "flashpack revert"'):
        commands.convert_to_flashpack(path, tmp_path / "a.safetensors")
    with pytest.raises(FlashPackError, match='is a flashpack file already; "flashpack revert"'):
        commands.convert_to_flashpack(path)
    path.write_bytes(b"<!DOCTYPE html>")
    with pytest.raises(FlashPackError, match="a web page"):
        commands.convert_to_flashpack(path)


def test_names_of_a_compiled_module_are_explained_and_can_be_saved_without_what_that_adds(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    compiled = torch.compile(model)
    inside = torch.nn.Sequential(torch.compile(torch.nn.Linear(2, 3)), torch.nn.Linear(3, 2))
    for each in (compiled, inside):
        flashpack.pack_to_file(each, tmp_path / "with")
        with pytest.raises(FlashPackError, match=r"'_orig_mod\.' in its names, .*strip_compiled=True"):
            flashpack.assign_from_file(model, tmp_path / "with")
        flashpack.pack_to_file(each, tmp_path / "without", strip_compiled=True)
        assert flashpack.assign_from_file(model, tmp_path / "without").missing == ()
        with pytest.raises(FlashPackError, match="load into the module that was compiled"):
            flashpack.assign_from_file(each, tmp_path / "without")
    torch.save(compiled.state_dict(), tmp_path / "compiled.pt")
    result = commands.convert_to_flashpack(tmp_path / "compiled.pt", strip_compiled=True)
    assert_bit_equal(flashpack.load_file(result), dict(model.state_dict()))
    with pytest.raises(FlashPackError, match="two tensors are called 'a'"):
        flashpack.pack_to_file(dict.fromkeys(("_orig_mod.a", "a"), torch.ones(1)), tmp_path / "a", strip_compiled=True)


def test_a_prefix_that_only_the_file_or_only_the_model_has_is_named(tmp_path):
    model = torch.nn.Linear(2, 3)
    wrapped = torch.nn.DataParallel(model)
    flashpack.pack_to_file(wrapped, tmp_path / "wrapped")
    flashpack.pack_to_file(model, tmp_path / "plain")
    with pytest.raises(FlashPackError, match=r"names in the file begin with 'module\.'"):
        flashpack.assign_from_file(model, tmp_path / "wrapped")
    with pytest.raises(FlashPackError, match=r"names of the model begin with 'module\.'.*load into its 'module'"):
        flashpack.assign_from_file(wrapped, tmp_path / "plain")
    flashpack.pack_to_file({"other": torch.ones(1)}, tmp_path / "other")
    with pytest.raises(FlashPackError, match=r"Could not assign 1 names: \['other'\]$"):
        flashpack.assign_from_file(model, tmp_path / "other")


def test_a_lazy_module_is_named_with_the_cure(tmp_path):
    model = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.LazyLinear(3))
    with pytest.raises(FlashPackError, match=r"cannot pack '1': this LazyLinear is lazy.*a first batch"):
        flashpack.pack_to_file(model, tmp_path / "a")
    model(torch.ones(1, 2))
    flashpack.pack_to_file(model, tmp_path / "a")


def test_a_byte_order_mark_in_an_index_is_named(tmp_path):
    index = save_index(tmp_path / "model.safetensors.index.json", {"m.safetensors": STATE})
    index.write_bytes(b"\xef\xbb\xbf" + index.read_bytes())
    for call in (flashpack.load_file, commands.convert_to_flashpack):
        with pytest.raises(FlashPackError, match="byte order mark: save it as UTF-8 without one"):
            call(tmp_path)


def test_a_directory_in_a_list_of_files_is_told_to_be_given_alone(path, tmp_path):
    with pytest.raises(FlashPackError, match="a directory in a list of files: give its path alone"):
        flashpack.load_file([path, tmp_path])


def test_more_files_than_descriptors_name_the_limit_and_the_cure(tmp_path):
    shards = {f"m-{i:05d}-of-00080.safetensors": {f"t{i}": torch.ones(2)} for i in range(80)}
    save_index(tmp_path / "model.safetensors.index.json", shards)
    code = """
import resource, sys, flashpack, torch
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
try:
    flashpack.load_file(sys.argv[1])
except OSError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=120)
    assert 'Too many open files: this process may have 64; "ulimit -n"' in done.stdout, done
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] != 64


@pytest.mark.parametrize("names", [5, b"ab", ["weight", 5]])
def test_names_that_are_none_are_told(path, names):
    with pytest.raises(FlashPackError, match=r"names must be names of tensors, .*, got"):
        flashpack.load_file(path, names=names)


@pytest.mark.parametrize("align_bytes", [2**70, 128.0, -1])
def test_an_alignment_that_no_file_can_have_is_refused_by_name(tmp_path, align_bytes):
    with pytest.raises(FlashPackError, match="align_bytes must be"):
        flashpack.pack_to_file({"a": torch.ones(2)}, tmp_path / "a.flashpack", align_bytes=align_bytes)


def test_an_order_of_what_are_no_names_is_refused_by_name(tmp_path):
    with pytest.raises(FlashPackError, match="name_order has 1, which is a int"):
        flashpack.pack_to_file({"a": torch.ones(2)}, tmp_path / "a.flashpack", name_order=[1, "a"])


def test_a_tensor_that_ends_behind_its_storage_is_refused_by_name(tmp_path):
    tensor = torch.ones(3)
    tensor.untyped_storage().resize_(4)
    with pytest.raises(FlashPackError, match=r"cannot pack 'a': its storage has 4 bytes.* byte 12"):
        flashpack.pack_to_file({"a": tensor}, tmp_path / "a.flashpack")
    flashpack.pack_to_file({"a": torch.ones(9).view(3, 3).t()[1:, 1:]}, tmp_path / "a.flashpack")
