"""Sums of gradients without rounding, so that no split of the work changes a byte.

Floating-point sums depend on their order. Here every gradient is put on a grid of 2^-52 as int64;
integers add up to the same whatever the order, on one host or across a ring. A number of float32
below 2^-28 loses the bits that lie below the grid, always the same ones. The range is +-2048 for a
whole update, so that a sum never overflows; what lies outside is counted instead of added.

A sum is one int64 vector: the gradient [size], then `TAIL` more: how many micro-batches were out
of range or no numbers, how many images there were, and their loss on the grid.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np

GRID_BITS = 52
RANGE_BITS = 11  # of the largest sum, 2^11 = 2048
TAIL = 3


class Total(NamedTuple):
    """What a sum says of an update."""

    gradient: mx.array  # float32 [size], the mean over the images
    loss: float  # the mean over the images
    images: int
    bad: int  # micro-batches that are not in the sum


def on_grid(gradient: mx.array, loss: mx.array, images: int, parts: int) -> mx.array:
    """One micro-batch's int64 vector [size + TAIL], lazily.

    `gradient` float32 [size] and `loss` are sums over `images` images; `parts` is how many
    micro-batches the update has: each may take that share of the range.
    """
    limit = 2.0**RANGE_BITS / (parts + 1)
    everything = mx.concatenate([gradient, loss.astype(mx.float32).reshape(1)])
    fine = mx.all(mx.abs(everything) < limit)  # false for NaN too
    scaled = mx.round(mx.where(fine, everything, 0.0) * 2.0**GRID_BITS).astype(mx.int64)
    counts = mx.stack([mx.logical_not(fine).astype(mx.int64), mx.array(images, dtype=mx.int64)])
    return mx.concatenate([scaled[:-1], counts, scaled[-1:]])


def read(total: mx.array) -> Total:
    """The mean gradient and loss of a sum, zeros where it has no image; evaluates the tail only."""
    bad, images, loss = np.array(total[-TAIL:]).tolist()
    count = max(images, 1)  # none where every host was stopped before its first micro-batch
    mean = total[:-TAIL].astype(mx.float32) * 2.0**-GRID_BITS / count
    return Total(mean, loss / 2**GRID_BITS / count, images, bad)
