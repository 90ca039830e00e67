"""The CLIP text encoder against transformers' `CLIPTextModel`."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from fluxmesh.models.flux1.clip import ClipTextModel
from fluxmesh.models.flux1.config import ClipConfig
from fluxmesh.models.flux1.tensor_maps import clip_tensors
from tests.parity.oracles import BOUND, load, randomize, relative_error

VOCABULARY = 60
END = VOCABULARY - 1
CASES = {
    # name: (sizes, prompts, tokens)
    "quick_gelu": ({"hidden_size": 32, "num_attention_heads": 2}, 2, 13),
    "exact gelu, one layer": (
        {"hidden_size": 24, "num_attention_heads": 3, "hidden_act": "gelu", "num_hidden_layers": 1},
        1,
        20,
    ),
    "legacy end token": ({"hidden_size": 40, "num_attention_heads": 5, "eos_token_id": 2}, 3, 7),
    "other norm": ({"hidden_size": 16, "num_attention_heads": 1, "layer_norm_eps": 1e-2}, 2, 5),
}


@pytest.mark.parametrize("name", CASES)
def test_features_and_pooled_vector_equal_transformers(name: str) -> None:
    sizes, batch, length = CASES[name]
    oracle_config = CLIPTextConfig(
        **{
            "vocab_size": VOCABULARY,
            "intermediate_size": 52,
            "num_hidden_layers": 3,
            "max_position_embeddings": 20,
            "eos_token_id": END,
            "bos_token_id": END - 1,
            **sizes,
        }
    )
    oracle = randomize(CLIPTextModel(oracle_config))
    config = ClipConfig.from_dict(oracle_config.to_dict())
    model = ClipTextModel(config)
    load(model, clip_tensors(config), oracle)

    tokens = np.random.default_rng(1).integers(3, END - 1, (batch, length))
    for row, prompt in enumerate(tokens):
        prompt[2 + row :] = END  # the end, then padding with the same token, as CLIP does
    ours, expected = model(mx.array(tokens)), oracle(torch.from_numpy(tokens))
    features = relative_error(ours.last_hidden_state, expected.last_hidden_state)
    pooled = relative_error(ours.pooled_output, expected.pooler_output)
    print(f"CLIP, {name}: features {features:.1e}, pooled {pooled:.1e}")
    assert max(features, pooled) <= BOUND
