"""Sizes of the four models, read from a checkpoint's own config files. Imports no mlx.

The field names of `FluxConfig` and `AutoencoderConfig` are those of black-forest-labs/flux
(`src/flux/model.py`, `src/flux/modules/autoencoder.py`); `from_dict` reads the `config.json`
of a diffusers folder. `T5Config`, `ClipConfig` and `SiglipConfig` keep transformers' names.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from fluxmesh.models.files.configs import LEAST, UnsupportedConfigError


def _known(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `values` that `cls` has fields for, lists turned into tuples."""
    names = {field.name for field in dataclasses.fields(cls)}
    return {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in values.items()
        if key in names
    }


@dataclass(frozen=True)
class FluxConfig:
    """Sizes of the transformer (FLUX.1: 19 double and 38 single blocks, hidden size 3072)."""

    in_channels: int = 64
    out_channels: int = 64
    vec_in_dim: int = 768  # width of CLIP's pooled vector
    context_in_dim: int = 4096  # width of T5's features
    hidden_size: int = 3072
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 19
    depth_single_blocks: int = field(default=38, metadata={LEAST: 0})
    axes_dim: tuple[int, ...] = (16, 56, 56)  # of each head, to RoPE's three axes
    theta: int = 10_000
    guidance_embed: bool = False

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_hidden_dim(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def channels_beside(self) -> int:
        """Channels of a token's input behind those of its latents: a picture's, and a mask's."""
        return self.in_channels - self.out_channels

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Reads `transformer/config.json` of a diffusers folder."""
        return cls(
            in_channels=config["in_channels"],
            out_channels=config.get("out_channels") or config["in_channels"],
            vec_in_dim=config["pooled_projection_dim"],
            context_in_dim=config["joint_attention_dim"],
            hidden_size=config["num_attention_heads"] * config["attention_head_dim"],
            num_heads=config["num_attention_heads"],
            depth=config["num_layers"],
            depth_single_blocks=config["num_single_layers"],
            axes_dim=tuple(config.get("axes_dims_rope", (16, 56, 56))),
            guidance_embed=config.get("guidance_embeds", False),
        )


@dataclass(frozen=True)
class T5Config:
    """Sizes of the T5 encoder (v1.1: gated tanh-GELU). Names are transformers'."""

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Reads `text_encoder_2/config.json`."""
        return cls(**_known(cls, config))


@dataclass(frozen=True)
class ClipConfig:
    """Sizes of the CLIP text encoder. Names are transformers'."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"
    eos_token_id: int = field(default=49407, metadata={LEAST: 0})

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Reads `text_encoder/config.json`."""
        return cls(**_known(cls, config))


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of the autoencoder; BFL's `ch * ch_mult[i]` is `widths[i]` here."""

    in_channels: int = 3
    out_ch: int = 3
    widths: tuple[int, ...] = (128, 256, 512, 512)  # of each level, finest first
    num_res_blocks: int = 2
    z_channels: int = 16
    norm_groups: int = 32
    mid_attention: bool = True
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159

    @property
    def downsampling(self) -> int:
        """Pixels a latent covers along one side."""
        return 2 ** (len(self.widths) - 1)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Reads `vae/config.json` of a diffusers folder."""
        return cls(
            in_channels=config["in_channels"],
            out_ch=config["out_channels"],
            widths=tuple(config["block_out_channels"]),
            num_res_blocks=config["layers_per_block"],
            z_channels=config["latent_channels"],
            norm_groups=config.get("norm_num_groups", 32),
            mid_attention=config.get("mid_block_add_attention", True),
            scale_factor=config["scaling_factor"],
            shift_factor=config.get("shift_factor") or 0.0,
        )


@dataclass(frozen=True)
class SiglipConfig:
    """Sizes of SigLIP's picture encoder (so400m-patch14-384), with which Redux sees."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    image_size: int = 384  # pixels along a side of the square that a picture is stretched to
    patch_size: int = 14  # pixels along a side of what becomes a token; what is left over is cut
    layer_norm_eps: float = 1e-6

    @property
    def rows(self) -> int:
        """Tokens along a side."""
        return self.image_size // self.patch_size

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Reads `image_encoder/config.json`, or that of the whole of SigLIP.

        Raises `UnsupportedConfigError` for an activation that no SigLIP was trained with.
        """
        vision = config.get("vision_config", config)
        if not isinstance(vision, Mapping):
            raise TypeError("vision_config is no map")
        activation = vision.get("hidden_act", SIGLIP_ACTIVATION)
        if activation != SIGLIP_ACTIVATION:
            raise UnsupportedConfigError(f"it has hidden_act {activation!r}, as no SigLIP does")
        return cls(**{**SIGLIP_UNSAID, **_known(cls, vision)})


SIGLIP_ACTIVATION = "gelu_pytorch_tanh"
# What transformers means where a config of SigLIP's picture encoder leaves a value out.
SIGLIP_UNSAID: Mapping[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
}


@dataclass(frozen=True)
class ReduxConfig:
    """Sizes of Redux's embedder, which brings SigLIP's tokens to the width of T5's."""

    redux_dim: int = 1152  # SigLIP's width
    txt_in_features: int = 4096  # T5's width

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Reads `image_embedder/config.json`."""
        return cls(**_known(cls, config))


InputKind = Literal["text", "control", "fill"]
"""What the transformer reads behind a token's latents: nothing, a control picture's latents, or
those of the picture to paint into and its mask."""


def input_kind(flux: FluxConfig, ae: AutoencoderConfig) -> InputKind | None:
    """What a transformer is made for, by the width of its input; None for no width that is known.

    FLUX.1: 64 channels for text alone, 128 for Canny and Depth, 384 for Fill.
    """
    latents = 4 * ae.z_channels  # a token covers two by two of them
    mask = (2 * ae.downsampling) ** 2  # a number a pixel
    kinds: dict[int, InputKind] = {0: "text", latents: "control", latents + mask: "fill"}
    return kinds.get(flux.channels_beside) if flux.out_channels == latents else None


@dataclass(frozen=True)
class ScheduleConfig:
    """How time steps are shifted: schnell's not at all, dev's by the image's length."""

    use_dynamic_shifting: bool = False
    shift: float = 1.0  # used when not dynamic
    base_shift: float = 0.5  # mu at base_image_seq_len
    max_shift: float = 1.15  # mu at max_image_seq_len
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Reads `scheduler/scheduler_config.json`."""
        return cls(**_known(cls, config))

    def mu(self, image_seq_len: int, steps: int | None = None) -> float:
        """The logarithm of the shift at `image_seq_len` image tokens, whatever the steps."""
        if not self.use_dynamic_shifting:
            return math.log(self.shift)
        slope = (self.max_shift - self.base_shift) / (
            self.max_image_seq_len - self.base_image_seq_len
        )
        return self.base_shift + slope * (image_seq_len - self.base_image_seq_len)
