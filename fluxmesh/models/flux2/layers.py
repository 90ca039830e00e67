"""The blocks of the FLUX.2 transformer.

Stands below `transformer.py`, which strings these together, and above `models/layers.py`, whose
notes on names and shapes hold here. Unlike FLUX.1's, blocks have no modulation of their own: all
double blocks share one, all single blocks another. MLPs are gated (SwiGLU), and nothing has a bias.

A block's attention may have more keys than tokens: those of reference pictures that were computed
before (`transformer.py`, `remember`).

Source: black-forest-labs/flux2 `src/flux2/model.py`.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from fluxmesh.kernels.ops import (
    gated_norm,
    gated_sum,
    modulated_norm,
    swiglu,
    swiglu_beside,
    turned_heads,
)
from fluxmesh.models.double_stream import DoubleBlock, KeysValues, SingleBlock
from fluxmesh.models.layers import SelfAttention, run


class GatedMLP(nn.Module):
    """SwiGLU as a layer without parameters: [..., 2M] to [..., M], the gate first."""

    def __call__(self, x: mx.array) -> mx.array:
        return swiglu(x)


def feed_forward(dim: int, hidden_dim: int) -> list[nn.Module]:
    """A plain list, not `nn.Sequential`, so that the parameters are called `0` and `2` as BFL's."""
    return [
        nn.Linear(dim, 2 * hidden_dim, bias=False),
        GatedMLP(),
        nn.Linear(hidden_dim, dim, bias=False),
    ]


class Flux2DoubleBlock(DoubleBlock):
    """Image and text keep weights of their own and meet in one attention."""

    def __init__(self, dim: int, num_heads: int, mlp_hidden_dim: int) -> None:
        super().__init__()
        self.img_attn = SelfAttention(dim, num_heads, bias=False)
        self.img_mlp = feed_forward(dim, mlp_hidden_dim)
        self.txt_attn = SelfAttention(dim, num_heads, bias=False)
        self.txt_mlp = feed_forward(dim, mlp_hidden_dim)

    def remember(self, img: mx.array, pe: mx.array, mod: mx.array) -> tuple[mx.array, KeysValues]:
        """Image tokens [B, R, D] that attend to one another alone, through this block.

        Gives them as they leave it, and the keys and values that other tokens may attend to.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = mx.split(mod, 6, axis=-1)
        stream = self.img_attn.stream(modulated_norm(img, shift1, scale1))
        heads = stream[0].shape[-1] // (3 * self.img_attn.head_dim)
        q, k, v = turned_heads([stream], pe, heads, 3)
        (out,) = self.outputs((self.img_attn.proj, self.attention(q, k, v)))
        img, normed = gated_norm(img, gate1, out, shift2, scale2)
        (out,) = self.outputs((self.img_mlp[2], run(self.img_mlp[:2], normed)))
        return gated_sum(img, gate2, out), KeysValues(k, v)


class Flux2SingleBlock(SingleBlock):
    """Text and image as one sequence."""

    def __init__(self, dim: int, num_heads: int, mlp_hidden_dim: int) -> None:
        super().__init__(dim, num_heads, mlp_hidden_dim, inner=2 * mlp_hidden_dim, bias=False)

    def beside(self, attn: mx.array, joined: mx.array, start: int) -> mx.array:
        return swiglu_beside(attn, joined, start)

    def remember(self, x: mx.array, pe: mx.array, mod: mx.array) -> tuple[mx.array, KeysValues]:
        """As `Flux2DoubleBlock.remember`."""
        return self._run(x, pe, mod, None)
