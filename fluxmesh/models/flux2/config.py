"""Sizes of FLUX.2's models, read from a checkpoint's own config files. Imports no mlx.

The field names of `Flux2Config` are those of black-forest-labs/flux2 (`src/flux2/model.py`), as
FLUX.1's are; `TextEncoderConfig` keeps transformers' names; `from_dict` reads the `config.json` of
a diffusers folder. klein (4B, 9B), its base models and dev differ in sizes alone, and in whether
they embed the guidance strength.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from fluxmesh.models.files.configs import LEAST, UnsupportedConfigError


@dataclass(frozen=True)
class Flux2Config:
    """Sizes of the transformer (klein 4B: 5 double and 20 single blocks, hidden size 3072)."""

    in_channels: int = 128  # 2x2 latents of 32 channels
    out_channels: int = 128
    context_in_dim: int = 7680  # width of the text features: three states of the text encoder
    hidden_size: int = 3072
    mlp_ratio: float = 3.0
    num_heads: int = 24
    depth: int = 5
    depth_single_blocks: int = field(default=20, metadata={LEAST: 0})
    axes_dim: tuple[int, ...] = (32, 32, 32, 32)  # of each head: picture, row, column, text token
    theta: int = 2000
    guidance_embed: bool = False

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_hidden_dim(self) -> int:
        """Of the MLP's gate, and of what it gates."""
        return int(self.hidden_size * self.mlp_ratio)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Reads `transformer/config.json` of a diffusers folder.

        Where `guidance_embeds` is absent the model has the embedding: diffusers' default.
        """
        return cls(
            in_channels=config["in_channels"],
            out_channels=config.get("out_channels") or config["in_channels"],
            context_in_dim=config["joint_attention_dim"],
            hidden_size=config["num_attention_heads"] * config["attention_head_dim"],
            mlp_ratio=config.get("mlp_ratio", 3.0),
            num_heads=config["num_attention_heads"],
            depth=config["num_layers"],
            depth_single_blocks=config["num_single_layers"],
            axes_dim=tuple(config.get("axes_dims_rope", (32, 32, 32, 32))),
            theta=config.get("rope_theta", 2000),
            guidance_embed=config.get("guidance_embeds", True),
        )


# The published models' transformers.
KLEIN_4B = Flux2Config()
KLEIN_9B = Flux2Config(
    context_in_dim=12288, hidden_size=4096, num_heads=32, depth=8, depth_single_blocks=24
)
DEV = Flux2Config(
    context_in_dim=15360,
    hidden_size=6144,
    num_heads=48,
    depth=8,
    depth_single_blocks=48,
    guidance_embed=True,
)


@dataclass(frozen=True)
class TextEncoderConfig:
    """Sizes of the language model whose states are the text features; names are transformers'.

    klein reads Qwen3 (4B, 8B), dev Mistral Small 3: one architecture, but for the norm of queries
    and keys. Of its layers none after the last state that is read exists here.
    """

    vocab_size: int = 151936
    hidden_size: int = 2560
    intermediate_size: int = 9728
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128  # heads * head_dim need not be hidden_size
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    qk_norm: bool = True  # of each head: Qwen3's
    states: tuple[int, ...] = (9, 18, 27)  # state k is the output of the k-th layer

    @property
    def kind(self) -> str:
        """The language model, by transformers' name."""
        return "qwen3" if self.qk_norm else "mistral3"

    @property
    def layers(self) -> int:
        """Layers that are run."""
        return max(self.states)

    @property
    def width(self) -> int:
        """Of a token's features: the states side by side."""
        return len(self.states) * self.hidden_size

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Reads `text_encoder/config.json`, of Qwen3 or of Mistral Small 3.

        Raises `UnsupportedConfigError` for another language model, one with too few layers, or
        one that has what neither of them has.
        """
        kind = config["model_type"]
        if kind not in STATES:
            raise UnsupportedConfigError(f"{kind} is no text encoder of FLUX.2")
        text = config.get("text_config", config)  # Mistral Small 3 also has a vision tower
        states = STATES[kind]
        if text["num_hidden_layers"] < max(states):
            raise UnsupportedConfigError(
                f"{kind} has {text['num_hidden_layers']} layers, not {max(states)}"
            )
        extras = ("attention_bias", "sliding_window", "use_sliding_window", "rope_scaling")
        others = [key for key in extras if text.get(key)]
        if others or text.get("hidden_act", "silu") != "silu":
            raise UnsupportedConfigError(f"{kind} has {', '.join(others) or text['hidden_act']}")
        heads = text["num_attention_heads"]
        rope = text.get("rope_parameters") or text  # transformers 5 and 4
        return cls(
            vocab_size=text["vocab_size"],
            hidden_size=text["hidden_size"],
            intermediate_size=text["intermediate_size"],
            num_attention_heads=heads,
            num_key_value_heads=text["num_key_value_heads"],
            head_dim=text.get("head_dim") or text["hidden_size"] // heads,
            rms_norm_eps=text["rms_norm_eps"],
            rope_theta=rope["rope_theta"],
            qk_norm=kind == "qwen3",
            states=states,
        )


# What the reference reads of each language model: diffusers' `Flux2KleinPipeline`, `Flux2Pipeline`.
STATES = {"qwen3": (9, 18, 27), "mistral3": (10, 20, 30)}


@dataclass(frozen=True)
class Flux2AutoencoderConfig:
    """Sizes of the autoencoder; BFL's `ch * ch_mult[i]` is `widths[i]` here."""

    in_channels: int = 3
    out_ch: int = 3
    widths: tuple[int, ...] = (128, 256, 512, 512)  # of each level, finest first
    decoder_widths: tuple[int, ...] = (128, 256, 512, 512)  # the small decoder's are others
    num_res_blocks: int = 2
    z_channels: int = 32
    norm_groups: int = 32
    mid_attention: bool = True
    batch_norm_eps: float = 1e-4

    @property
    def downsampling(self) -> int:
        """Pixels a latent covers along one side."""
        return 2 ** (len(self.widths) - 1)

    @property
    def token_channels(self) -> int:
        """Numbers of a token: 2x2 latents. The batch norm's statistics are of these."""
        return 4 * self.z_channels

    @property
    def decoder(self) -> Flux2AutoencoderConfig:
        """The same sizes, with the decoder's widths."""
        return dataclasses.replace(self, widths=self.decoder_widths)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Reads `vae/config.json` of a diffusers folder.

        Raises `UnsupportedConfigError` where it lacks the two convolutions that every FLUX.2 has.
        """
        if not (config.get("use_quant_conv", True) and config.get("use_post_quant_conv", True)):
            raise UnsupportedConfigError("FLUX.2's autoencoder has both quant convolutions")
        widths = tuple(config["block_out_channels"])
        return cls(
            in_channels=config["in_channels"],
            out_ch=config["out_channels"],
            widths=widths,
            decoder_widths=tuple(config.get("decoder_block_out_channels") or widths),
            num_res_blocks=config["layers_per_block"],
            z_channels=config["latent_channels"],
            norm_groups=config.get("norm_num_groups", 32),
            mid_attention=config.get("mid_block_add_attention", True),
            batch_norm_eps=config.get("batch_norm_eps", 1e-4),
        )


@dataclass(frozen=True)
class Flux2Schedule:
    """How time steps are shifted: by the image's length, and less where steps are many.

    Two lines over the image's length were fitted by BFL, for 10 and for 200 steps; other numbers
    of steps lie on the line between. Source: black-forest-labs/flux2 `src/flux2/sampling.py`,
    `compute_empirical_mu`; diffusers has the same.
    """

    use_dynamic_shifting: bool = True
    shift: float = 3.0  # used when not dynamic

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Reads `scheduler/scheduler_config.json`."""
        return cls(config.get("use_dynamic_shifting", True), config.get("shift", 3.0))

    def mu(self, image_seq_len: int, steps: int) -> float:
        """The logarithm of the shift at `image_seq_len` image tokens, references not counted.

        Above 4300 tokens the number of steps has no part; there mu falls from about 2 to 1.18.
        """
        at_200 = 0.00016927 * image_seq_len + 0.45666666
        if image_seq_len > 4300:
            return at_200
        at_10 = 8.73809524e-05 * image_seq_len + 1.89833333
        slope = (at_200 - at_10) / 190.0
        return slope * steps + (at_200 - 200.0 * slope)
