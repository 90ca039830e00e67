"""The sizes that every benchmark runs at: FLUX.1-dev's, and small ones to try a program with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from fluxmesh.models.flux1.config import AutoencoderConfig, ClipConfig, FluxConfig, T5Config
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
