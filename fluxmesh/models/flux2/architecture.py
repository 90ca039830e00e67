"""What FLUX.2's checkpoints are made of, in numbers. Pure, no mlx.

One language model reads the prompt (klein: Qwen3, dev: Mistral Small 3), of which the layers after
the last state that is read are never loaded, and whose embedding is looked up in the file. All
blocks of a kind share their modulations, 2 to 4% of the transformer: every host holds them whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fluxmesh.models.autoencoder import conv_tensors
from fluxmesh.models.base import Architecture, ModelComponent, ModelDefaults
from fluxmesh.models.flux2 import adapter_names, partition, references, tensor_maps
from fluxmesh.models.flux2.config import (
    Flux2AutoencoderConfig,
    Flux2Config,
    Flux2Schedule,
    TextEncoderConfig,
)
from fluxmesh.models.flux2.quantization import group_size
from fluxmesh.models.partition import Partition
from fluxmesh.models.tensor_map import ComponentNames, Tensors
from fluxmesh.models.transformer_shape import BLOCK_LISTS, TransformerShape, rules_of_heads
from fluxmesh.request import Condition

COMPONENTS = (
    ModelComponent("text_encoder", "text", "text_encoder"),
    ModelComponent("modulator", "modulator", "transformer"),
    ModelComponent("denoiser", "denoiser", "transformer"),
    ModelComponent("autoencoder", "autoencoder", "vae"),
)

DISTILLED_STEPS = 4  # of klein


@dataclass(frozen=True)
class Flux2Architecture(Architecture):
    """A checkpoint of FLUX.2."""

    transformer: Flux2Config
    text: TextEncoderConfig
    autoencoder: Flux2AutoencoderConfig
    defaults: ModelDefaults
    schedule: Flux2Schedule = Flux2Schedule()
    is_distilled: bool = False  # of model_index.json: klein, whose base model looks alike
    remembers_references: bool = False  # klein 9B KV

    always_pads = True

    @property
    def takes_negative(self) -> bool:
        """Whether guidance asks it twice a step: a base model, whose strength is not embedded."""
        return not self.is_distilled and not self.transformer.guidance_embed

    @property
    def takes_guidance(self) -> bool:
        return self.transformer.guidance_embed or self.takes_negative

    @property
    def distilled_steps(self) -> int | None:
        return DISTILLED_STEPS if self.is_distilled else None

    @property
    def undistilled(self) -> Flux2Architecture | None:
        """klein's base model, which has its sizes."""
        return replace(self, is_distilled=False) if self.is_distilled else None

    @property
    def guidance_is_cfg(self) -> bool:  # type: ignore[override]
        return self.takes_negative

    @property
    def takes(self) -> frozenset[Condition]:  # type: ignore[override]
        guided: tuple[Condition, ...] = ("negative", "cfg") if self.takes_negative else ()
        return frozenset(("references", *guided))

    def fitted(self, picture: np.ndarray) -> np.ndarray:
        return references.fitted(picture, 2 * self.downsampling, self.defaults.reference_area)

    def size_of(self, references: Sequence[np.ndarray]) -> tuple[int, int] | None:
        """That of the first."""
        return references[0].shape[:2] if references else None

    @property
    def shifting(self) -> Flux2Schedule:
        return self.schedule

    @property
    def components(self) -> tuple[ModelComponent, ...]:
        return COMPONENTS

    def tensors_in(self, folder: str) -> Tensors:
        if folder == "text_encoder":
            return tensor_maps.text_encoder_tensors(self.text) | tensor_maps.embedding(self.text)
        if folder == "vae":
            return tensor_maps.autoencoder_tensors(self.autoencoder)
        return tensor_maps.transformer_tensors(self.transformer)

    def modulates(self, name: str) -> bool:
        return tensor_maps.modulates(name)

    def tensors(self, component: str) -> Tensors:
        if component == "text_encoder":  # without the embedding, whose rows are looked up
            return tensor_maps.text_encoder_tensors(self.text)
        return super().tensors(component)

    def text_layers(self, component: str) -> tuple[str, ...]:
        return tuple(f"layers.{i}." for i in range(self.text.layers))

    def group_size(self, folder: str, name: str, shape: tuple[int, ...]) -> int | None:
        return group_size(folder, name, shape)

    @property
    def rules(self) -> Mapping[str, bool]:
        text, ae = self.text, self.autoencoder
        return {
            **rules_of_heads(self.transformer),
            "the text encoder's rms_norm_eps must be above 0": text.rms_norm_eps > 0,
            "the text encoder's rope_theta must be above 0": text.rope_theta > 0,
            "the text encoder's key heads must divide its heads, and a head be even": (
                text.num_attention_heads % text.num_key_value_heads == 0 and text.head_dim % 2 == 0
            ),
            "the transformer must take what the text encoder gives": (
                self.transformer.context_in_dim == text.width
            ),
            "the autoencoder's norm groups must divide each of its widths": all(
                width % ae.norm_groups == 0 for width in (*ae.widths, *ae.decoder_widths)
            ),
            "the autoencoder's decoder must have as many widths as its encoder": (
                len(ae.widths) == len(ae.decoder_widths)
            ),
            "the autoencoder's batch_norm_eps must be above 0": ae.batch_norm_eps > 0,
            "the scheduler's shift must be above 0": self.schedule.shift > 0,
        }

    @property
    def adapter_names(self) -> tuple[ComponentNames, ...]:
        return adapter_names.components(self.transformer)

    @property
    def shape(self) -> TransformerShape:
        config = self.transformer
        return TransformerShape(
            hidden_size=config.hidden_size,
            mlp_hidden_dim=config.mlp_hidden_dim,
            num_heads=config.num_heads,
            depth=config.depth,
            depth_single_blocks=config.depth_single_blocks,
            gated=True,
            calls=2 if self.takes_negative and self.defaults.guidance > 1 else 1,
        )

    @property
    def block_lists(self) -> tuple[str, ...]:
        return BLOCK_LISTS

    @property
    def partition(self) -> Partition:
        return partition.partition(self.transformer)

    @property
    def finest_width(self) -> int:
        widest = (self.autoencoder, self.autoencoder.decoder)
        return max(conv_tensors.finest_width(half) for half in widest)

    @property
    def finest_encoded_width(self) -> int:
        return conv_tensors.finest_encoded_width(self.autoencoder)

    def decode_flops(self, height: int, width: int) -> float:
        return conv_tensors.decode_flops(self.autoencoder.decoder, height, width)
