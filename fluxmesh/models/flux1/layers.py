"""The layers of the FLUX transformer: embeddings, attention, the two kinds of block.

Stands below `transformer.py`, which strings these together. Names of modules and parameters are
those of black-forest-labs/flux (`src/flux/modules/layers.py`), so that its weight files load
without renaming; `img`, `txt`, `vec` and `pe` mean here what they mean there.

Shapes: B images, S tokens (L of text, then those of the image), D hidden size, H heads,
hd = D / H. Activations keep the dtype of the weights, but tokens between the blocks of a float16
model, which are float32 (`ops.py`); the statistics of norms, rotary embedding and time embedding
are computed in float32 and rounded once.

Sources: adaptive layer norm with gates (adaLN-Zero), Peebles & Xie 2023
(https://arxiv.org/abs/2212.09748); two streams joined in attention, Esser et al. 2024
(https://arxiv.org/abs/2403.03206); attention beside MLP in one block, Dehghani et al. 2023
(https://arxiv.org/abs/2302.05442); rotary embedding, Su et al. 2021
(https://arxiv.org/abs/2104.09864).
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from fluxmesh.kernels.ops import (
    Stream,
    gated_norm,
    gated_sum,
    gelu,
    gelu_beside,
    modulated_norm,
    turned_heads,
    with_room,
)

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

    def __init__(self, in_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_dim)
        self.out_layer = nn.Linear(hidden_dim, hidden_dim)

    def __call__(self, x: mx.array) -> mx.array:
        return self.out_layer(nn.silu(self.in_layer(x)))


class Modulation(nn.Module):
    """silu(vec) to a block's shifts, scales and gates: `outputs` vectors of D, side by side."""

    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__()
        self.lin = nn.Linear(dim, outputs * dim)

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

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.norm = QKNorm(self.head_dim)
        self.proj = nn.Linear(dim, dim)

    def stream(self, x: mx.array) -> Stream:
        """[B, S, D] to queries, keys and values side by side, with the norms' scales."""
        return self.qkv(x), self.norm.scales


class GELU(nn.Module):
    """The tanh form, as a layer without parameters."""

    def __call__(self, x: mx.array) -> mx.array:
        return gelu(x)


def feed_forward(dim: int, hidden_dim: int) -> list[nn.Module]:
    """A plain list, not `nn.Sequential`, so that the parameters are called `0` and `2` as BFL's."""
    return [nn.Linear(dim, hidden_dim), GELU(), nn.Linear(hidden_dim, dim)]


def run(layers: list[nn.Module], x: mx.array) -> mx.array:
    """Calls one layer after another."""
    for layer in layers:
        x = layer(x)
    return x


def outputs(*calls: tuple[nn.Module, mx.array]) -> list[mx.array]:
    """Calls the linears that end a block's branches, each with its input.

    On a shard of the model these give parts of a sum; `parallel.py` then puts a function in the
    place of this one that adds the hosts' parts.
    """
    return [layer(x) for layer, x in calls]


class DoubleStreamBlock(nn.Module):
    """Image and text keep weights of their own and meet in one attention."""

    attention = staticmethod(attention)
    outputs = staticmethod(outputs)

    def __init__(self, dim: int, num_heads: int, mlp_hidden_dim: int) -> None:
        super().__init__()
        self.img_mod = Modulation(dim, 6)
        self.img_attn = SelfAttention(dim, num_heads)
        self.img_mlp = feed_forward(dim, mlp_hidden_dim)
        self.txt_mod = Modulation(dim, 6)
        self.txt_attn = SelfAttention(dim, num_heads)
        self.txt_mlp = feed_forward(dim, mlp_hidden_dim)

    def __call__(
        self, img: mx.array, txt: mx.array, pe: mx.array, img_mod: mx.array, txt_mod: mx.array
    ) -> tuple[mx.array, mx.array]:
        """img [B, S - L, D] and txt [B, L, D] in and out; each modulation is [B, 1, 6D]."""
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = mx.split(
            img_mod, 6, axis=-1
        )
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = mx.split(
            txt_mod, 6, axis=-1
        )

        img_stream = self.img_attn.stream(modulated_norm(img, img_shift1, img_scale1))
        txt_stream = self.txt_attn.stream(modulated_norm(txt, txt_shift1, txt_scale1))
        heads = img_stream[0].shape[-1] // (3 * self.img_attn.head_dim)
        q, k, v = turned_heads([txt_stream, img_stream], pe, heads, 3)  # text first
        txt_attn, img_attn = mx.split(self.attention(q, k, v), [txt.shape[1]], axis=1)

        img_out, txt_out = self.outputs(
            (self.img_attn.proj, img_attn), (self.txt_attn.proj, txt_attn)
        )
        img, img_normed = gated_norm(img, img_gate1, img_out, img_shift2, img_scale2)
        txt, txt_normed = gated_norm(txt, txt_gate1, txt_out, txt_shift2, txt_scale2)

        img_out, txt_out = self.outputs(
            (self.img_mlp[2], run(self.img_mlp[:2], img_normed)),
            (self.txt_mlp[2], run(self.txt_mlp[:2], txt_normed)),
        )
        return gated_sum(img, img_gate2, img_out), gated_sum(txt, txt_gate2, txt_out)


class SingleStreamBlock(nn.Module):
    """Text and image as one sequence; attention and MLP share a matrix in and a matrix out."""

    attention = staticmethod(attention)
    outputs = staticmethod(outputs)

    def __init__(self, dim: int, num_heads: int, mlp_hidden_dim: int) -> None:
        super().__init__()
        self.head_dim = dim // num_heads
        self.qkv_dim = 3 * dim
        self.linear1 = nn.Linear(dim, 3 * dim + mlp_hidden_dim)  # q, k, v and the MLP's way in
        self.linear2 = nn.Linear(dim + mlp_hidden_dim, dim)  # the attention's and MLP's way out
        self.norm = QKNorm(self.head_dim)
        self.modulation = Modulation(dim, 3)

    def __call__(self, x: mx.array, pe: mx.array, mod: mx.array) -> mx.array:
        """x [B, S, D] in and out; `mod` is [B, 1, 3D]."""
        shift, scale, gate = mx.split(mod, 3, axis=-1)
        joined = self.linear1(modulated_norm(x, shift, scale))  # q, k, v, and the MLP's way in
        heads = self.qkv_dim // (3 * self.head_dim)
        q, k = turned_heads([(joined, self.norm.scales)], pe, heads, 2)
        v = values(joined[..., : self.qkv_dim], self.head_dim)
        hidden = gelu_beside(self.attention(q, k, v), joined, self.qkv_dim)
        (out,) = self.outputs((self.linear2, hidden))
        return gated_sum(x, gate, out)


class LastLayer(nn.Module):
    """The hidden state to the velocity of each latent in a token."""

    def __init__(self, dim: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, out_channels)
        self.adaLN_modulation = [nn.SiLU(), nn.Linear(dim, 2 * dim)]  # a list for BFL's name, `1`

    def modulation(self, silu_vec: mx.array) -> mx.array:
        """[..., D] to [..., 2D]: shift, then scale (diffusers stores them the other way round)."""
        return self.adaLN_modulation[1](silu_vec)

    def __call__(self, x: mx.array, mod: mx.array) -> mx.array:
        """x [B, S, D], `mod` [B, 1, 2D], to [B, S, out_channels]."""
        shift, scale = mx.split(mod, 2, axis=-1)
        return self.linear(modulated_norm(x, shift, scale))
