"""The autoencoder against diffusers' `AutoencoderKL`."""

from __future__ import annotations

import mlx.core as mx
import pytest
import torch
from diffusers import AutoencoderKL

from fluxmesh.models.flux1.autoencoder import AutoEncoder
from fluxmesh.models.flux1.config import AutoencoderConfig
from fluxmesh.models.flux1.tensor_maps import autoencoder_tensors
from tests.parity.oracles import BOUND, load, normal, randomize, relative_error

CASES = {
    # name: (sizes, pictures, latent height and width)
    "four levels": ({"block_out_channels": (8, 12, 16, 16), "layers_per_block": 1}, 1, (3, 5)),
    "two levels, two pictures, tall": (
        {"block_out_channels": (6, 9), "layers_per_block": 2, "norm_num_groups": 3},
        2,
        (7, 2),
    ),
    "no attention, no shift": (
        {
            "block_out_channels": (8, 8, 16),
            "layers_per_block": 1,
            "mid_block_add_attention": False,
            "shift_factor": None,
        },
        1,
        (4, 4),
    ),
    "one level": ({"block_out_channels": (8,), "layers_per_block": 1}, 3, (5, 6)),
}


def build(sizes: dict) -> tuple[AutoencoderKL, AutoEncoder]:
    levels = len(sizes["block_out_channels"])
    oracle = randomize(
        AutoencoderKL(
            **{
                "down_block_types": ("DownEncoderBlock2D",) * levels,
                "up_block_types": ("UpDecoderBlock2D",) * levels,
                "latent_channels": 4,
                "norm_num_groups": 4,
                "scaling_factor": 0.3611,
                "shift_factor": 0.1159,
                "use_quant_conv": False,
                "use_post_quant_conv": False,
                **sizes,
            }
        )
    )
    config = AutoencoderConfig.from_dict(oracle.config)
    ae = AutoEncoder(config)
    load(ae, autoencoder_tensors(config), oracle)
    return oracle, ae


@pytest.mark.parametrize("name", CASES)
def test_encode_and_decode_equal_diffusers(name: str) -> None:
    sizes, batch, (h, w) = CASES[name]
    oracle, ae = build(sizes)
    scale, shift = oracle.config.scaling_factor, oracle.config.shift_factor or 0.0

    pixels = normal(batch, h * ae.config.downsampling, w * ae.config.downsampling, 3, seed=1)
    mean = oracle.encode(torch.from_numpy(pixels.transpose(0, 3, 1, 2))).latent_dist.mean
    expected = ((mean - shift) * scale).permute(0, 2, 3, 1)
    encoding = relative_error(ae.encode(mx.array(pixels)), expected)

    latents = normal(batch, h, w, 4, seed=2)
    z = torch.from_numpy(latents.transpose(0, 3, 1, 2)) / scale + shift
    expected = oracle.decode(z).sample.permute(0, 2, 3, 1)
    decoding = relative_error(ae.decode(mx.array(latents)), expected)

    print(f"autoencoder, {name}: encode {encoding:.1e}, decode {decoding:.1e}")
    assert max(encoding, decoding) <= BOUND


def test_attention_in_chunks_of_queries_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, _, (h, w) = CASES["four levels"]
    oracle, ae = build(sizes)
    # 15 places: 4, 4, 4 and 3
    monkeypatch.setattr("fluxmesh.models.autoencoder.convolutional.QUERY_ROWS", 4)
    latents = normal(1, h, w, 4, seed=2)
    z = torch.from_numpy(latents.transpose(0, 3, 1, 2)) / 0.3611 + 0.1159
    expected = oracle.decode(z).sample.permute(0, 2, 3, 1)
    assert relative_error(ae.decode(mx.array(latents)), expected) <= BOUND
