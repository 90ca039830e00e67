"""The T5 encoder against transformers' `T5EncoderModel`."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch
from transformers import T5Config as OracleConfig
from transformers import T5EncoderModel
from transformers.models.t5.modeling_t5 import T5Attention

from fluxmesh.models.flux1.config import T5Config
from fluxmesh.models.flux1.t5 import T5Encoder, relative_position_buckets
from fluxmesh.models.flux1.tensor_maps import t5_tensors
from tests.parity.oracles import BOUND, load, randomize, relative_error

CASES = {
    # name: (sizes, prompts, tokens)
    "small": ({"num_heads": 2, "d_kv": 8, "num_layers": 2}, 1, 9),
    "one layer, heads wider than the model": ({"num_heads": 3, "d_kv": 16, "num_layers": 1}, 2, 33),
    "few buckets, far tokens": (
        {
            "num_heads": 5,
            "d_kv": 4,
            "num_layers": 3,
            "relative_attention_num_buckets": 12,
            "relative_attention_max_distance": 40,
        },
        3,
        150,
    ),
    "one token": ({"num_heads": 1, "d_kv": 24, "num_layers": 2}, 1, 1),
}


@pytest.mark.parametrize("name", CASES)
def test_features_equal_transformers(name: str) -> None:
    sizes, batch, length = CASES[name]
    oracle_config = OracleConfig(
        vocab_size=50, d_model=24, d_ff=40, feed_forward_proj="gated-gelu", **sizes
    )
    oracle = randomize(T5EncoderModel(oracle_config))
    config = T5Config.from_dict(oracle_config.to_dict())
    encoder = T5Encoder(config)
    load(encoder, t5_tensors(config), oracle)
    tokens = np.random.default_rng(1).integers(0, 50, (batch, length))
    error = relative_error(encoder(mx.array(tokens)), oracle(torch.from_numpy(tokens))[0])
    print(f"T5, {name}: {error:.1e}")
    assert error <= BOUND


@pytest.mark.parametrize("buckets, distance", [(32, 128), (12, 40), (8, 17), (64, 1000)])
def test_every_distance_falls_into_transformers_bucket(buckets: int, distance: int) -> None:
    length = 600
    position = torch.arange(length)
    relative = position[None, :] - position[:, None]
    expected = T5Attention._relative_position_bucket(relative, True, buckets, distance)
    ours = relative_position_buckets(length, buckets, distance)
    np.testing.assert_array_equal(ours, expected.numpy())
