from __future__ import annotations

import copy
import inspect
import json
import pickle

import flashpack
import pytest
import torch

transformers = pytest.importorskip("transformers")

from flashpack._hub import Upload  # noqa: E402
from flashpack.integrations.transformers import FlashPackTransformersModelMixin  # noqa: E402
from hub_cache import make_hub_cache  # noqa: E402
from support import assert_bit_equal  # noqa: E402
from transformers_models import TEXT, assert_same_model, checkpoint, load, make, save, with_mixin  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def test_models_and_their_classes_can_be_pickled_and_copied(tmp_path):
    model = make("bert")
    loaded = load(type(model), save(model, tmp_path))
    for again in pickle.loads(pickle.dumps(loaded)), copy.deepcopy(loaded):
        assert type(again) is type(loaded)
        assert_same_model(again, model)
    assert pickle.loads(pickle.dumps(type(loaded))) is type(loaded)


@pytest.mark.parametrize("name", ["bert", "mixtral"])
def test_a_reference_to_the_file_is_kept_where_asked_for(name, tmp_path):
    model = make(name)
    for directory in save(model, tmp_path / "module"), checkpoint(model, tmp_path / "checkpoint"):
        assert not hasattr(load(type(model), directory), "_flash_shared_storage")
        loaded = load(type(model), directory, keep_flash_ref_on_model=True)
        assert len(loaded._flash_shared_storage) == 1
        assert loaded._flash_shared_storage_meta["index"]
        assert_same_model(loaded, model)


class FlashPackTiny(transformers.BertForMaskedLM, FlashPackTransformersModelMixin):
    def __init__(self, config):
        super().__init__(config)
        self.more = torch.nn.Linear(2, 2)
        self.post_init()


def test_a_class_of_ones_own_may_have_the_mixin(tmp_path):
    model = FlashPackTiny(transformers.BertConfig(**TEXT)).eval()
    model.save_pretrained_flashpack(tmp_path)
    loaded = FlashPackTiny.from_pretrained_flashpack(tmp_path)
    assert type(loaded) is FlashPackTiny
    assert_same_model(loaded, model)
    from_file = FlashPackTiny.from_flashpack(tmp_path / "model.flashpack", model.config, silent=True)
    assert_same_model(from_file, model)


def test_transformers_builds_the_class_whose_name_it_knows(tmp_path, monkeypatch):
    model = make("bert")
    save(model, tmp_path)
    seen = []
    build = transformers.PreTrainedModel._from_config.__func__

    def record(cls, *args, **kwargs):
        seen.append(cls)
        return build(cls, *args, **kwargs)

    monkeypatch.setattr(transformers.PreTrainedModel, "_from_config", classmethod(record))
    load(type(model), tmp_path)
    assert seen == [transformers.BertForMaskedLM]


def test_config_json_names_the_original_class(tmp_path):
    model = make("bert")
    save(model, tmp_path / "flashpack")
    loaded = load(type(model), tmp_path / "flashpack")
    loaded.save_pretrained(tmp_path / "plain")
    for directory in "flashpack", "plain":
        config = json.loads((tmp_path / directory / "config.json").read_text())
        assert config["architectures"] == ["BertForMaskedLM"]
    assert type(loaded).__name__ == "FlashPackBertForMaskedLM"
    assert_same_model(type(model).from_pretrained(tmp_path / "plain"), model)


def test_processes_other_than_the_main_one_write_nothing(tmp_path):
    save(make("bert"), tmp_path, is_main_process=False, push_to_hub=True)
    assert not list(tmp_path.iterdir())


def test_saving_needs_a_directory_and_tells_what_it_does_not_take(tmp_path, caplog):
    model = make("bert")
    model.__class__ = with_mixin(type(model))
    with pytest.raises(ValueError, match="is not a directory"):
        model.save_pretrained_flashpack(tmp_path / "missing")
    model.save_pretrained_flashpack(tmp_path, max_shard_size="5GB")
    assert "max_shard_size" in caplog.text


def test_a_save_that_fails_leaves_the_old_files(tmp_path):
    save(make("bert"), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = make("gpt2").to("meta")
    with pytest.raises(flashpack.FlashPackError, match="meta device"):
        save(other, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_directory_without_a_flashpack_file_is_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Flashpack file .*model\.flashpack not found"):
        load(transformers.BertModel, tmp_path)


def test_a_subfolder_has_its_own_configuration(tmp_path):
    model = make("gpt2")
    model.generation_config.max_new_tokens = 7
    save(model, tmp_path / "part")
    loaded = load(type(model), tmp_path, subfolder="part")
    assert_same_model(loaded, model)
    assert loaded.generation_config.max_new_tokens == 7


def test_a_repository_that_was_downloaded_is_loaded_whatever_arguments_of_old_hubs_are_given(tmp_path, recwarn):
    model = make("bert")
    save(model, tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    cache = make_hub_cache(tmp_path / "cache", files)
    loaded = load(
        type(model), "x/y", cache_dir=cache, local_files_only=True, proxies={"https": "p"}, local_dir_use_symlinks=True
    )
    assert_same_model(loaded, model)
    assert loaded.name_or_path == "x/y"
    assert not recwarn.list


def test_pushing_uploads_the_files_that_were_saved_under_the_name_of_the_directory(tmp_path, monkeypatch):
    calls = []
    module = inspect.getmodule(FlashPackTransformersModelMixin.save_pretrained_flashpack)
    monkeypatch.setattr(module, "upload_directory", lambda *args: calls.append(args))
    save(make("gpt2"), tmp_path / "mine", push_to_hub=True, token="t", private=True, create_pr=True, commit_message="m")
    save(make("gpt2"), tmp_path / "mine", push_to_hub=True, repo_id="x/y")
    ((directory, upload, patterns), (_, other, _)) = calls
    assert directory == tmp_path / "mine"
    assert upload == Upload(None, token="t", private=True, create_pr=True, commit_message="m")
    assert other.repo_id == "x/y"
    assert set(patterns) >= {path.name for path in (tmp_path / "mine").iterdir()}


def test_arguments_and_their_defaults_are_those_that_callers_rely_on():
    parameters = inspect.signature(FlashPackTransformersModelMixin.from_pretrained_flashpack).parameters
    assert " ".join(list(parameters)[:29]) == (
        "pretrained_model_name_or_path device silent strict strict_params strict_buffers keep_flash_ref_on_model "
        "num_streams chunk_bytes ignore_names ignore_prefixes ignore_suffixes subfolder revision local_dir "
        "local_dir_use_symlinks local_files_only cache_dir token force_download proxies use_distributed_loading "
        "distributed_sharded distributed_shard_strategy rank local_rank world_size coerce_dtype mmap"
    )
    changed = {name: p.default for name, p in parameters.items() if p.default not in (None, False, p.empty)}
    assert changed == {
        "silent": True,
        "strict_params": True,
        "num_streams": 4,
        "chunk_bytes": 4 << 20,
        "verify": "auto",
    }
    saving = inspect.signature(FlashPackTransformersModelMixin.save_pretrained_flashpack).parameters
    assert {name: p.default for name, p in saving.items() if p.default not in (None, False, p.empty)} == {
        "is_main_process": True,
        "align_bytes": 128,
        "silent": True,
        "num_workers": 32,
        "checksum": True,
    }


def test_a_target_dtype_leaves_counters_so_that_the_model_loads(tmp_path):
    model = make("resnet")
    counters = {name: buffer for name, buffer in model.named_buffers() if not buffer.is_floating_point()}
    for counter in counters.values():
        counter += 1_000_001
    loaded = load(type(model), save(model, tmp_path, target_dtype=torch.bfloat16))
    assert counters
    assert_bit_equal({name: dict(loaded.named_buffers())[name] for name in counters}, counters)
    assert loaded.dtype is torch.bfloat16
