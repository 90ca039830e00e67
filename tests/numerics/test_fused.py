"""Elementwise work: the plain forms are what they say, and so are gradients written by hand."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from fluxmesh.kernels import ops
from tests import fusing

SHAPE = fusing.Shape(2, 11, 4, 3, 16)


@pytest.mark.parametrize("name", fusing.NAMES)
def test_an_operation_and_its_gradient_are_those_of_the_plain_form(name, monkeypatch):
    case = fusing.make(name, SHAPE, mx.float32)
    actual = fusing.values_and_gradients(case.fused, case)
    monkeypatch.setattr(ops, "rotate", ops._rotated)  # MLX's own gradient
    wanted = fusing.values_and_gradients(case.plain, case)
    assert fusing.worst(actual, wanted) < 2e-6


@pytest.mark.parametrize("name", fusing.NAMES)
def test_compiled_forms_give_the_same(name):
    case = fusing.make(name, SHAPE, mx.float32)
    compiled = fusing.values_and_gradients(mx.compile(case.fused), case)
    assert fusing.worst(compiled, fusing.values_and_gradients(case.fused, case)) < 2e-6


def normal(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def test_a_norm_is_scaled_and_shifted():
    x, shift, scale = normal(2, 5, 24, seed=1), normal(2, 1, 24, seed=2), normal(2, 1, 24, seed=3)
    centred = x - x.mean(-1, keepdims=True)
    wanted = (1 + scale) * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) + shift
    modulated = ops.modulated_norm(*map(mx.array, (x, shift, scale)))
    np.testing.assert_allclose(np.array(modulated), wanted, atol=2e-6)
    y, gate = normal(2, 5, 24, seed=4), normal(2, 1, 24, seed=5)
    total, normed = ops.gated_norm(*map(mx.array, (x, gate, y, shift, scale)))
    np.testing.assert_allclose(np.array(total), x + gate * y, atol=2e-6)
    again = ops.modulated_norm(total, mx.array(shift), mx.array(scale))
    np.testing.assert_allclose(np.array(normed), np.array(again), atol=2e-6)


def test_pairs_of_channels_turn_by_their_angles():
    x, angles = normal(2, 3, 8, seed=1), normal(3, 4, seed=2)
    pe = np.stack([np.cos(angles), np.sin(angles)], -1)
    turned = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)
    rotated = np.array(ops.rotate(mx.array(x), mx.array(pe)))
    np.testing.assert_allclose(rotated[..., ::2], turned.real, atol=2e-6)
    np.testing.assert_allclose(rotated[..., 1::2], turned.imag, atol=2e-6)


def test_groups_of_channels_are_normed_over_the_picture():
    x, offset = 2 * normal(2, 3, 5, 12, seed=1) + 3, normal(12, seed=2)
    weight, bias = normal(12, seed=3), normal(12, seed=4)
    y = (x + offset).reshape(2, 15, 4, 3)
    y = (y - y.mean((1, 3), keepdims=True)) / np.sqrt(y.var((1, 3), keepdims=True) + 1e-6)
    y = y.reshape(x.shape) * weight + bias
    arrays = [mx.array(part) for part in (x, weight, bias, offset)]
    output = np.array(ops.group_norm(*arrays, groups=4, silu=False))
    np.testing.assert_allclose(output, y, atol=1e-5)
    output = np.array(ops.group_norm(*arrays, groups=4, silu=True))
    np.testing.assert_allclose(output, y / (1 + np.exp(-y)), atol=1e-5)
    total = ops.offset_sum(arrays[0], arrays[0], arrays[3])
    np.testing.assert_allclose(np.array(total), 2 * x + offset, atol=2e-6)
