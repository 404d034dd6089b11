"""Tiny models of diffusers, and a pipeline of them."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    ConfigMixin,
    DDIMScheduler,
    FluxTransformer2DModel,
    ModelMixin,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.configuration_utils import register_to_config
from flashpack.integrations.diffusers import FlashPackDiffusersModelMixin, FlashPackDiffusionPipeline
from flashpack.integrations.transformers import FlashPackTransformersModelMixin
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

MODEL = "model.flashpack"


class FlashPackUNet2DConditionModel(UNet2DConditionModel, FlashPackDiffusersModelMixin):
    pass


class FlashPackAutoencoderKL(AutoencoderKL, FlashPackDiffusersModelMixin):
    pass


class FlashPackFlux(FluxTransformer2DModel, FlashPackDiffusersModelMixin):
    pass


class FlashPackSD3(SD3Transformer2DModel, FlashPackDiffusersModelMixin):
    pass


class FlashPackCLIPTextModel(CLIPTextModel, FlashPackTransformersModelMixin):
    pass


class FlashPackSD(StableDiffusionPipeline, FlashPackDiffusionPipeline):
    pass


class AnnotatedSD(StableDiffusionPipeline, FlashPackDiffusionPipeline):
    def __init__(
        self,
        vae: FlashPackAutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: FlashPackUNet2DConditionModel | None,
        scheduler: DDIMScheduler,
        safety_checker: None = None,
        feature_extractor: None = None,
        image_encoder: None = None,
        requires_safety_checker: bool = False,
    ) -> None:
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            requires_safety_checker=requires_safety_checker,
        )


class Counting(ModelMixin, ConfigMixin):
    """Buffers of all kinds, and a part that has to stay in float32."""

    _keep_in_fp32_modules = ("exact",)

    @register_to_config
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(width)
        self.exact = torch.nn.Linear(width, width)
        self.rough = torch.nn.Linear(width, width)
        self.register_buffer("table", torch.arange(width).float())
        self.register_buffer("scale", torch.ones(width), persistent=False)


class FlashPackCounting(Counting, FlashPackDiffusersModelMixin):
    pass


def make_unet(cls: type = FlashPackUNet2DConditionModel) -> Any:
    torch.manual_seed(0)
    return cls(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=4,
    ).eval()


def make_vae(cls: type = FlashPackAutoencoderKL) -> Any:
    torch.manual_seed(1)
    return cls(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=4,
    ).eval()


def make_flux(cls: type = FlashPackFlux) -> Any:
    torch.manual_seed(2)
    return cls(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ).eval()


def make_text_encoder(cls: type = FlashPackCLIPTextModel) -> Any:
    torch.manual_seed(3)
    return cls(
        CLIPTextConfig(
            vocab_size=5,
            hidden_size=16,
            intermediate_size=32,
            num_attention_heads=2,
            num_hidden_layers=1,
            max_position_embeddings=8,
            bos_token_id=3,
            eos_token_id=4,
            pad_token_id=4,
        )
    ).eval()


@functools.cache
def tokenizer() -> CLIPTokenizer:
    vocabulary = ("a", "b</w>", "ab</w>", "<|startoftext|>", "<|endoftext|>")
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
        Path(directory, "merges.txt").write_text("#version: 0.2\na b</w>\n")
        return CLIPTokenizer.from_pretrained(directory, model_max_length=8)


def make_pipeline(cls: type = FlashPackSD, **makers: Any) -> Any:
    makers = {"unet": make_unet, "vae": make_vae, "text_encoder": make_text_encoder} | makers
    return cls(
        **{name: make() for name, make in makers.items()},
        tokenizer=tokenizer(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def plain_unet() -> Any:
    return make_unet(UNet2DConditionModel)


def plain_vae() -> Any:
    return make_vae(AutoencoderKL)


def plain_text_encoder() -> Any:
    return make_text_encoder(CLIPTextModel)


def make_plain_pipeline() -> Any:
    return make_pipeline(StableDiffusionPipeline, unet=plain_unet, vae=plain_vae, text_encoder=plain_text_encoder)


def save_pipeline(directory: Path) -> Path:
    """All models of it are in flashpack files."""
    make_pipeline().save_pretrained_flashpack(directory)
    return directory


def image(pipeline: Any) -> np.ndarray[Any, Any]:
    """What it draws, always from the same noise."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline("ab", num_inference_steps=2, generator=generator, output_type="np", height=16, width=16).images


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())
