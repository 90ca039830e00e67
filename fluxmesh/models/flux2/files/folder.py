"""A diffusers folder of FLUX.2: its parts, what they mean together, how it is written again.

One text encoder with one vocabulary. What was distilled (klein) only model_index.json tells: its
transformer looks like that of its base model. Imports no mlx.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fluxmesh.errors import WeightsError
from fluxmesh.models.base import Architecture, ModelDefaults
from fluxmesh.models.files.configs import declared_length
from fluxmesh.models.files.family import (
    FolderDescription,
    FolderFormat,
    PromptReader,
    TokenizerFolder,
)
from fluxmesh.models.flux2 import tensor_maps
from fluxmesh.models.flux2.architecture import Flux2Architecture
from fluxmesh.models.flux2.config import (
    Flux2AutoencoderConfig,
    Flux2Config,
    Flux2Schedule,
    TextEncoderConfig,
)

TEXT_LENGTH = 512  # tokens of a prompt, frame and padding included; a vocabulary may declare fewer
KV_PIPELINE = "Flux2KleinKVPipeline"  # klein 9B KV, which is distilled and does not say so
VOCABULARY = (("tokenizer.json",), ("vocab.json", "merges.txt"))  # the latter of Qwen alone
# How a prompt is framed as a chat, which `tokenizer.py` knows by heart.
TEMPLATE = ("chat_template.jinja", "special_tokens_map.json", "added_tokens.json")


class Flux2Folder(FolderFormat):
    """FLUX.2's."""

    components = ("transformer", "text_encoder", "vae")
    tokenizers: Mapping[str, TokenizerFolder] = {
        "tokenizer": TokenizerFolder("text_encoder", "text_encoder", VOCABULARY, TEMPLATE)
    }
    configs: Mapping[str, Any] = {
        "transformer": Flux2Config.from_dict,
        "text_encoder": TextEncoderConfig.from_dict,
        "vae": Flux2AutoencoderConfig.from_dict,
    }
    schedule = Flux2Schedule.from_dict

    def is_of(self, pipeline: str) -> bool:
        return re.match(r"Flux2(?!\d)", pipeline) is not None

    def architecture(self, description: FolderDescription, where: Path) -> Flux2Architecture:
        configs, index = description.configs, description.index
        transformer, autoencoder = configs["transformer"], configs["vae"]
        if transformer.in_channels != autoencoder.token_channels:
            raise WeightsError(
                f"The autoencoder of {where} has {autoencoder.z_channels} channels, and its "
                f"transformer paints in {transformer.in_channels // 4}; they are of two models, so "
                "put this one's own vae there."
            )
        says_so = index.get("is_distilled") is True or index.get("_class_name") == KV_PIPELINE
        is_distilled = says_so and not transformer.guidance_embed  # dev is none of klein's kinds
        length = declared_length(description.tokenizers["text_encoder"], TEXT_LENGTH) or TEXT_LENGTH
        return Flux2Architecture(
            transformer,
            configs["text_encoder"],
            autoencoder,
            defaults_of(transformer, is_distilled, length),
            description.schedule,
            is_distilled,
            remembers_references=is_distilled and index.get("_class_name") == KV_PIPELINE,
        )

    def reader(self, architecture: Architecture, tokenizers: Mapping[str, Path]) -> PromptReader:
        from fluxmesh.models.flux2.tokenizer import ChatTokenizer

        assert isinstance(architecture, Flux2Architecture)
        folder, kind = tokenizers["text_encoder"], architecture.text.kind
        return ChatTokenizer.from_folder(folder, kind, architecture.text_length)

    def spellings(self, key: str) -> tuple[str, ...]:
        return tensor_maps.spellings(key)

    def saved_name(self, architecture: Architecture, key: str) -> str:
        """Mistral's language model stands beside a vision tower, and Qwen3 alone."""
        assert isinstance(architecture, Flux2Architecture)
        usual, beside_vision = self.spellings(key)[:2]
        is_text = usual == f"model.{key}"
        return beside_vision if is_text and architecture.text.kind == "mistral3" else usual

    def class_of(self, architecture: Architecture, folder: str) -> Mapping[str, Any]:
        index = self.index(architecture)
        name = index[folder][1]
        return {"architectures": [name]} if folder == "text_encoder" else {"_class_name": name}

    def index(self, architecture: Architecture) -> Mapping[str, Any]:
        assert isinstance(architecture, Flux2Architecture)
        is_klein = architecture.text.kind == "qwen3"
        encoder, tokenizer = (
            ("Qwen3ForCausalLM", "Qwen2TokenizerFast")
            if is_klein
            else ("Mistral3ForConditionalGeneration", "PixtralProcessor")
        )
        klein = KV_PIPELINE if architecture.remembers_references else "Flux2KleinPipeline"
        says_so = is_klein and klein != KV_PIPELINE  # whose class takes no such word
        return {
            "_class_name": klein if is_klein else "Flux2Pipeline",
            **({"is_distilled": architecture.is_distilled} if says_so else {}),
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", encoder],
            "tokenizer": ["transformers", tokenizer],
            "transformer": ["diffusers", "Flux2Transformer2DModel"],
            "vae": ["diffusers", "AutoencoderKLFlux2"],
        }

    def config(self, architecture: Architecture, folder: str) -> dict[str, Any]:
        assert isinstance(architecture, Flux2Architecture)
        if folder == "text_encoder":
            return _text_encoder_json(architecture.text)
        if folder == "vae":
            return _autoencoder_json(architecture.autoencoder)
        return _transformer_json(architecture.transformer)


def defaults_of(
    transformer: Flux2Config, is_distilled: bool, text_length: int = TEXT_LENGTH
) -> ModelDefaults:
    """klein takes 4 steps and no guidance; its base models, and dev, 50 steps at 4."""
    steps, guidance = (4, 1.0) if is_distilled else (50, 4.0)
    return ModelDefaults(steps, guidance, 1024, 1024, text_length)


def _transformer_json(flux: Flux2Config) -> dict[str, Any]:
    return {
        "in_channels": flux.in_channels,
        "out_channels": flux.out_channels,
        "num_layers": flux.depth,
        "num_single_layers": flux.depth_single_blocks,
        "attention_head_dim": flux.head_dim,
        "num_attention_heads": flux.num_heads,
        "joint_attention_dim": flux.context_in_dim,
        "mlp_ratio": flux.mlp_ratio,
        "axes_dims_rope": flux.axes_dim,
        "rope_theta": flux.theta,
        "guidance_embeds": flux.guidance_embed,
    }


def _text_encoder_json(text: TextEncoderConfig) -> dict[str, Any]:
    """Without what `kind` says: norms of queries and keys, and which states are read."""
    values = dataclasses.asdict(text)
    del values["qk_norm"], values["states"]
    return {"model_type": text.kind, "num_hidden_layers": text.layers, **values}


def _autoencoder_json(ae: Flux2AutoencoderConfig) -> dict[str, Any]:
    return {
        "in_channels": ae.in_channels,
        "out_channels": ae.out_ch,
        "down_block_types": ["DownEncoderBlock2D"] * len(ae.widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(ae.widths),
        "block_out_channels": ae.widths,
        "decoder_block_out_channels": ae.decoder_widths,
        "layers_per_block": ae.num_res_blocks,
        "latent_channels": ae.z_channels,
        "norm_num_groups": ae.norm_groups,
        "mid_block_add_attention": ae.mid_attention,
        "batch_norm_eps": ae.batch_norm_eps,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
    }
