from __future__ import annotations

import copy
import json

import flashpack
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import bits, random_tensor

transformers = pytest.importorskip("transformers")

from flashpack.integrations.transformers import _load  # noqa: E402
from transformers_models import (  # noqa: E402
    MODELS,
    TEXT,
    assert_same_model,
    assert_same_outputs,
    checkpoint,
    edit_config,
    load,
    make,
    repack,
    save,
    tensors_of,
    ties_of,
)

OLD = int(transformers.__version__.split(".")[0]) < 5
LENIENT = {"strict": False}


@pytest.fixture(autouse=True, scope="module")
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_the_same_to_the_last_bit(name, tmp_path):
    model = make(name)
    loaded = load(type(model), save(model, tmp_path))
    assert_same_model(loaded, model)
    assert_same_outputs(name, loaded, model)
    assert not any(module.training for module in loaded.modules())
    assert type(loaded).__name__ == f"FlashPack{type(model).__name__}"
    assert isinstance(loaded, type(model))
    assert loaded.name_or_path == loaded.config.name_or_path == str(tmp_path)


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "mixtral", "clip"])
def test_names_of_a_checkpoint_are_taken_as_well_as_those_of_the_module(name, tmp_path):
    model = make(name)
    loaded = load(type(model), checkpoint(model, tmp_path))
    assert_same_model(loaded, model)
    assert_same_outputs(name, loaded, model)
    assert loaded.name_or_path == str(tmp_path)


@pytest.mark.parametrize("write", [save, checkpoint])
def test_a_file_that_is_replaced_while_it_is_loaded_is_loaded_to_its_end(write, tmp_path, after_the_footer):
    model = make("bert")
    path = write(model, tmp_path / "model")
    other = write(make("bert").apply(lambda module: [p.data.zero_() for p in module.parameters()]), tmp_path / "other")
    after_the_footer(lambda: (other / "model.flashpack").replace(path / "model.flashpack"))
    assert_same_model(load(type(model), path), model)


def test_only_what_differs_in_names_goes_through_the_loader_of_transformers(tmp_path, monkeypatch):
    model = make("bert")
    save(model, tmp_path)

    def refuse(*args, **kwargs):
        raise InterruptedError

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", refuse)
    load(type(model), tmp_path)
    with pytest.raises(InterruptedError):
        load(transformers.BertModel, tmp_path)


@pytest.mark.skipif(OLD, reason="transformers converts checkpoints from version 5 on")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_are_turned_only_where_the_file_has_them_as_checkpoints_do(dtype, tmp_path):
    # For this one transformers transposes tensors of checkpoints without renaming them.
    text = TEXT | {"num_key_value_heads": 1, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 12}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4}
    vision |= {"out_hidden_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    model = transformers.Qwen3VLMoeForConditionalGeneration(config).eval()
    experts = [name for name in tensors_of(model) if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    for name in experts:
        model.get_parameter(name).data = model.get_parameter(name).data.to(dtype)
    assert_same_model(load(type(model), save(model, tmp_path)), model)

    repack(tmp_path, lambda tensors: tensors.update((name, tensors[name].transpose(1, 2)) for name in experts))
    assert_same_model(load(type(model), tmp_path), model.float())


def test_a_model_of_several_dtypes_keeps_each(tmp_path):
    model = make("bert").to(torch.bfloat16)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.float()
    save(model, tmp_path)
    edit_config(tmp_path, dtype="float32")
    for change in (lambda tensors: None), (lambda tensors: tensors.update(extra=torch.ones(1))):
        repack(tmp_path, change)
        loaded = load(type(model), tmp_path, strict=False)
        assert_same_model(loaded, model)
        assert loaded.config.dtype is torch.bfloat16


@pytest.mark.skipif(OLD, reason="transformers adds and removes the name of the base model from version 5 on")
def test_a_model_of_several_dtypes_keeps_each_under_other_names(tmp_path, monkeypatch):
    monkeypatch.setattr(_load, "_READ_TOGETHER", 2)
    model = make("bert").to(torch.bfloat16)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.float()
    save(model, tmp_path / "head")
    save(model.bert, tmp_path / "base")
    loaded = load(type(model), tmp_path / "base", strict=False)
    assert_same_model(loaded.bert, model.bert)
    loaded = load(type(model.bert), tmp_path / "head", strict=False, add_pooling_layer=False)
    assert_same_model(loaded, model.bert)


def test_buffers_of_a_dtype_of_their_own_keep_it(tmp_path):
    model = make("resnet").to(torch.bfloat16)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.float()
    assert_same_model(load(type(model), save(model, tmp_path)), model)


def test_what_the_file_lost_of_several_dtypes_is_not_made_up(tmp_path):
    model = make("t5")
    save(model, tmp_path, target_dtype=torch.float16)
    for change, options in (lambda tensors: None, {}), (lambda tensors: tensors.update(extra=torch.ones(1)), LENIENT):
        repack(tmp_path, change)
        loaded = load(type(model), tmp_path, **options)
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float16"
    assert model.dtype is torch.float32
    assert model.config.dtype is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, "bfloat16", "torch.float16"])
@pytest.mark.parametrize("name", ["t5", "llama", "resnet", "deepseek", "gptj"])
def test_a_dtype_that_is_asked_for_is_applied_as_transformers_does(name, dtype, tmp_path):
    model = OF_DTYPES[name]() if name in OF_DTYPES else make(name)
    model.save_pretrained(tmp_path)
    expected = type(model).from_pretrained(tmp_path, dtype=str(dtype).removeprefix("torch."))
    save(model, tmp_path)
    assert_same_model(load(type(model), tmp_path, dtype=dtype), expected)
    assert_same_model(load(type(model), tmp_path, torch_dtype=dtype), expected)


def make_deepseek():
    """With a bias that is float32 whatever the model is loaded as."""
    config = transformers.DeepseekV3Config(
        **TEXT | {"num_key_value_heads": 2, "moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 1},
        topk_group=1,
        num_experts_per_tok=2,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        first_k_dense_replace=1,
    )
    return transformers.DeepseekV3ForCausalLM(config).eval()


def make_gptj():
    """Its table of positions is not computed in the dtype that the model is loaded as."""
    config = transformers.GPTJConfig(vocab_size=64, n_embd=16, n_layer=1, n_head=2, rotary_dim=4)
    return transformers.GPTJForCausalLM(config).eval()


OF_DTYPES = {"deepseek": make_deepseek, "gptj": make_gptj}


class Tabled(transformers.BertModel):
    _keep_in_fp32_modules_strict = ("pooler",)

    def __init__(self, config):
        super().__init__(config)
        self.pooler.register_buffer("table", torch.ones(3), persistent=False)
        self.post_init()


def test_what_stays_float32_is_what_files_have(tmp_path):
    model = Tabled(transformers.BertConfig(**TEXT)).eval()
    model.save_pretrained(tmp_path)
    expected = Tabled.from_pretrained(tmp_path, dtype=torch.bfloat16)
    loaded = load(Tabled, save(model, tmp_path), dtype=torch.bfloat16)
    assert loaded.pooler.table.dtype is expected.pooler.table.dtype is torch.bfloat16
    assert loaded.pooler.dense.weight.dtype is expected.pooler.dense.weight.dtype is torch.float32


def test_a_file_without_the_usual_dtypes_is_loaded_as_it_is(tmp_path):
    model = make("bert")
    save(model, tmp_path, target_dtype=torch.float8_e4m3fn)
    assert load(type(model), tmp_path).dtype is torch.float8_e4m3fn
    assert load(type(model), tmp_path, dtype=torch.bfloat16).dtype is torch.bfloat16


def test_auto_is_the_dtype_of_the_file_and_nonsense_is_refused(tmp_path):
    model = make("bert").to(torch.bfloat16)
    save(model, tmp_path)
    edit_config(tmp_path, dtype="float32")
    assert_same_model(load(type(model), tmp_path, dtype="auto"), model)
    for nonsense in "nonsense", {"text_config": torch.float16}:
        with pytest.raises(ValueError, match="dtype"):
            load(type(model), tmp_path, dtype=nonsense)


def test_coerce_dtype_gives_all_the_main_dtype(tmp_path):
    model = make("resnet").to(torch.bfloat16)
    model.classifier.float()
    model.resnet.embedder.embedder.normalization.float()
    save(model, tmp_path)
    for change, options in (lambda tensors: None, {}), (lambda tensors: tensors.update(extra=torch.ones(1)), LENIENT):
        repack(tmp_path, change)
        loaded = load(type(model), tmp_path, coerce_dtype=True, **options)
        assert {t.dtype for t in loaded.state_dict().values()} == {torch.bfloat16, torch.int64}


@pytest.mark.parametrize(
    "options",
    [
        {"device": "cpu"},
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}},
        {"device_map": {"bert": "cpu", "cls": torch.device("cpu")}},
        {"device_map": "auto"},
        {"device_map": "balanced"},
        {"device_map": "sequential"},
        {"device_map": "auto", "device": "cpu"},
    ],
    ids=str,
)
def test_one_device_may_be_named_in_any_way(options, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "device" in options)
    model = make("bert")
    assert_same_model(load(type(model), save(model, tmp_path), **options), model)


@pytest.mark.parametrize("lost", [None, "cls.predictions.bias"])
def test_a_model_that_is_split_over_gpus_is_loaded_and_left_to_accelerate(lost, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr("accelerate.dispatch_model", lambda model, **options: given.append(options) or model)
    model = make("bert")
    save(model, tmp_path)
    repack(tmp_path, lambda tensors: tensors.pop(lost, None))
    device_map = {"bert": 0, "cls": "cuda:1"}
    assert_same_model(load(type(model), tmp_path, device_map=device_map), model)
    assert [options["device_map"] for options in given] == [device_map]
    assert "skip_keys" in given[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": "nonsense"}, "'nonsense' is not a device"),
        ({"device_map": {"": 10**30}}, "0 is not a device"),
        ({"device_map": {"bert": "cuda:0", "cls": "cpu"}}, "must be of one kind"),
        ({"device_map": {"bert": "cpu", "cls": "disk"}}, "To offload a part of the model"),
        ({"device_map": "cpu", "device": "cuda"}, "contradict"),
        ({"tp_plan": "auto", "gguf_file": "x"}, "tp_plan, gguf_file cannot be used"),
        ({"adapter_kwargs": {"_adapter_model_path": "x"}}, "an adapter"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(options, message, tmp_path):
    model = make("bert")
    save(model, tmp_path)
    with pytest.raises(flashpack.FlashPackError, match=message):
        load(type(model), tmp_path, **options)


@pytest.mark.skipif(OLD, reason="transformers needs real tensors before version 5")
def test_transformers_may_reserve_memory_of_a_device_before_anything_is_read_to_it(tmp_path, monkeypatch):
    asked = {}

    def from_pretrained(path, **options):
        asked.update(options)
        for value in options["state_dict"].values() if "device_map" not in options else ():
            assert bits(value[...]) == bits(value[...])
        raise InterruptedError

    save(make("bert"), tmp_path)
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", from_pretrained)
    with pytest.raises(InterruptedError):
        load(transformers.BertModel, tmp_path, device="cuda:0")
    assert asked["device_map"] == {"": torch.device("cuda:0")}
    assert not any(isinstance(value, torch.Tensor) for value in asked["state_dict"].values())
    with pytest.raises(InterruptedError):
        load(transformers.BertModel, tmp_path)


@pytest.mark.parametrize("given", [True, False])
def test_quantised_models_are_for_the_loader_of_transformers(given, tmp_path, monkeypatch):
    def from_pretrained(path, **options):
        assert ("quantization_config" in options) == given
        raise InterruptedError

    model = make("bert")
    save(model, tmp_path)
    quantised = {"quantization_config": {"quant_method": "fp8"}}
    if not given:
        edit_config(tmp_path, **quantised)
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", from_pretrained)
    with pytest.raises(InterruptedError):
        load(type(model), tmp_path, **(quantised if given else {}))


@pytest.mark.skipif(_load._OLD, reason="transformers 4 has no such quantiser")
def test_a_quantised_model_is_the_same_as_from_safetensors(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    tensors = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        quantised = ".layers." in name and tensor.dim() == 2
        tensors[name] = tensor.to(torch.float8_e4m3fn) if quantised else tensor
        if quantised:
            blocks = [size // 128 for size in tensor.shape]
            tensors[f"{name}_scale_inv"] = random_tensor(tuple(blocks), torch.float32)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "dequantize": True}
    edit_config(tmp_path, quantization_config=fp8)
    expected = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    flashpack.save_file(tensors, tmp_path / "model.flashpack")
    got = load(transformers.LlamaForCausalLM, tmp_path, dtype=torch.float32).state_dict()
    assert {name: bits(tensor) for name, tensor in got.items()} == {n: bits(t) for n, t in expected.items()}


def test_a_configuration_that_is_given_is_used_and_left_alone(tmp_path):
    model = make("bert")
    save(model, tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path, attn_implementation="eager", layer_norm_eps=0.5)
    before = copy.deepcopy(config)
    loaded = load(type(model), tmp_path, config=config, dtype=torch.bfloat16)
    assert loaded.config._attn_implementation == "eager"
    assert loaded.config.layer_norm_eps == 0.5
    assert config.to_dict() == before.to_dict()


def test_entries_of_the_configuration_and_arguments_of_transformers_are_not_dropped(tmp_path):
    model = make("bert")
    save(model, tmp_path)
    loaded = load(
        type(model),
        tmp_path,
        layer_norm_eps=0.5,
        attn_implementation="eager",
        trust_remote_code=True,
        _from_auto=True,
        from_tf=False,
        from_flax=False,
        mirror="somewhere",
    )
    assert loaded.config.layer_norm_eps == 0.5
    assert loaded.config._attn_implementation == "eager"
    with pytest.raises(TypeError, match="nonsense"):
        load(type(model), tmp_path, nonsense=1)


def test_the_configuration_of_generation_is_saved_and_read(tmp_path):
    model = make("gpt2")
    model.generation_config.max_new_tokens = 7
    save(model, tmp_path)
    assert load(type(model), tmp_path).generation_config.max_new_tokens == 7
    other = transformers.GenerationConfig(max_new_tokens=9)
    loaded = load(type(model), tmp_path, generation_config=other)
    assert loaded.generation_config.max_new_tokens == 9
    assert loaded.generation_config is not other
    (tmp_path / "generation_config.json").unlink()
    assert load(type(model), tmp_path).generation_config.max_new_tokens is None
    edit_config(tmp_path, max_length=99, num_beams=3)
    loaded = load(type(model), tmp_path).generation_config
    assert (loaded.max_length, loaded.num_beams) == (99, 3)


@pytest.mark.parametrize("lost", [None, "lm_head.weight", "transformer.wte.weight"])
def test_tied_weights_are_one_tensor_whichever_of_their_names_the_file_has(lost, tmp_path):
    model = make("gpt2")
    save(model, tmp_path)
    repack(tmp_path, lambda tensors: tensors.pop(lost, None))
    loaded = load(type(model), tmp_path)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert_same_model(loaded, model)
    assert ties_of(loaded)


@pytest.mark.skipif(OLD, reason="transformers compares what is tied from version 5 on")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_weights_that_the_configuration_calls_tied_but_differ_are_not(dtype, tmp_path):
    model = make("gpt2")
    save(model, tmp_path)
    repack(tmp_path, lambda tensors: tensors["lm_head.weight"].add_(1))
    loaded = load(type(model), tmp_path, dtype=dtype)
    assert not ties_of(loaded)
    assert not loaded.all_tied_weights_keys
    model.transformer.wte.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    model.lm_head.weight.data.add_(1)
    assert_same_model(loaded, model.to(dtype))


def test_a_model_that_was_untied_stays_untied(tmp_path):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(tie_word_embeddings=False, **TEXT)).eval()
    loaded = load(type(model), save(model, tmp_path))
    assert not ties_of(loaded)
    assert_same_model(loaded, model)


def test_names_that_the_model_lacks_are_an_error_unless_not_strict(tmp_path):
    model = make("bert")
    save(model, tmp_path)
    repack(tmp_path, lambda tensors: tensors.update(extra=torch.ones(2)))
    with pytest.raises(flashpack.FlashPackError, match=r"Could not assign 1 names: \['extra'\]"):
        load(type(model), tmp_path)
    assert_same_model(load(type(model), tmp_path, strict=False), model)
    assert_same_model(load(type(model), tmp_path, ignore_names=["extra"]), model)


def test_parameters_that_the_file_lacks_are_an_error_or_initialised(tmp_path):
    model = make("bert")
    save(model, tmp_path)
    lost = "bert.encoder.layer.0.output.dense.bias"
    repack(tmp_path, lambda tensors: tensors.pop(lost))
    with pytest.raises(flashpack.FlashPackError, match=f"Missing 1 parameters: .*{lost}"):
        load(type(model), tmp_path)
    loaded, info = load(type(model), tmp_path, strict_params=False, output_loading_info=True)
    assert set(info["missing_keys"]) == {lost}
    assert bits(tensors_of(loaded)[lost]) == bytes(64)
    model.get_parameter(lost).data.zero_()
    assert_same_model(loaded, model)


def test_ignored_parameters_are_initialised(tmp_path):
    model = make("bert")
    save(model, tmp_path)
    lost = "bert.encoder.layer.0.output.dense.bias"
    for ignored in (
        {"ignore_names": [lost]},
        {"ignore_suffixes": ["r.0.output.dense.bias"]},
        {"ignore_prefixes": [lost]},
    ):
        loaded = load(type(model), tmp_path, **ignored)
        assert bits(loaded.get_parameter(lost)) == bytes(64)


def test_buffers_that_the_file_lacks_are_an_error_only_where_buffers_are_strict(tmp_path):
    model = make("resnet")
    save(model, tmp_path)
    lost = "resnet.embedder.embedder.normalization.num_batches_tracked"
    repack(tmp_path, lambda tensors: tensors.pop(lost))
    assert_same_model(load(type(model), tmp_path), model)
    for strict in {"strict": True}, {"strict_buffers": True}:
        with pytest.raises(flashpack.FlashPackError, match=f"Missing 1 buffers: .*{lost}"):
            load(type(model), tmp_path, **strict)


def test_a_shape_that_does_not_fit_is_an_error_unless_transformers_is_told_to_bear_it(tmp_path):
    model = make("bert")
    save(model, tmp_path)
    with pytest.raises(flashpack.FlashPackError, match=r"shape mismatch for '.*': model=\[.*5.*\] vs flash=\[.*2.*\]"):
        load(type(model), tmp_path, type_vocab_size=5)
    loaded = load(type(model), tmp_path, type_vocab_size=5, ignore_mismatched_sizes=True)
    assert loaded.bert.embeddings.token_type_embeddings.weight.shape[0] == 5


def test_a_loaded_model_trains_and_takes_a_state_dict(tmp_path):
    model = make("gpt2")
    loaded = load(type(model), save(model, tmp_path), mmap=True)
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
    tokens = torch.arange(8)[None]
    loaded(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    loaded.load_state_dict(model.state_dict())
    assert_same_model(loaded, model)


@pytest.mark.parametrize(("rule", "name"), [("names", "extra.a"), ("prefixes", "extra"), ("suffixes", ".a")])
def test_attributes_of_the_class_are_defaults_that_arguments_override(rule, name, tmp_path, monkeypatch):
    model = make("bert")
    save(model, tmp_path)
    repack(tmp_path, lambda tensors: tensors.update({"extra.a": torch.ones(3)}))
    with pytest.raises(flashpack.FlashPackError, match="extra"):
        load(type(model), tmp_path)
    monkeypatch.setattr(flashpack.FlashPackMixin, f"flashpack_ignore_{rule}", [name])
    assert_same_model(load(type(model), tmp_path), model)
    with pytest.raises(flashpack.FlashPackError, match="extra"):
        load(type(model), tmp_path, **{f"ignore_{rule}": []})
