"""Models of transformers with tied weights, from files in which these differ."""

from __future__ import annotations

import flashpack
import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

from transformers_models import TEXT, assert_same_model, load, repack, save, ties_of  # noqa: E402

pytestmark = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="transformers compares what is tied from version 5 on"
)


@pytest.fixture(autouse=True, scope="module")
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def make_bart():
    sizes = {f"{side}_{size}": n for side in ("encoder", "decoder") for size, n in (("layers", 1), ("ffn_dim", 32))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(vocab_size=64, d_model=16, max_position_embeddings=16, **sizes, **heads)
    )


def make_mt5():
    config = transformers.MT5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    config.tie_word_embeddings = True
    return transformers.MT5ForConditionalGeneration(config)


def make_mamba():
    """With a hook of load_state_dict."""
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    )


def directory_of(model, path, **others):
    """Returns a directory that transformers has saved, in whose file there are `others` besides."""
    model.save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    save_file({**tensors, **others}, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (make_bart, "lm_head.weight"),
        (make_bart, "model.decoder.embed_tokens.weight"),
        (make_mt5, "lm_head.weight"),
        (make_mt5, "encoder.embed_tokens.weight"),
        (make_mamba, "lm_head.weight"),
    ],
)
@pytest.mark.parametrize("before", [False, True])
def test_a_weight_that_differs_from_its_partners_leaves_these_as_transformers_does(make, name, before, tmp_path):
    torch.manual_seed(0)
    model = make().eval()
    own = torch.randn_like(model.get_parameter(name))
    source = directory_of(model, tmp_path / "source", **{name: own})
    expected = type(model).from_pretrained(source)
    assert torch.equal(expected.get_parameter(name), own)

    (tmp_path / "packed").mkdir()
    model.config.save_pretrained(tmp_path / "packed")
    tensors = load_file(source / "model.safetensors")
    order = sorted(tensors, key=lambda each: (each == name) is not before)
    flashpack.pack_to_file(tensors, tmp_path / "packed" / "model.flashpack", name_order=order)
    loaded = load(type(model), tmp_path / "packed")
    assert_same_model(loaded, expected)
    assert ties_of(loaded) == ties_of(expected)
    assert loaded.all_tied_weights_keys == expected.all_tied_weights_keys


def test_a_weight_that_has_another_dtype_than_its_partner_keeps_it(tmp_path):
    model = make_bart().eval()
    save(model, tmp_path)
    repack(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].double() + 1}))
    loaded = load(type(model), tmp_path)
    assert loaded.lm_head.weight.dtype is torch.float64
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.double() + 1)
    assert torch.equal(loaded.model.shared.weight, model.model.shared.weight)
    assert loaded.model.shared.weight is loaded.model.encoder.embed_tokens.weight


@pytest.mark.parametrize("make", [make_bart, make_mt5])
def test_tied_weights_of_another_shape_are_an_error_or_made_anew(make, tmp_path):
    model = make().eval()
    model.save_pretrained(tmp_path)
    save(model, tmp_path)
    with pytest.raises(flashpack.FlashPackError, match=r"shape mismatch for .*shared"):
        load(type(model), tmp_path, vocab_size=70)
    options = {"vocab_size": 70, "ignore_mismatched_sizes": True, "output_loading_info": True}
    loaded, ours = load(type(model), tmp_path, **options)
    expected, theirs = type(model).from_pretrained(tmp_path, **options)
    assert {name: set(ours[name]) for name in ours} == {name: set(theirs[name]) for name in ours}
    assert ties_of(loaded) == ties_of(expected)
    assert loaded.lm_head.weight.shape[0] == 70
    again = load(type(model), tmp_path, ignore_mismatched_sizes=True)
    assert_same_model(again, model)


def test_a_buffer_that_is_computed_is_not_taken_from_the_file(tmp_path):
    config = transformers.LlamaConfig(num_key_value_heads=1, **TEXT)
    model = transformers.LlamaForCausalLM(config).eval()
    stale = {"model.rotary_emb.inv_freq": torch.full_like(model.model.rotary_emb.inv_freq, 7)}
    directory_of(model, tmp_path / "source", **stale)
    (tmp_path / "packed").mkdir()
    config.save_pretrained(tmp_path / "packed")
    flashpack.pack_to_file(
        load_file(tmp_path / "source" / "model.safetensors"), tmp_path / "packed" / "model.flashpack"
    )
    loaded = load(type(model), tmp_path / "packed")
    assert torch.equal(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert_same_model(loaded, model)
