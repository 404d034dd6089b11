from __future__ import annotations

import json
import logging
import os
import pickle
import re
import subprocess
import sys

import flashpack
import pytest
import safetensors.torch
import torch

# In this order, so that the classes exist before they are patched; the other order has a process of its own below.
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
AutoModel, AutoModelForCausalLM = transformers.AutoModel, transformers.AutoModelForCausalLM

from flashpack.commands import convert_to_flashpack  # noqa: E402
from flashpack.integrations.transformers import patch_transformers_auto_model  # noqa: E402
from transformers.models.auto.auto_factory import _BaseAutoModelClass  # noqa: E402
from transformers_models import IMAGE, TEXT, assert_same_model, assert_same_outputs, checkpoint, load, make  # noqa: E402

since_5 = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="transformers 4 has other names for modules of Qwen2-VL"
)
LENT = ("save_flashpack", "save_pretrained_flashpack", "from_pretrained_flashpack")


@pytest.fixture(autouse=True, scope="module")
def patched():
    transformers.logging.set_verbosity_error()
    patch_transformers_auto_model()
    yield
    for name in LENT:
        delattr(transformers.PreTrainedModel, name)


@pytest.fixture
def saved(tmp_path):
    """A directory with a GPT-2, and the model."""
    model = AutoModelForCausalLM.from_config(make("gpt2").config).eval()
    model.save_pretrained_flashpack(tmp_path)
    return tmp_path, model


def test_use_flashpack_reads_the_flashpack_file(saved):
    directory, model = saved
    assert not list(directory.glob("*.safetensors"))
    for loads in (
        lambda: AutoModelForCausalLM.from_pretrained(directory, use_flashpack=True),
        lambda: AutoModelForCausalLM.from_pretrained_flashpack(directory),
        lambda: AutoModelForCausalLM.from_pretrained_flashpack(directory, "cpu", strict=True),
        lambda: transformers.GPT2LMHeadModel.from_pretrained(directory, use_flashpack=True),
        lambda: transformers.GPT2LMHeadModel.from_pretrained_flashpack(directory),
    ):
        loaded = loads()
        assert type(loaded) is transformers.GPT2LMHeadModel
        assert_same_model(loaded, model)
        assert_same_outputs("gpt2", loaded, model)


def test_models_from_safetensors_keep_their_class_and_can_be_saved_as_flashpack_files(saved, tmp_path):
    _, model = saved
    model.save_pretrained(tmp_path / "plain")
    whole, info = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not info["missing_keys"]
    by_class = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "plain")
    for at, loaded in enumerate([AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), whole, by_class]):
        assert type(loaded) is transformers.GPT2LMHeadModel
        assert_same_model(loaded, model)
        (tmp_path / f"{at}").mkdir()
        loaded.save_pretrained_flashpack(tmp_path / f"{at}")
        assert_same_model(AutoModelForCausalLM.from_pretrained_flashpack(tmp_path / f"{at}"), model)
    whole.save_flashpack(tmp_path / "file", silent=True)
    assert flashpack.load_file(tmp_path / "file").keys() == model.state_dict().keys()
    with pytest.raises(FileNotFoundError, match=r"Flashpack file .* not found"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "plain", use_flashpack=True)


@pytest.fixture
def logged():
    """What transformers logs."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    yield records
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_pipelines_of_transformers_take_the_models_for_what_they_are(saved, tmp_path, logged):
    directory, model = saved
    model.save_pretrained(tmp_path / "plain")
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w2")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words), pad_token="w2")
    tokenizer.save_pretrained(tmp_path / "plain")
    for source in (
        str(tmp_path / "plain"),
        model,
        AutoModelForCausalLM.from_pretrained(tmp_path / "plain"),
        AutoModelForCausalLM.from_pretrained(directory, use_flashpack=True),
    ):
        pipeline = transformers.pipeline("text-generation", model=source, tokenizer=tokenizer)
        assert type(pipeline.model) is transformers.GPT2LMHeadModel
    assert [record.getMessage() for record in logged if record.levelno >= logging.ERROR] == []


def test_arguments_reach_the_model_through_the_auto_class(saved):
    directory, _ = saved
    loaded, info = AutoModelForCausalLM.from_pretrained(
        directory,
        use_flashpack=True,
        dtype=torch.bfloat16,
        device_map={"": "cpu"},
        attn_implementation="eager",
        attn_pdrop=0.5,
        output_loading_info=True,
    )
    assert loaded.dtype is torch.bfloat16
    assert loaded.config._attn_implementation == "eager"
    assert loaded.config.attn_pdrop == 0.5
    assert info["unexpected_keys"] == set()
    config = transformers.AutoConfig.from_pretrained(directory, attn_pdrop=0.25)
    assert AutoModelForCausalLM.from_pretrained_flashpack(directory, config=config).config.attn_pdrop == 0.25


@pytest.mark.parametrize("auto", [AutoModel, transformers.AutoModelForSequenceClassification])
@pytest.mark.parametrize("packed", [lambda bert: bert, lambda bert: bert.bert], ids=["with a head", "without"])
def test_files_of_another_head_are_loaded_and_reported_as_from_safetensors(auto, packed, tmp_path, logged):
    checkpoint(packed(make("bert")), tmp_path)
    expected, theirs = auto.from_pretrained(tmp_path, output_loading_info=True)
    reported = [sorted(record.getMessage().splitlines()) for record in logged]
    logged.clear()
    loaded, ours = auto.from_pretrained(tmp_path, use_flashpack=True, output_loading_info=True)
    assert [sorted(record.getMessage().splitlines()) for record in logged] == reported
    assert str(tmp_path) in str(reported)
    assert {name: set(ours[name]) for name in ours} == {name: set(theirs[name]) for name in ours}
    state = loaded.state_dict()
    for name, tensor in expected.state_dict().items():
        assert not state[name].is_meta
        assert state[name].equal(tensor) == (name not in ours["missing_keys"] or not name.endswith("weight"))
    with pytest.raises(flashpack.FlashPackError, match=r"Could not assign|Missing"):
        auto.from_pretrained(tmp_path, use_flashpack=True, strict_params=True)


def make_qwen2_vl():
    """transformers takes names of its vision tower for those of an old checkpoint of its language model."""
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1]}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4}
    text = TEXT | {"num_key_value_heads": 1, "rope_scaling": rope}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2VLForConditionalGeneration(config).eval()


@since_5
@pytest.mark.parametrize("ignored", [[], ["model.visual.merger.ln_q.bias"]], ids=["all of it", "a part"])
def test_a_file_of_a_model_with_a_head_fills_the_model_without_one(ignored, tmp_path):
    whole = make_qwen2_vl()
    whole.save_pretrained_flashpack(tmp_path)
    loaded, info = AutoModel.from_pretrained(
        tmp_path, use_flashpack=True, output_loading_info=True, ignore_names=ignored
    )
    assert info["unexpected_keys"] == {"lm_head.weight"}
    assert info["missing_keys"] == {name.removeprefix("model.") for name in ignored}
    for name, tensor in whole.model.state_dict().items():
        if name not in info["missing_keys"]:
            assert loaded.state_dict()[name].equal(tensor), name


@since_5
def test_a_file_of_a_model_without_a_head_fills_the_model_with_one(tmp_path):
    base = make_qwen2_vl().model
    base.save_pretrained_flashpack(tmp_path)
    heads = transformers.Qwen2VLForConditionalGeneration
    loaded, info = heads.from_pretrained(tmp_path, use_flashpack=True, output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"}
    assert not info["unexpected_keys"]
    assert_same_model(loaded.model, base)


def test_a_file_with_more_layers_fills_the_model_that_has_fewer(tmp_path):
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=1, **TEXT)).eval()
    llama.save_pretrained_flashpack(tmp_path)
    loaded, info = AutoModel.from_pretrained(
        tmp_path, use_flashpack=True, num_hidden_layers=1, output_loading_info=True
    )
    assert {"lm_head.weight", "1"} == {re.sub(r".*layers\.(\d).*", r"\1", name) for name in info["unexpected_keys"]}
    state = llama.model.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert tensor.equal(state[name]), name


def test_names_to_ignore_are_those_in_the_file(tmp_path):
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=1, **TEXT)).eval()
    for part, ignored in ((llama.model, "model."), (llama, "layers.")):
        part.save_pretrained_flashpack(tmp_path)
        heads = transformers.LlamaForCausalLM if part is llama.model else AutoModel
        loaded = heads.from_pretrained(tmp_path, use_flashpack=True, ignore_prefixes=[ignored])
        state = (loaded.model if part is llama.model else loaded).state_dict()
        for name, tensor in llama.model.state_dict().items():
            assert state[name].equal(tensor), name


def test_a_head_of_another_size_is_an_error_unless_it_may_be_made_anew(tmp_path):
    config = make("bert").config
    config.num_labels = 5
    heads = transformers.AutoModelForSequenceClassification
    heads.from_config(config).save_pretrained_flashpack(tmp_path)
    with pytest.raises(flashpack.FlashPackError, match="shape mismatch for 'classifier"):
        heads.from_pretrained(tmp_path, use_flashpack=True, num_labels=3)
    loaded = heads.from_pretrained(tmp_path, use_flashpack=True, num_labels=3, ignore_mismatched_sizes=True)
    assert loaded.classifier.weight.shape == (3, config.hidden_size)


def test_the_class_may_change_but_what_transformers_knows_by_its_name_is_found(saved):
    directory, model = saved
    base = load(transformers.GPT2Model, directory, strict=False)
    assert len(base(input_ids=torch.arange(8)[None], output_hidden_states=True).hidden_states) == 3
    promoted = load(type(model), directory)
    assert type(promoted) is not type(model)
    assert promoted._get_name() == "GPT2LMHeadModel"

    class Mine(type(promoted)):
        pass

    assert str(Mine).endswith("Mine'>")
    assert Mine(model.config)._get_name() == "Mine"


def test_models_within_models_are_what_transformers_makes_of_them(saved, tmp_path):
    _, decoder = saved
    llava = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**IMAGE),
        text_config=transformers.LlamaConfig(num_key_value_heads=1, **TEXT),
        image_token_index=5,
    )
    model = transformers.LlavaForConditionalGeneration(llava).eval()
    assert type(model.model.vision_tower) is transformers.CLIPVisionModel
    model.save_pretrained(tmp_path / "new")
    tensors = safetensors.torch.load_file(tmp_path / "new" / "model.safetensors")
    old = {re.sub(r"(vision_tower\.)(?!vision_model)", r"\1vision_model.", name): t for name, t in tensors.items()}
    safetensors.torch.save_file(old, tmp_path / "new" / "model.safetensors", {"format": "pt"})
    assert_same_model(type(model).from_pretrained(tmp_path / "new"), model)

    encoder = AutoModel.from_config(transformers.ViTConfig(**IMAGE))
    whole = transformers.VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    assert type(whole.encoder) is transformers.ViTModel


def test_patching_again_changes_nothing():
    before = {cls: cls.__dict__["from_pretrained"] for cls in (_BaseAutoModelClass, AutoModel, AutoModelForCausalLM)}
    before[transformers.PreTrainedModel] = transformers.PreTrainedModel.__dict__["from_pretrained"]
    patch_transformers_auto_model()
    assert all(cls.__dict__["from_pretrained"] is method for cls, method in before.items())
    assert AutoModel.from_pretrained.__doc__


CONFIG_CODE = """
from transformers import PretrainedConfig


class HomemadeConfig(PretrainedConfig):
    model_type = "homemade"

    def __init__(self, width=4, **kwargs):
        super().__init__(**kwargs)
        self.width = width
"""
MODEL_CODE = """
import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from .configuring import HomemadeConfig


class HomemadeModel(PreTrainedModel):
    config_class = HomemadeConfig

    def __init__(self, config):
        super().__init__(config)
        self.linear = torch.nn.Linear(config.width, config.width)
        self.register_buffer("table", torch.arange(config.width) / config.width, persistent=False)
        self.post_init()

    def _init_weights(self, module):
        pass  # Forgets the table, as such code does.

    def forward(self, x):
        return BaseModelOutput(last_hidden_state=self.linear(x) + self.table)
"""


def test_models_with_code_of_their_own_take_it_along(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    source = tmp_path / "source"
    source.mkdir()
    (source / "configuring.py").write_text(CONFIG_CODE)
    (source / "modeling.py").write_text(MODEL_CODE)
    auto_map = {"AutoConfig": "configuring.HomemadeConfig", "AutoModel": "modeling.HomemadeModel"}
    (source / "config.json").write_text(json.dumps({"model_type": "homemade", "width": 6, "auto_map": auto_map}))

    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=True)
    model = AutoModel.from_config(config, trust_remote_code=True).eval()
    (tmp_path / "saved").mkdir()
    model.save_pretrained_flashpack(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert written["architectures"] == ["HomemadeModel"]
    assert {"configuring.py", "modeling.py"} <= {path.name for path in (tmp_path / "saved").iterdir()}

    loaded = AutoModel.from_pretrained(tmp_path / "saved", use_flashpack=True, trust_remote_code=True)
    assert_same_model(loaded, model)
    x = torch.linspace(-1, 1, 6)
    assert torch.equal(loaded(x).last_hidden_state, model(x).last_hidden_state)
    assert loaded.table.tolist() == (torch.arange(6) / 6).tolist()
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModel.from_pretrained(tmp_path / "saved", use_flashpack=True, trust_remote_code=False)


def test_nobody_is_asked_on_the_terminal_whether_code_of_a_repository_may_run(tmp_path, monkeypatch):
    asked = []  # What would be raised is caught.
    monkeypatch.setattr("builtins.input", lambda *args: asked.append(args) or "n")
    (tmp_path / "configuring.py").write_text(CONFIG_CODE)
    auto_map = {"AutoConfig": "configuring.HomemadeConfig", "AutoModel": "modeling.HomemadeModel"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "brought", "auto_map": auto_map}))
    tensors = {"linear.weight": torch.ones(6, 6)}
    flashpack.pack_to_file(tensors, tmp_path / "model.flashpack")
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for unsaid in ({}, {"trust_remote_code": None}):
        with pytest.raises(flashpack.FlashPackError, match="trust_remote_code"):
            AutoModel.from_pretrained(tmp_path, use_flashpack=True, **unsaid)
        with pytest.raises(flashpack.FlashPackError, match="trust_remote_code"):
            convert_to_flashpack(tmp_path, tmp_path / "out", use_transformers=True, **unsaid)
    assert asked == []


def test_patching_first_and_importing_the_classes_later_works_too(saved, tmp_path):
    directory, model = saved
    (tmp_path / "pickled").write_bytes(pickle.dumps(model))
    code = f"""
import pickle, sys
import flashpack.integrations
assert "transformers" not in sys.modules, "by the package"
from flashpack.integrations.transformers import patch_transformers_auto_model
patch_transformers_auto_model()
from transformers import AutoModelForCausalLM, GPT2LMHeadModel
loaded = AutoModelForCausalLM.from_pretrained({str(directory)!r}, use_flashpack=True)
with open({str(tmp_path / "pickled")!r}, "rb") as file:
    unpickled = pickle.load(file)
assert type(loaded) is type(unpickled) and isinstance(loaded, GPT2LMHeadModel)
state = unpickled.state_dict()
assert all(state[name].equal(tensor) for name, tensor in loaded.state_dict().items())
print("fine")
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    assert done.stdout == "fine\n"
