"""Packed latents against diffusers' `FluxPipeline`, whose latents are channels first."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import FluxPipeline

from fluxmesh.models.flux1 import positions
from fluxmesh.sampling import latents as noise
from tests.parity.oracles import normal


def test_tokens_and_positions_are_diffusers() -> None:
    latents = normal(2, 6, 10, 16, seed=1)
    theirs = torch.from_numpy(latents.transpose(0, 3, 1, 2).copy())
    tokens = FluxPipeline._pack_latents(theirs, 2, 16, 6, 10)
    np.testing.assert_array_equal(noise.pack(latents), tokens.numpy())
    unpacked = FluxPipeline._unpack_latents(tokens, 48, 80, 8).permute(0, 2, 3, 1)
    np.testing.assert_array_equal(noise.unpack(noise.pack(latents), (6, 10)), unpacked.numpy())
    ids = FluxPipeline._prepare_latent_image_ids(1, 3, 5, "cpu", torch.float32)
    np.testing.assert_array_equal(positions.image_positions(3, 5), ids.numpy())
