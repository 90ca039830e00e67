"""Backward passes written by hand, where MLX's own keep too much or don't repeat.

Stands between `models/layers.py` and `loss.py`, which puts these in a transformer's place while it
traces a gradient (`lent`). The values are those of the layers; what changes is the way back
(`kernels/ops.py` has that of the elementwise work):

- Attention computes its weights again, a few heads at a time. The kernel of cuDNN adds
  in another order every time, so that no two runs give the same bytes; on Metal MLX has none and
  keeps [B, H, S, S] of every block (Dao et al. 2022, https://arxiv.org/abs/2205.14135, whose
  arithmetic this is, without the kernel).
- A quantized matrix is unpacked for its transpose: MLX's quantized product is fast one way only,
  and on CUDA slower than unpacking either way.
- A LoRA's own gradient comes before that of what lies below it. MLX goes through a graph from its
  end, and would leave all of them for last, holding both of their operands in every block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import mlx.core as mx
import mlx.nn as nn

from fluxmesh.kernels import ops, packed_linear
from fluxmesh.models import layers
from fluxmesh.models.double_stream import DoubleStreamTransformer
from fluxmesh.planning.activations import SCORES

F = TypeVar("F", bound=Callable[..., Any])
Back = Callable[[Any, Any, Any], Any]  # of inputs, the outputs' gradients, outputs


def own_way_back(back: Back) -> Callable[[F], F]:
    """A function whose gradient `back` computes."""

    def wrap(function: F) -> F:
        made = mx.custom_function(function)
        made.vjp(back)
        return cast(F, made)

    return wrap


@functools.cache
def _weights_back() -> Callable[..., tuple[mx.array, mx.array]]:
    def back(
        weights: mx.array, slopes: mx.array, mean: mx.array, scale: mx.array, like: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Softmax's output and the gradient of its input times `scale`, in the dtype of `like`."""
        return weights.astype(like.dtype), (scale * weights * (slopes - mean)).astype(like.dtype)

    return ops.compiled(back)


def _heads_back(
    q: mx.array, k: mx.array, v: mx.array, out: mx.array, above: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Gradients of attention; all [B, H, S, hd]. Scores and their softmax are float32."""
    scale = q.shape[-1] ** -0.5
    wide_q, wide_k, wide_v, wide = (x.astype(mx.float32) for x in (q, k, v, above))
    weights = mx.softmax((wide_q * scale) @ wide_k.swapaxes(-1, -2), axis=-1)
    slopes = wide @ wide_v.swapaxes(-1, -2)
    mean = mx.sum(wide * out.astype(mx.float32), axis=-1, keepdims=True)
    narrow, slopes = _weights_back()(weights, slopes, mean, mx.array(scale), q[:1, :1, :1, :1])
    return slopes @ k, slopes.swapaxes(-1, -2) @ q, narrow.swapaxes(-1, -2) @ above


def _attention_back(
    primals: Sequence[mx.array], cotangent: mx.array, output: mx.array
) -> tuple[mx.array, ...]:
    B, H, S, hd = primals[0].shape
    every = [*primals, *(x.reshape(B, S, H, hd).swapaxes(1, 2) for x in (output, cotangent))]
    heads = max(1, SCORES // (4 * B * S * S))
    parts, before = [], cotangent
    for first in range(0, H, heads):
        some = [x[:, first : first + heads] for x in every]
        parts.append(_heads_back(*mx.depends(some, [before])))  # one group's after another's
        before = parts[-1][0]
    return tuple(mx.concatenate(list(part), axis=1) for part in zip(*parts, strict=True))


@own_way_back(_attention_back)
def attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """`layers.attention`: three [B, H, S, hd] in, [B, S, H * hd] out."""
    return layers.attention(q, k, v)


def _plus_low_rank(y: mx.array, x: mx.array, a: mx.array, b: mx.array) -> mx.array:
    return mx.addmm(y, x @ a, b)


def _plus_low_rank_back(
    primals: Sequence[mx.array], cotangent: mx.array, _output: mx.array
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    _, (y, x, a, b) = mx.vjp(_plus_low_rank, list(primals), [cotangent])
    (x,) = mx.depends([x], [a, b])
    return y, x, a, b


@own_way_back(_plus_low_rank_back)
def plus_low_rank(y: mx.array, x: mx.array, a: mx.array, b: mx.array) -> mx.array:
    """`y + (x @ a) @ b`."""
    return _plus_low_rank(y, x, a, b)


def frozen(linear: Any) -> Callable[[mx.array], mx.array]:
    """A linear that is not trained, as a function of its input alone."""
    if not isinstance(linear, nn.QuantizedLinear):
        return linear
    if ops.device() == "cuda":
        return functools.partial(packed_linear.unpacked_product, linear)

    def back(x: mx.array, cotangent: mx.array, _output: mx.array) -> mx.array:
        return packed_linear.gradient_of_rows(linear, x, cotangent)

    @own_way_back(back)
    def product(x: mx.array) -> mx.array:
        return linear(x)

    return product


@contextmanager
def lent(flow: DoubleStreamTransformer) -> Iterator[None]:
    """Makes the blocks of `flow` compute attention with this, and then again with their own."""
    try:
        for block in flow.blocks:
            block.attention = attention
        yield
    finally:
        for block in flow.blocks:
            del block.attention
