"""`make gpu`: quantized products of many rows, and the matrices unpacked for them."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from fluxmesh.kernels import ops
from fluxmesh.kernels.packed_linear import MANY_ROWS, PackedLinear
from tests import fusing


def drawn(*shape: int, seed: int) -> mx.array:
    return mx.random.normal(shape, dtype=mx.bfloat16, key=mx.random.key(seed))


@pytest.mark.parametrize("rows", [1, MANY_ROWS - 1, MANY_ROWS, 2304])
@pytest.mark.parametrize("bits", [3, 4, 5, 6, 8])
def test_a_quantized_product_is_as_near_as_mlx_s_own(bits: int, rows: int) -> None:
    linear = nn.Linear(512, 384)
    linear.weight, linear.bias = drawn(384, 512, seed=1), drawn(384, seed=2)
    packed = PackedLinear.from_linear(linear, 64, bits)
    x = drawn(1, rows, 512, seed=3)
    parts = (packed.weight, packed.scales.astype(mx.float32), packed.biases.astype(mx.float32))
    weight = np.array(mx.dequantize(*parts, 64, bits))
    exact = np.array(x.astype(mx.float32)) @ weight.T + np.array(linear.bias.astype(mx.float32))
    own = nn.QuantizedLinear.__call__(packed, x)
    bound = max(5e-3, 1.2 * fusing.worst([np.array(own.astype(mx.float32))], [exact]))
    assert fusing.worst([np.array(packed(x).astype(mx.float32))], [exact]) < bound


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_a_matrix_is_unpacked_as_mlx_unpacks_it(bits: int, dtype: mx.Dtype) -> None:
    packed = mx.quantize(drawn(384, 512, seed=1).astype(dtype), group_size=64, bits=bits)
    wide = [packed[0], *(part.astype(mx.float32) for part in packed[1:])]
    exact = mx.dequantize(*wide, 64, bits)
    actual = ops.unpacked(*packed, 64, bits)
    assert actual.dtype == dtype
    assert mx.array_equal(actual, exact.astype(dtype))  # rounded once
