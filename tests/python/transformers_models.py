"""Tiny transformers models of random weights, and what to feed them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flashpack
import torch
import transformers as t
from flashpack.integrations._classes import promoted_class
from flashpack.integrations.transformers import FlashPackTransformersModelMixin
from safetensors.torch import load_file
from support import bits

TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
IMAGE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
SEQ2SEQ = {
    "vocab_size": 64,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}


def gpt2() -> t.PreTrainedModel:
    config = t.GPT2Config(
        vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1, pad_token_id=2
    )
    return t.GPT2LMHeadModel(config)


def clip() -> t.PreTrainedModel:
    return t.CLIPModel(t.CLIPConfig(text_config=TEXT | {"projection_dim": 8}, vision_config=IMAGE, projection_dim=8))


def whisper() -> t.PreTrainedModel:
    config = t.WhisperConfig(num_mel_bins=8, max_source_positions=8, max_target_positions=16, **SEQ2SEQ)
    return t.WhisperForConditionalGeneration(config)


def resnet() -> t.PreTrainedModel:
    config = t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    return t.ResNetForImageClassification(config)


MODELS: dict[str, Callable[[], t.PreTrainedModel]] = {
    "bert": lambda: t.BertForMaskedLM(t.BertConfig(**TEXT)),
    "gpt2": gpt2,
    "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(**T5)),
    "umt5_encoder": lambda: t.UMT5EncoderModel(t.UMT5Config(**T5)),
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(num_key_value_heads=1, **TEXT)),
    "clip": clip,
    "whisper": whisper,
    "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**IMAGE)),
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(num_key_value_heads=1, num_local_experts=4, **TEXT)),
    "bart": lambda: t.BartForConditionalGeneration(t.BartConfig(max_position_embeddings=32, **SEQ2SEQ)),
    "resnet": resnet,
}


def make(name: str) -> t.PreTrainedModel:
    """Every weight random, also those that are made as ones and zeros."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.rand_like(tensor) * 0.02)
    return model


def with_mixin(model_class: type) -> Any:
    return promoted_class(model_class, FlashPackTransformersModelMixin)


def outputs(name: str, model: t.PreTrainedModel) -> dict[str, torch.Tensor]:
    """What `model` makes of inputs that are always the same."""
    tokens = torch.arange(3, 11)[None]
    pixels = torch.linspace(-1, 1, 3 * 8 * 8).view(1, 3, 8, 8)
    inputs: dict[str, Any] = {"input_ids": tokens}
    if name in ("vit", "resnet"):
        inputs = {"pixel_values": pixels}
    elif name == "clip":
        inputs = {"input_ids": tokens, "pixel_values": pixels}
    elif name == "whisper":
        inputs = {"input_features": torch.linspace(-1, 1, 8 * 16).view(1, 8, 16), "decoder_input_ids": tokens}
    elif name in ("t5", "bart"):
        inputs = {"input_ids": tokens, "decoder_input_ids": tokens}
    with torch.no_grad():
        result = model(**inputs, use_cache=False) if model.can_generate() else model(**inputs)
    return {key: value for key, value in result.items() if isinstance(value, torch.Tensor)}


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All of them: also non-persistent buffers, and tied ones under each name."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def ties_of(model: torch.nn.Module) -> set[frozenset[str]]:
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    return {frozenset(group) for group in groups.values() if len(group) > 1}


def assert_same_model(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    """Names, dtypes, bits, ties and gradient flags."""
    mine, theirs = tensors_of(actual), tensors_of(expected)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert not mine[name].is_meta, name
        assert mine[name].dtype is tensor.dtype, name
        assert mine[name].shape == tensor.shape, name
        assert bits(mine[name]) == bits(tensor), name
        assert mine[name].requires_grad == tensor.requires_grad, name
    assert ties_of(actual) == ties_of(expected)


def assert_same_outputs(name: str, actual: t.PreTrainedModel, expected: t.PreTrainedModel) -> None:
    mine, theirs = outputs(name, actual), outputs(name, expected)
    assert mine.keys() == theirs.keys()
    assert theirs
    for key, value in theirs.items():
        assert not value.isnan().any(), key
        assert bits(mine[key]) == bits(value), key


def save(model, directory: Path, **options) -> Path:
    """As a user would: the model gets the mixin, and keeps the class it had in the test."""
    original = type(model)
    directory.mkdir(exist_ok=True)
    model.__class__ = with_mixin(original)
    model.save_pretrained_flashpack(directory, **options)
    model.__class__ = original
    return directory


def load(model_class, directory: Path | str, *args, **options):
    return with_mixin(model_class).from_pretrained_flashpack(directory, *args, **options)


def repack(directory: Path, change) -> None:
    """Lets `change` edit the state dict in the file."""
    path = directory / "model.flashpack"
    tensors = flashpack.revert_from_file(path)
    change(tensors)
    flashpack.pack_to_file(tensors, path)


def checkpoint(model, directory: Path) -> Path:
    """What converting a repository gives: the tensors of its safetensors file, under their names there."""
    model.save_pretrained(directory)
    flashpack.pack_to_file(load_file(directory / "model.safetensors"), directory / "model.flashpack")
    return directory


def edit_config(directory: Path, **entries) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
