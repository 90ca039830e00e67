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

from fluxmesh.kernels.ops import gelu, gelu_beside
from fluxmesh.models.double_stream import DoubleBlock, SingleBlock
from fluxmesh.models.layers import Modulation, SelfAttention


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


class SingleStreamBlock(SingleBlock):
    """Text and image as one sequence, with a modulation of its own."""

    def __init__(self, dim: int, num_heads: int, mlp_hidden_dim: int) -> None:
        super().__init__(dim, num_heads, mlp_hidden_dim, inner=mlp_hidden_dim)
        self.modulation = Modulation(dim, 3)

    def beside(self, attn: mx.array, joined: mx.array, start: int) -> mx.array:
        return gelu_beside(attn, joined, start)
