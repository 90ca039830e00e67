"""What the transformers of all families share on several hosts: sums, filling, attention on a ring.

Stands between the collectives (`collectives.py`) and a family's `parallel.py`, whose blocks call
it: `summed` in the place of `outputs` for `tensor`; the rest for `sequence`.

Shapes: B images, C tokens of this rank, S tokens in all, H heads of hd channels.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from fluxmesh.kernels.ops import Stream, turned, turned_heads
from fluxmesh.models.collectives import Pending, Ranks
from fluxmesh.models.layers import QKNorm, attention
from fluxmesh.models.lora_linear import LoRALinear
from fluxmesh.models.partition import Cut
from fluxmesh.models.slicing import cut_linear

Streams = dict[str, mx.array]  # "txt" and "img", in this order


def summed(ranks: Ranks, *calls: tuple[nn.Module, mx.array]) -> list[mx.array]:
    """Every rank's parts of a block's outputs [B, S, D], added up in one sum; then biases."""
    parts = [layer(x) for layer, x in calls]
    ends = np.cumsum([part.shape[1] for part in parts])[:-1].tolist()
    total = ranks.sum(mx.concatenate(parts, axis=1))
    totals = mx.split(total, ends, axis=1) if ends else [total]
    return [_with_bias(whole, layer) for whole, (layer, _) in zip(totals, calls, strict=True)]


def _with_bias(total: mx.array, layer: Any) -> mx.array:
    """Adds what a linear that is cut along its inputs has left out of its part of the sum."""
    linear = layer.linear if isinstance(layer, LoRALinear) else layer
    return total + linear.sum_bias if "sum_bias" in linear else total


def joined_tokens(streams: Streams) -> mx.array:
    """All of this rank's tokens [B, C, D], text first."""
    return mx.concatenate(list(streams.values()), axis=1)


def filled_up(x: mx.array, length: int, axis: int) -> mx.array:
    """`x` with zeros after it, up to `length` along `axis`."""
    missing = length - x.shape[axis]
    if not missing:
        return x
    shape = (*x.shape[:axis], missing, *x.shape[axis + 1 :])
    return mx.concatenate([x, mx.zeros(shape, x.dtype)], axis=axis)


class RingAttention:
    """Attention of this rank's C queries to all S tokens: B images, H heads of hd channels."""

    def __init__(self, ranks: Ranks, S: int, pe: mx.array) -> None:
        self.ranks, self.S, self.pe = ranks, S, pe

    def send(self, streams: list[Stream], heads: int) -> tuple[mx.array, Pending]:
        """Starts on its way what other ranks need: this rank's keys, normed and turned, and values.

        Returns what is sent, for `mx.depends`: what is computed from there on is computed after
        it, while it travels; and what gives every rank's, [N * C, B, 2, H, hd].
        """
        sent = turned(streams, self.pe, heads, 2)  # [B, C, 2, H, hd]
        sent = mx.contiguous(sent.swapaxes(0, 1))  # tokens first
        return sent, self.ranks.begin_gather(sent)

    def __call__(
        self, streams: list[Stream], heads: int, pending: Pending, *meanwhile: mx.array
    ) -> mx.array:
        """This rank's queries [B, C, H * hd] and what all ranks send, to [B, C, H * hd].

        Queries, and `meanwhile`, may be computed while it travels.
        """
        (q,) = turned_heads(streams, self.pe, heads, 1)
        every = pending.result(q, *meanwhile)
        k, v = every[: self.S].transpose(2, 1, 3, 0, 4)  # [B, H, S, hd] each
        return attention(q, k, v)


def output_rows(linear: Any, start: int, stop: int, width: int) -> Any:
    """A linear of `width` outputs that gives those from `start` to `stop`; shares its weights."""
    return cut_linear(linear, Cut(0, ((start, stop),), width), copy=False)


class Projections:
    """A fused linear's keys and values, and its queries, apart."""

    def __init__(self, linear: Any, norm: QKNorm, dim: int, width: int) -> None:
        self.q = output_rows(linear, 0, dim, width)
        self.kv = output_rows(linear, dim, 3 * dim, width)
        self.query_scale, self.key_scale = norm.scales
        self.heads = dim // self.query_scale.shape[0]

    def keys_values(self, x: mx.array) -> Stream:
        return self.kv(x), (self.key_scale,)

    def queries(self, x: mx.array) -> Stream:
        return self.q(x), (self.query_scale,)
