"""A diffusers folder of FLUX.1: its parts, what they mean together, how it is written again.

CLIP and T5 have a folder and a vocabulary each. Imports no mlx.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from fluxmesh.errors import WeightsError
from fluxmesh.models.base import Architecture, ModelDefaults
from fluxmesh.models.files.configs import declared_length
from fluxmesh.models.files.family import (
    FolderDescription,
    FolderFormat,
    PromptReader,
    TokenizerFolder,
)
from fluxmesh.models.flux1 import tensor_maps
from fluxmesh.models.flux1.architecture import Flux1Architecture, guidance_of, map_kind_of
from fluxmesh.models.flux1.config import (
    AutoencoderConfig,
    ClipConfig,
    FluxConfig,
    InputKind,
    ScheduleConfig,
    T5Config,
    input_kind,
)
from fluxmesh.models.flux1.files.vocabularies import CLIP_FILES, T5_FILES
from fluxmesh.request import MapKind

# The library and class of each part, as diffusers' `from_pretrained` looks them up.
INDEX = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
CLASSES: dict[str, dict[str, Any]] = {
    "transformer": {"_class_name": "FluxTransformer2DModel"},
    "vae": {"_class_name": "AutoencoderKL"},
    "text_encoder": {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"},
    "text_encoder_2": {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "feed_forward_proj": "gated-gelu",
    },
}

# diffusers' pipelines, by what the transformer reads
PIPELINES: Mapping[InputKind, str] = {
    "text": "FluxPipeline",
    "control": "FluxControlPipeline",
    "fill": "FluxFillPipeline",
}
KONTEXT_PIPELINE = "FluxKontextPipeline"
# Of an index that fluxmesh wrote: the kind of map, which a new name may hide; diffusers reads no
# key that begins so.
FOLLOWS = "_follows"


def kontext_defaults(length: int) -> ModelDefaults:
    """What a request of Kontext takes where it says nothing; `length` is T5's."""
    return ModelDefaults(30, 2.5, 1024, 1024, length)


class Flux1Folder(FolderFormat):
    """FLUX.1's."""

    components = ("transformer", "text_encoder", "text_encoder_2", "vae")
    tokenizers: Mapping[str, TokenizerFolder] = {
        "tokenizer": TokenizerFolder("clip", "text_encoder", CLIP_FILES),
        "tokenizer_2": TokenizerFolder("t5", "text_encoder_2", T5_FILES),
    }
    configs: Mapping[str, Any] = {
        "transformer": FluxConfig.from_dict,
        "text_encoder": ClipConfig.from_dict,
        "text_encoder_2": T5Config.from_dict,
        "vae": AutoencoderConfig.from_dict,
    }
    schedule = ScheduleConfig.from_dict

    def is_of(self, pipeline: str) -> bool:
        return re.match(r"Flux(?!\d)", pipeline) is not None

    def architecture(self, description: FolderDescription, where: Path) -> Flux1Architecture:
        configs = description.configs
        transformer, autoencoder = configs["transformer"], configs["vae"]
        kind = _checked_kind(transformer, autoencoder, where)
        is_kontext = description.index.get("_class_name") == KONTEXT_PIPELINE
        length = _t5_max_length(description.tokenizers["t5"], transformer.guidance_embed)
        follows = _followed(description.index, where) if kind == "control" else None
        return Flux1Architecture(
            transformer,
            configs["text_encoder_2"],
            configs["text_encoder"],
            autoencoder,
            kontext_defaults(length)
            if is_kontext
            else defaults_of(kind, transformer, length, follows),
            description.schedule,
            is_kontext,
            follows=follows,
        )

    def reader(self, architecture: Architecture, tokenizers: Mapping[str, Path]) -> PromptReader:
        """T5's: CLIP, which reads less, only sums up what T5 tells word by word."""
        from fluxmesh.models.flux1.tokenizers import T5Tokenizer

        return T5Tokenizer.from_folder(tokenizers["t5"], architecture.text_length)

    def spellings(self, key: str) -> tuple[str, ...]:
        return tensor_maps.spellings(key)

    def class_of(self, architecture: Architecture, folder: str) -> Mapping[str, Any]:
        return CLASSES[folder]

    def index(self, architecture: Architecture) -> Mapping[str, Any]:
        assert isinstance(architecture, Flux1Architecture)
        kind = input_kind(architecture.transformer, architecture.autoencoder)
        pipeline = KONTEXT_PIPELINE if architecture.is_kontext else PIPELINES[kind or "text"]
        follows = {FOLLOWS: architecture.follows} if architecture.follows else {}
        return INDEX | {"_class_name": pipeline, **follows}

    def config(self, architecture: Architecture, folder: str) -> dict[str, Any]:
        assert isinstance(architecture, Flux1Architecture)
        if folder == "text_encoder":
            return dataclasses.asdict(architecture.clip)
        if folder == "text_encoder_2":
            return dataclasses.asdict(architecture.t5)
        if folder == "vae":
            return _autoencoder_json(architecture.autoencoder)
        return _transformer_json(architecture.transformer)


def _followed(index: Mapping[str, Any], where: Path) -> MapKind | None:
    """The kind of map that a model follows which takes one."""
    said: MapKind | None = index.get(FOLLOWS)
    return said if said in get_args(MapKind) else map_kind_of(*reversed(where.parts))


def defaults_of(
    kind: InputKind, flux: FluxConfig, length: int, follows: MapKind | None
) -> ModelDefaults:
    """What a request takes where it says nothing; `length` is T5's."""
    steps = 50 if flux.guidance_embed else 4
    return ModelDefaults(steps, guidance_of(kind, follows), 512, 512, length)


def _checked_kind(flux: FluxConfig, ae: AutoencoderConfig, where: Path) -> InputKind:
    """What the transformer reads beside a text."""
    latents = 4 * ae.z_channels  # a token covers two by two of them
    if flux.out_channels != latents:
        raise WeightsError(
            f"The autoencoder of {where} has {ae.z_channels} channels, and its transformer paints "
            f"in {flux.out_channels // 4}; they are of two models, so put this one's own vae there."
        )
    kind = input_kind(flux, ae)
    if kind is None:
        raise WeightsError(
            f"The transformer of {where} takes {flux.in_channels} channels, where text-to-image "
            f"takes {latents}, Canny and Depth {2 * latents} and Fill "
            f"{2 * latents + (2 * ae.downsampling) ** 2}; fluxmesh runs models shaped like these."
        )
    return kind


def _t5_max_length(tokenizer: Path, guided: bool) -> int:
    """What the tokenizer declares; models without guidance (schnell) saw 256 at most."""
    length = declared_length(tokenizer, 4096) or 512
    return length if guided else min(length, 256)


def _autoencoder_json(ae: AutoencoderConfig) -> dict[str, Any]:
    return {
        "in_channels": ae.in_channels,
        "out_channels": ae.out_ch,
        "down_block_types": ["DownEncoderBlock2D"] * len(ae.widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(ae.widths),
        "block_out_channels": ae.widths,
        "layers_per_block": ae.num_res_blocks,
        "latent_channels": ae.z_channels,
        "norm_num_groups": ae.norm_groups,
        "mid_block_add_attention": ae.mid_attention,
        "scaling_factor": ae.scale_factor,
        "shift_factor": ae.shift_factor,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


def _transformer_json(flux: FluxConfig) -> dict[str, Any]:
    return {
        "in_channels": flux.in_channels,
        "out_channels": flux.out_channels,
        "num_layers": flux.depth,
        "num_single_layers": flux.depth_single_blocks,
        "attention_head_dim": flux.head_dim,
        "num_attention_heads": flux.num_heads,
        "joint_attention_dim": flux.context_in_dim,
        "pooled_projection_dim": flux.vec_in_dim,
        "guidance_embeds": flux.guidance_embed,
        "axes_dims_rope": flux.axes_dim,
    }
