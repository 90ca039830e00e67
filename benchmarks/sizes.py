"""The sizes that benchmarks run at: FLUX.1-dev's and FLUX.2's, and small ones to try a program."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from fluxmesh.models.flux1.config import AutoencoderConfig, ClipConfig, FluxConfig, T5Config
from fluxmesh.models.flux2.config import DEV, KLEIN_4B, KLEIN_9B, Flux2Config
from tests import checkpoints


@dataclass(frozen=True)
class Sizes:
    """All sizes of a run."""

    transformer: FluxConfig = FluxConfig(guidance_embed=True)
    t5: T5Config = T5Config()
    clip: ClipConfig = ClipConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    text_tokens: int = 512  # that a prompt is padded to
    height: int = 1024  # pixels
    width: int = 1024  # pixels


FULL = Sizes()
SMALL = Sizes(
    dataclasses.replace(checkpoints.TRANSFORMER, guidance_embed=True),
    checkpoints.T5,
    dataclasses.replace(checkpoints.CLIP, vocab_size=1024),
    checkpoints.AUTOENCODER,
    text_tokens=16,
    height=64,
    width=64,
)

# The transformers that a step is timed of, and what stands for each at small sizes.
TRANSFORMERS: dict[str, FluxConfig | Flux2Config] = {
    "dev": FULL.transformer,
    "kontext": FULL.transformer,
    "klein-4b": KLEIN_4B,
    "klein-9b": KLEIN_9B,
    "klein-9b-kv": KLEIN_9B,
    "flux2-dev": DEV,
}
SMALL_KLEIN = Flux2Config(
    in_channels=16,
    out_channels=16,
    context_in_dim=48,
    hidden_size=64,
    num_heads=4,
    depth=1,
    depth_single_blocks=2,
    axes_dim=(4, 4, 4, 4),
)
SMALL_KLEIN_9B = dataclasses.replace(SMALL_KLEIN, num_heads=8, axes_dim=(2, 2, 2, 2))
SMALL_TRANSFORMERS: dict[str, FluxConfig | Flux2Config] = {
    "dev": SMALL.transformer,
    "kontext": SMALL.transformer,
    "klein-4b": SMALL_KLEIN,
    "klein-9b": SMALL_KLEIN_9B,
    "klein-9b-kv": SMALL_KLEIN_9B,
    "flux2-dev": dataclasses.replace(SMALL_KLEIN, guidance_embed=True),
}
