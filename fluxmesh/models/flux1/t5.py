"""T5's encoder: a prompt's tokens to the features that FLUX's text stream reads.

Beside `clip.py`; `stages.py` runs it once a prompt. Names are transformers' (`T5EncoderModel`).
This is version 1.1 of the model: gated feed-forward with the tanh form of GELU, no biases, norms
that only scale, attention scores that are not divided by the root of the head's size.

Shapes: B prompts, L tokens, D = d_model, H heads. Sources: Raffel et al. 2020
(https://arxiv.org/abs/1910.10683), section 2.1; Shazeer 2020, "GLU Variants Improve Transformer"
(https://arxiv.org/abs/2002.05202).
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from fluxmesh.models.flux1.config import T5Config


def relative_position_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of each (query, key) pair, int32 [L, L].

    Half of the buckets are for keys that come after the query. Of each half, the first half count
    single tokens of distance and the others grow logarithmically up to `max_distance`. In float32,
    in the order of operations of mesh-tensorflow, since a rounding decides at the borders.
    """
    position = np.arange(length)
    relative = position[None, :] - position[:, None]  # key minus query
    half = num_buckets // 2
    distance = np.abs(relative)

    exact = half // 2
    ratio = np.maximum(distance, exact).astype(np.float32) / np.float32(exact)
    growth = np.log(ratio) / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + growth.astype(np.int32), half - 1)
    buckets = np.where(relative > 0, half, 0) + np.where(distance < exact, distance, far)
    return buckets.astype(np.int32)


class T5Attention(nn.Module):
    """Self-attention whose scores get a bias that depends on the distance in tokens.

    Only the first block holds the table of biases; all blocks use it.
    """

    def __init__(self, config: T5Config, has_bias_table: bool) -> None:
        super().__init__()
        self.d_kv = config.d_kv
        inner = config.num_heads * config.d_kv
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if has_bias_table:
            self.relative_attention_bias = nn.Embedding(
                config.relative_attention_num_buckets, config.num_heads
            )

    def __call__(self, x: mx.array, bias: mx.array) -> mx.array:
        """x [B, L, D] in and out; `bias` [1, H, L, L] is added to the scores."""
        B, L, _ = x.shape
        q, k, v = (
            project(x).reshape(B, L, -1, self.d_kv).transpose(0, 2, 1, 3)  # [B, H, L, d_kv]
            for project in (self.q, self.k, self.v)
        )
        x = mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask=bias)
        return self.o(x.transpose(0, 2, 1, 3).reshape(B, L, -1))


class T5FeedForward(nn.Module):
    """wo(gelu(wi_0 x) * wi_1 x)."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.wo(nn.gelu_approx(self.wi_0(x)) * self.wi_1(x))


class T5LayerSelfAttention(nn.Module):
    """Norm, attention, and the sum with what came in."""

    def __init__(self, config: T5Config, has_bias_table: bool) -> None:
        super().__init__()
        self.SelfAttention = T5Attention(config, has_bias_table)
        self.layer_norm = nn.RMSNorm(config.d_model, eps=config.layer_norm_epsilon)

    def __call__(self, x: mx.array, bias: mx.array) -> mx.array:
        return x + self.SelfAttention(self.layer_norm(x), bias)


class T5LayerFF(nn.Module):
    """Norm, feed-forward, and the sum with what came in."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.DenseReluDense = T5FeedForward(config)  # transformers' name; there is no ReLU in it
        self.layer_norm = nn.RMSNorm(config.d_model, eps=config.layer_norm_epsilon)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.DenseReluDense(self.layer_norm(x))


class T5Block(nn.Module):
    """One layer of the encoder; `layer` is a list because transformers numbers its two parts."""

    def __init__(self, config: T5Config, has_bias_table: bool) -> None:
        super().__init__()
        self.layer: list[nn.Module] = [
            T5LayerSelfAttention(config, has_bias_table),
            T5LayerFF(config),
        ]

    def __call__(self, x: mx.array, bias: mx.array) -> mx.array:
        attend, feed_forward = self.layer
        return feed_forward(attend(x, bias))


class T5Stack(nn.Module):
    """The blocks and the norm after the last."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.block = [T5Block(config, has_bias_table=i == 0) for i in range(config.num_layers)]
        self.final_layer_norm = nn.RMSNorm(config.d_model, eps=config.layer_norm_epsilon)

    def __call__(self, x: mx.array, bias: mx.array) -> mx.array:
        for block in self.block:
            x = block(x, bias)
        return self.final_layer_norm(x)


class T5Encoder(nn.Module):
    """Tokens to features. FLUX masks nothing: padding is attended to like any token."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = T5Stack(config)

    def position_bias(self, length: int) -> mx.array:
        """What every block adds to its scores at `length` tokens: [1, H, L, L]."""
        buckets = relative_position_buckets(
            length,
            self.config.relative_attention_num_buckets,
            self.config.relative_attention_max_distance,
        )
        table = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        return table(mx.array(buckets)).transpose(2, 0, 1)[None]  # [L, L, H] to [1, H, L, L]

    def __call__(self, tokens: mx.array) -> mx.array:
        """Token ids, whole numbers [B, L], to features [B, L, D] in the dtype of the weights."""
        x = self.shared(tokens)  # [B, L, D]
        return self.encoder(x, self.position_bias(tokens.shape[1]).astype(x.dtype))
