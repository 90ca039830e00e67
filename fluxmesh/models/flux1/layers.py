"""The blocks of the FLUX.1 transformer.

Stands below `transformer.py`, which strings these together, and above `models/layers.py`, whose
notes on names and shapes hold here. A block has a modulation of its own, and biases everywhere.

Sources: adaptive layer norm with gates (adaLN-Zero), Peebles & Xie 2023
(https://arxiv.org/abs/2212.09748); two streams joined in attention, Esser et al. 2024
(https://arxiv.org/abs/2403.03206); attention beside MLP in one block, Dehghani et al. 2023
(https://arxiv.org/abs/2302.05442).
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from fluxmesh.kernels.ops import (
    gated_sum,
    gelu,
    gelu_beside,
    modulated_norm,
    turned_heads,
)
from fluxmesh.models.double_stream import DoubleBlock
from fluxmesh.models.layers import (
    TIME_CHANNELS,
    LastLayer,
    MLPEmbedder,
    Modulation,
    QKNorm,
    RMSNorm,
    SelfAttention,
    attention,
    outputs,
    rope_tables,
    run,
    timestep_embedding,
    values,
)

__all__ = [
    "TIME_CHANNELS",
    "DoubleStreamBlock",
    "LastLayer",
    "MLPEmbedder",
    "QKNorm",
    "RMSNorm",
    "SingleStreamBlock",
    "attention",
    "rope_tables",
    "run",
    "timestep_embedding",
]


class GELU(nn.Module):
    """The tanh form, as a layer without parameters."""

    def __call__(self, x: mx.array) -> mx.array:
        return gelu(x)


def feed_forward(dim: int, hidden_dim: int) -> list[nn.Module]:
    """A plain list, not `nn.Sequential`, so that the parameters are called `0` and `2` as BFL's."""
    return [nn.Linear(dim, hidden_dim), GELU(), nn.Linear(hidden_dim, dim)]


class DoubleStreamBlock(DoubleBlock):
    """Image and text keep weights of their own and meet in one attention."""

    def __init__(self, dim: int, num_heads: int, mlp_hidden_dim: int) -> None:
        super().__init__()
        self.img_mod = Modulation(dim, 6)
        self.img_attn = SelfAttention(dim, num_heads)
        self.img_mlp = feed_forward(dim, mlp_hidden_dim)
        self.txt_mod = Modulation(dim, 6)
        self.txt_attn = SelfAttention(dim, num_heads)
        self.txt_mlp = feed_forward(dim, mlp_hidden_dim)


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
