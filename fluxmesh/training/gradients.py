"""Backward passes written by hand, where MLX's own keep too much or don't repeat.

Stands between `flux/layers.py` and `step.py`, which puts these in a transformer's place while it
traces a gradient (`lent`). The values are those of the layers; what changes is the way back
(`flux/fused.py` has that of the elementwise work):

- Attention computes its weights again, a few heads at a time, in float32. The kernel of cuDNN adds
  in another order every time, so that no two runs give the same bytes; on Metal MLX has none and
  keeps [B, H, S, S] of every block (Dao et al. 2022, https://arxiv.org/abs/2205.14135, whose
  arithmetic this is, without the kernel).
- A quantized matrix is unpacked for its transpose: MLX's quantized product is fast one way only.
- A LoRA's own gradient comes before that of what lies below it. MLX goes through a graph from its
  end, and would leave all of them for last, holding both of their operands in every block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import mlx.core as mx
import mlx.nn as nn

from fluxmesh.flux import layers
from fluxmesh.flux.model import Flux

SCORES = 64 * 2**20  # bytes of attention weights at a time, on the way back

F = TypeVar("F", bound=Callable[..., Any])
Back = Callable[[Any, Any, Any], Any]  # of inputs, the outputs' gradients, outputs


def own_way_back(back: Back) -> Callable[[F], F]:
    """A function whose gradient `back` computes."""

    def wrap(function: F) -> F:
        made = mx.custom_function(function)
        made.vjp(back)
        return cast(F, made)

    return wrap


def _plain_attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    q, k, v = (x.astype(mx.float32) for x in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.swapaxes(-1, -2)
    return mx.softmax(scores, axis=-1) @ v  # [B, H, S, hd]


def _attention_back(
    primals: Sequence[mx.array], cotangent: mx.array, _output: mx.array
) -> tuple[mx.array, ...]:
    B, H, S, hd = primals[0].shape
    above = cotangent.reshape(B, S, H, hd).swapaxes(1, 2)
    heads = max(1, SCORES // (4 * B * S * S))
    parts, before = [], cotangent
    for first in range(0, H, heads):
        some = [x[:, first : first + heads] for x in primals]
        some = mx.depends(some, [before])  # one group's weights after another's
        one = above[:, first : first + heads].astype(mx.float32)
        parts.append(mx.vjp(_plain_attention, some, [one])[1])
        before = parts[-1][0]
    return tuple(mx.concatenate(list(part), axis=1) for part in zip(*parts, strict=True))


@own_way_back(_attention_back)
def attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """`layers.attention`: three [B, H, S, hd] in, [B, S, H * hd] out."""
    return layers.attention(q, k, v)


def _low_rank_back(
    primals: Sequence[mx.array], cotangent: mx.array, _output: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    _, (x, a, b) = mx.vjp(lambda x, a, b: (x @ a) @ b, list(primals), [cotangent])
    (x,) = mx.depends([x], [a, b])
    return x, a, b


@own_way_back(_low_rank_back)
def low_rank(x: mx.array, a: mx.array, b: mx.array) -> mx.array:
    """`(x @ a) @ b`."""
    return (x @ a) @ b


def frozen(linear: Any) -> Callable[[mx.array], mx.array]:
    """A linear that is not trained, as a function of its input alone."""
    if not isinstance(linear, nn.QuantizedLinear):
        return linear

    def back(x: mx.array, cotangent: mx.array, _output: mx.array) -> mx.array:
        packed, scales, biases = mx.depends(
            [linear.weight, linear.scales, linear.biases], [cotangent]
        )
        weight = mx.dequantize(packed, scales, biases, linear.group_size, linear.bits)
        return (cotangent @ weight).astype(x.dtype)

    @own_way_back(back)
    def product(x: mx.array) -> mx.array:
        return linear(x)

    return product


@contextmanager
def lent(flux: Flux) -> Iterator[None]:
    """Makes the blocks of `flux` compute attention with this, and then again with their own."""
    blocks: list[Any] = [*flux.double_blocks, *flux.single_blocks]
    try:
        for block in blocks:
            block.attention = attention
        yield
    finally:
        for block in blocks:
            del block.attention
