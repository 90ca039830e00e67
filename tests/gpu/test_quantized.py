"""`make gpu`: quantized products of many rows, and the order that a benchmark's kernel keeps."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from benchmarks.overlap_ways import by_edge, edge
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


@pytest.mark.parametrize("size", [8, 128, 3 * 2304 * 128])
def test_an_edge_is_a_copy(size: int) -> None:
    x, before = drawn(size, seed=1), drawn(3, 40, seed=2)
    assert mx.array_equal(edge(x, before), x)
    assert mx.array_equal(edge(x, before, before + 1), x)


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_behind_an_edge_is_the_same(bias: bool) -> None:
    linear = nn.Linear(512, 384, bias)
    linear.set_dtype(mx.bfloat16)
    x, before = drawn(1, 600, 512, seed=1), drawn(16, seed=2)
    apart = fusing.worst(
        [np.array(by_edge(linear, x, before).astype(mx.float32))],
        [np.array(linear(x).astype(mx.float32))],
    )
    assert apart < 5e-3
