from __future__ import annotations

import ast
import copy
import importlib
import inspect
import os
import pickle
import signal
from importlib.metadata import distributions, version
from pathlib import Path

import flashpack
import pytest
import torch
from flashpack import _engine, _native
from flashpack._checkpoint import open_checkpoint
from support import run_python


def test_import_brings_in_neither_torch_nor_numpy_until_they_are_needed(tmp_path):
    path = tmp_path / "a.flashpack"
    flashpack.pack_to_file({"a": torch.ones(2)}, path)
    code = f"""
import sys, flashpack
assert not {{"torch", "numpy"}} & set(sys.modules), "at import"
assert flashpack.is_flashpack_file({str(path)!r})
assert flashpack.get_flashpack_file_metadata({str(path)!r})["index"][0]["name"] == "a"
flashpack.constants.MAGIC, flashpack.__version__, flashpack.FlashPackError
assert not {{"torch", "numpy"}} & set(sys.modules), "for metadata"
flashpack.mixin.assign_from_file, flashpack.serialization.pack_to_file
assert "torch" in sys.modules
print("fine")
"""
    assert run_python(code) == "fine\n"


def test_submodules_are_attributes_after_a_bare_import_and_version_is_a_string():
    code = """
import flashpack
for name in ("serialization", "mixin", "deserialization", "utils", "constants"):
    assert getattr(flashpack, name).__name__ == "flashpack." + name
import flashpack.version
print(type(flashpack.version).__name__, flashpack.__implementation__)
"""
    assert run_python(code) == "str cpp\n"


def test_every_public_name_resolves_and_unknown_ones_raise():
    for name in flashpack.__all__:
        assert getattr(flashpack, name, flashpack) is not flashpack, name
        assert name in dir(flashpack)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = flashpack.nonsense


def test_type_checkers_see_every_public_name_from_where_it_comes():
    """They do not run __getattr__, and would take a name that only that knows for Any."""
    homes = {}
    for node in ast.walk(ast.parse(Path(flashpack.__file__).read_text())):
        if isinstance(node, ast.ImportFrom):
            homes.update((each.asname or each.name, node.module) for each in node.names)
    for name, home in flashpack._HOME_OF.items():
        assert homes.get(name) == home, name
    assert homes.keys() >= flashpack._SUBMODULES
    assert set(flashpack.__all__) <= homes.keys() | {"__implementation__"}


def test_the_install_leaves_one_distribution_and_no_file_of_an_older_one():
    installed = [found for found in distributions() if found.metadata["Name"] == "flashpack"]
    assert len(installed) == 1
    own = {os.fspath(file.locate()) for file in installed[0].files or ()}
    folder = Path(os.fspath(installed[0].locate_file("flashpack")))
    here = {os.fspath(file) for file in folder.rglob("*") if file.is_file() and file.suffix != ".pyc"}
    assert os.fspath(folder / "cli.py") in own
    assert here - own == set()


def test_version_is_that_of_the_distribution():
    assert flashpack.__version__ == flashpack.version == version("flashpack")
    assert ".".join(map(str, flashpack.version_tuple)) == flashpack.__version__


def test_the_mixin_module_offers_assign_from_file_where_diffusers_looks_for_it():
    assert importlib.import_module("flashpack.mixin").assign_from_file is flashpack.assign_from_file


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("pack_to_file", "state_dict_or_model destination_path target_dtype name_order align_bytes silent num_workers"),
        ("read_flashpack_file", "path device chunk_bytes num_streams silent metadata"),
        ("iterate_from_flash_tensor", "flash_tensor metadata ignore_names ignore_prefixes ignore_suffixes"),
        ("revert_from_file", "path silent"),
        (
            "assign_from_file",
            "model path device strict strict_params strict_buffers keep_flash_ref_on_model silent num_streams "
            "chunk_bytes ignore_names ignore_prefixes ignore_suffixes use_distributed_loading distributed_sharded "
            "distributed_shard_strategy rank local_rank world_size coerce_dtype",
        ),
    ],
)
def test_arguments_come_in_the_order_that_positional_callers_rely_on(function, arguments):
    expected = arguments.split()
    assert list(inspect.signature(getattr(flashpack, function)).parameters)[: len(expected)] == expected


def test_errors_are_value_errors_and_survive_pickling():
    error = pickle.loads(pickle.dumps(flashpack.FlashPackError("why")))
    assert type(error) is flashpack.FlashPackError
    assert type(error).__module__ == "flashpack"
    assert isinstance(error, ValueError)
    assert not isinstance(error, OSError)


def test_handles_refuse_to_be_pickled_or_copied(tmp_path):
    writer = _native.Writer(_engine.engine(), tmp_path / "a", 0)
    for handle in (_engine.engine(), writer):
        with pytest.raises(TypeError, match="cannot pickle or copy"):
            pickle.dumps(handle)
        with pytest.raises(TypeError, match="cannot pickle or copy"):
            copy.copy(handle)
    writer.abort()


def test_one_engine_serves_the_process():
    assert _engine.engine() is _engine.engine()


def test_a_forked_child_makes_an_engine_of_its_own_and_the_parents_goes_on(pack):
    # Small: torch itself may not use its thread pool in a forked child.
    source = {"a": torch.arange(1000)}
    path = pack(source)
    flashpack.revert_from_file(path)
    inherited = _engine.engine()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            mine = _engine.engine()
            loaded = flashpack.revert_from_file(path)
            flashpack.pack_to_file(loaded, str(path) + ".child")
            os._exit(0 if mine is not inherited and torch.equal(loaded["a"], source["a"]) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert _engine.engine() is inherited
    assert torch.equal(flashpack.revert_from_file(path)["a"], source["a"])
    assert torch.equal(flashpack.revert_from_file(str(path) + ".child")["a"], source["a"])


def test_an_inherited_engine_refuses_use_in_the_child(pack):
    path = pack({"a": torch.arange(1000)})
    engine = _engine.engine()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            with open_checkpoint(path) as checkpoint:
                engine.load(checkpoint.native, [])
        except RuntimeError:
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_text_files_are_opened_with_an_encoding_so_that_no_locale_decides_and_python_does_not_warn():
    openers = ("open", "fdopen", "read_text", "write_text")
    without = []
    for source in Path(flashpack.__file__).parent.rglob("*.py"):
        for call in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and "encoding" not in {keyword.arg for keyword in call.keywords}:
                function = ast.unparse(call.func)
                is_binary = any(isinstance(each, ast.Constant) and each.value in ("rb", "wb") for each in call.args)
                if function.split(".")[-1] in openers and function not in ("os.open", "archive.open") and not is_binary:
                    without.append(f"{source.name}:{call.lineno}: {function}")
    assert without == []
