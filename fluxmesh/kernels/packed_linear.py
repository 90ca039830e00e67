"""A quantized linear, and two ways to multiply with it.

MLX's quantized product reads each packed weight once and unpacks it inside: the best there is for
few rows. For the thousands of tokens of a picture arithmetic is what takes the time, and on CUDA
that product reaches a quarter of what a plain one does. There, from `MANY_ROWS` rows on, the whole
matrix is unpacked first, to the dtype of its scales, and multiplied as a plain one: the same
weights, their products added in another order. On a CPU that product unpacks number by number, for
each row again, and in half precision adds so too: 64 rows take 25 times as long as with a plain
matrix, and a single one longer than unpacking and a plain product. There half precision is always
unpacked first. Everywhere else nothing changes.

The unpacked matrix is gone after its product. It is made no earlier than the rows that it is
multiplied with, and how many of them MLX may queue is bounded with everything else that waits for
the device (`engine/device_memory.py`). Nor does a gradient keep it: it is unpacked again on the way
back.

Below `models/slicing.py` and `weights/loading.py`, which make these, and
`training/compute/custom_gradients.py`; adapters stand around them as around any linear.
"""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from fluxmesh.kernels import ops
from fluxmesh.kernels.ops import device

# Rows from which on unpacking pays on CUDA: `python -m benchmarks.packed` prints where, by bits.
MANY_ROWS = 256


class PackedLinear(nn.QuantizedLinear):
    """`nn.QuantizedLinear`, which multiplies many rows in the way that suits the device."""

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., in] to [..., out], in the wider dtype of x and the scales."""
        if pays_unpacked(self, x):
            return unpacked_product(self, x)
        return cast(mx.array, super().__call__(x))


def pays_unpacked(linear: nn.QuantizedLinear, x: mx.array) -> bool:
    """Whether this device multiplies x [..., in] faster with the unpacked matrix of `linear`."""
    if device() == "cuda":
        return x.size >= MANY_ROWS * x.shape[-1]
    return device() == "cpu" and mx.float32 not in (x.dtype, linear.scales.dtype)


def unpacked(linear: nn.QuantizedLinear, when: mx.array) -> mx.array:
    """A quantized linear's matrix [out, in], in its scales' dtype, not before `when` is there."""
    packed, scales, biases = mx.depends([linear.weight, linear.scales, linear.biases], [when])
    return ops.unpacked(packed, scales, biases, linear.group_size, linear.bits)


def unpacked_product(linear: nn.QuantizedLinear, x: mx.array) -> mx.array:
    """What `linear` gives for x [..., in], by its unpacked matrix; so is the gradient of x.

    The linear itself is a constant: it has no gradient.
    """

    @mx.custom_function
    def product(x: mx.array) -> mx.array:
        weight = unpacked(linear, x).T
        return mx.addmm(linear.bias, x, weight) if "bias" in linear else x @ weight

    @product.vjp
    def back(x: mx.array, above: mx.array, _output: mx.array) -> mx.array:
        return gradient_of_rows(linear, x, above)

    return cast(mx.array, product(x))


def gradient_of_rows(linear: Any, x: mx.array, above: mx.array) -> mx.array:
    """The gradient of what a quantized linear was given, x, from that of what it gave."""
    return (above @ unpacked(linear, above)).astype(x.dtype)
