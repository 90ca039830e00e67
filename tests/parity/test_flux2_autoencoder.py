"""FLUX.2's autoencoder against diffusers' `AutoencoderKLFlux2`."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2Pipeline

from fluxmesh.models.autoencoder.packing import pack
from fluxmesh.models.flux2.autoencoder import Flux2AutoEncoder
from fluxmesh.models.flux2.config import Flux2AutoencoderConfig
from fluxmesh.models.flux2.single_file import flux2_autoencoder_config_of
from fluxmesh.models.flux2.tensor_maps import autoencoder_tensors
from fluxmesh.models.tensor_map import in_bfl_file
from tests import flux2_models
from tests.parity import flux2
from tests.parity.oracles import BOUND, load, normal, relative_error

CASES = {
    # name: (sizes, pictures, latent height and width)
    "four levels": ({}, 1, (4, 6)),
    "small decoder": ({"decoder_block_out_channels": (4, 8, 8, 12)}, 1, (2, 6)),
    "two pictures, two blocks a level": ({"layers_per_block": 2}, 2, (6, 2)),
    "two levels, no attention": (
        {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "block_out_channels": (6, 9),
            "norm_num_groups": 3,
            "mid_block_add_attention": False,
            "batch_norm_eps": 0.05,
        },
        1,
        (4, 4),
    ),
}


def build(sizes: dict) -> tuple[AutoencoderKLFlux2, Flux2AutoEncoder]:
    oracle = flux2.autoencoder(seed=3, **sizes)
    config = Flux2AutoencoderConfig.from_dict(oracle.config)
    ae = Flux2AutoEncoder(config)
    load(ae, autoencoder_tensors(config), oracle)
    return oracle, ae


def decoded(oracle: AutoencoderKLFlux2, tokens: np.ndarray, h: int, w: int) -> torch.Tensor:
    """Packed, normalized latents as diffusers' pipelines decode them: [B, H, W, 3]."""
    x = torch.from_numpy(tokens).permute(0, 2, 1).unflatten(2, (h // 2, w // 2))
    deviation = torch.sqrt(oracle.bn.running_var + oracle.config.batch_norm_eps)
    x = x * deviation.view(1, -1, 1, 1) + oracle.bn.running_mean.view(1, -1, 1, 1)
    x = Flux2Pipeline._unpatchify_latents(x)
    return oracle.decode(x).sample.permute(0, 2, 3, 1)


@pytest.mark.parametrize("name", CASES)
def test_encode_and_decode_equal_diffusers(name: str) -> None:
    sizes, batch, (h, w) = CASES[name]
    oracle, ae = build(sizes)
    f = ae.config.downsampling

    pixels = normal(batch, h * f, w * f, 3, seed=1)
    x = oracle.encode(torch.from_numpy(pixels.transpose(0, 3, 1, 2))).latent_dist.mode()
    x = Flux2Pipeline._patchify_latents(x)
    deviation = torch.sqrt(oracle.bn.running_var + oracle.config.batch_norm_eps)
    x = (x - oracle.bn.running_mean.view(1, -1, 1, 1)) / deviation.view(1, -1, 1, 1)
    expected = Flux2Pipeline._pack_latents(x)
    encoding = relative_error(pack(ae.encode(mx.array(pixels))), expected)

    latents = normal(batch, h, w, 4, seed=2)
    expected = decoded(oracle, pack(latents), h, w)
    decoding = relative_error(ae.decode(mx.array(latents)), expected)

    print(f"FLUX.2's autoencoder, {name}: encode {encoding:.1e}, decode {decoding:.1e}")
    assert max(encoding, decoding) <= BOUND


def test_bfl_s_file_gives_the_same_pictures(tmp_path: Path) -> None:
    """Quant convolutions inside the halves, attention as 1x1 convolutions; and its sizes."""
    oracle, ae = build({"decoder_block_out_channels": (4, 8, 8, 16), "norm_num_groups": 4})
    path = flux2.write(flux2.bfl_autoencoder(oracle), tmp_path / "ae.safetensors")
    from_shapes = flux2_autoencoder_config_of(path)
    config = ae.config
    assert from_shapes.norm_groups == 32  # which no shape tells
    for field in ("widths", "decoder_widths", "num_res_blocks", "z_channels", "mid_attention"):
        assert getattr(from_shapes, field) == getattr(config, field)
    other = flux2_models.load(
        Flux2AutoEncoder(config), in_bfl_file(autoencoder_tensors(config)), [path]
    )
    latents = mx.array(normal(1, 4, 4, 4, seed=2))
    assert np.array_equal(np.array(other.decode(latents)), np.array(ae.decode(latents)))
