"""Layers that the transformers of all FLUX families share: embeddings, norms, attention.

Stands below the families' own layers (`flux1/layers.py`, `flux2/layers.py`), which make blocks of
these. Names of modules and parameters are those of black-forest-labs/flux and flux2
(`src/flux/modules/layers.py`), so that their weight files load without renaming; `img`, `txt`,
`vec` and `pe` mean here what they mean there. FLUX.1's linears have biases, FLUX.2's none: `bias`.

Shapes: B images, S tokens (L of text, then those of the image), D hidden size, H heads,
hd = D / H. Activations keep the dtype of the weights, but tokens between the blocks of a float16
model, which are float32 (`ops.py`); the statistics of norms, rotary embedding and time embedding
are computed in float32 and rounded once.

Source of the rotary embedding: Su et al. 2021 (https://arxiv.org/abs/2104.09864).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from fluxmesh.kernels.ops import Stream, modulated_norm, with_room

TIME_CHANNELS = 256  # sinusoids that stand for a time step or a guidance strength


def timestep_embedding(t: mx.array, dim: int = TIME_CHANNELS) -> mx.array:
    """Sinusoids of 1000 * t, float32 [N, dim], cosines first; `t` is [N] in [0, 1] (or guidance).

    The argument goes up to 1000, which bfloat16 would round to a multiple of 4: stay in float32.
    """
    half = dim // 2
    frequencies = np.exp(-math.log(10_000) * np.arange(half) / half).astype(np.float32)
    angles = (1000.0 * t.astype(mx.float32))[:, None] * mx.array(frequencies)  # [N, dim/2]
    return mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=-1)


def rope_tables(ids: np.ndarray, axes_dim: tuple[int, ...], theta: float) -> mx.array:
    """Cosines and sines that rotate queries and keys, float32 [..., 1, S, hd/2, 2].

    `ids` is [..., S, axes] of whole numbers; axis i of the positions turns `axes_dim[i]` of a
    head's channels. Computed on the host in float64, so that every backend rotates alike.
    """
    angles = [
        ids[..., i, None].astype(np.float64) / theta ** (np.arange(0, dim, 2) / dim)
        for i, dim in enumerate(axes_dim)
    ]
    angle = np.concatenate(angles, axis=-1)  # [..., S, hd/2]
    tables = np.stack([np.cos(angle), np.sin(angle)], axis=-1).astype(np.float32)
    return mx.array(np.expand_dims(tables, -4))  # the new axis is that of heads


def attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Full attention over all tokens: three [B, H, S, hd] in, [B, S, H * hd] out.

    With room for the linear that follows (`fused.with_room`).
    """
    x = with_room(mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5))
    B, _, S, _ = x.shape
    return x.transpose(0, 2, 1, 3).reshape(B, S, -1)


def values(qkv: mx.array, head_dim: int) -> mx.array:
    """The last third of [B, S, 3 * H * hd], where it lies: [B, H, S, hd]."""
    B, S, width = qkv.shape
    return qkv[..., width // 3 * 2 :].reshape(B, S, -1, head_dim).swapaxes(1, 2)


class MLPEmbedder(nn.Module):
    """A time step's sinusoids, or CLIP's pooled vector, to a vector of the hidden size."""

    def __init__(self, in_dim: int, hidden_dim: int, bias: bool = True) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_dim, bias)
        self.out_layer = nn.Linear(hidden_dim, hidden_dim, bias)

    def __call__(self, x: mx.array) -> mx.array:
        return self.out_layer(nn.silu(self.in_layer(x)))


class Modulation(nn.Module):
    """silu(vec) to a block's shifts, scales and gates: `outputs` vectors of D, side by side."""

    def __init__(self, dim: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.lin = nn.Linear(dim, outputs * dim, bias)

    def __call__(self, silu_vec: mx.array) -> mx.array:
        return self.lin(silu_vec)


class RMSNorm(nn.Module):
    """Root-mean-square norm over a head's channels; BFL calls its weight `scale`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = mx.ones((dim,))


class QKNorm(nn.Module):
    """Norms queries and keys, each head on its own; `fused.turned` applies it as it rotates."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(head_dim)
        self.key_norm = RMSNorm(head_dim)

    @property
    def scales(self) -> tuple[mx.array, mx.array]:
        return self.query_norm.scale, self.key_norm.scale


class SelfAttention(nn.Module):
    """One stream's projections; the attention itself spans both streams (`DoubleStreamBlock`)."""

    def __init__(self, dim: int, num_heads: int, bias: bool = True) -> None:
        super().__init__()
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias)
        self.norm = QKNorm(self.head_dim)
        self.proj = nn.Linear(dim, dim, bias)

    def stream(self, x: mx.array) -> Stream:
        """[B, S, D] to queries, keys and values side by side, with the norms' scales."""
        return self.qkv(x), self.norm.scales


def run(layers: list[nn.Module], x: mx.array) -> mx.array:
    """Calls one layer after another."""
    for layer in layers:
        x = layer(x)
    return x


def call(block: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a block. Training may put a function in its place that keeps no activations."""
    return block(*arguments)


def outputs(*calls: tuple[nn.Module, mx.array]) -> list[mx.array]:
    """Calls the linears that end a block's branches, each with its input.

    On a shard of the model these give parts of a sum; `parallel.py` then puts a function in the
    place of this one that adds the hosts' parts.
    """
    return [layer(x) for layer, x in calls]


class LastLayer(nn.Module):
    """The hidden state to the velocity of each latent in a token."""

    def __init__(self, dim: int, out_channels: int, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, out_channels, bias)
        # a list, so that the linear has BFL's name, `1`
        self.adaLN_modulation = [nn.SiLU(), nn.Linear(dim, 2 * dim, bias)]

    def modulation(self, silu_vec: mx.array) -> mx.array:
        """[..., D] to [..., 2D]: shift, then scale (diffusers stores them the other way round)."""
        return self.adaLN_modulation[1](silu_vec)

    def __call__(self, x: mx.array, mod: mx.array) -> mx.array:
        """x [B, S, D], `mod` [B, 1, 2D], to [B, S, out_channels]."""
        shift, scale = mx.split(mod, 2, axis=-1)
        return self.linear(modulated_norm(x, shift, scale))
