"""Sums of gradients as integers: the same bytes in any order, and nothing overflows silently."""

from __future__ import annotations

from fractions import Fraction

import mlx.core as mx
import numpy as np
import pytest

from fluxmesh.training.compute import exact_sum


def parts(count: int, size: int = 64) -> list[np.ndarray]:
    """Gradients of very different sizes, in float32."""
    rng = np.random.default_rng(1)
    scale = 10.0 ** rng.integers(-9, 2, (count, size))
    return list((rng.standard_normal((count, size)) * scale).astype(np.float32))


def grid(gradient: np.ndarray, loss: float = 1.5, images: int = 2, of: int = 8) -> mx.array:
    return exact_sum.on_grid(mx.array(gradient), mx.array(loss), images, of)


def added(vectors: list[mx.array]) -> mx.array:
    total = vectors[0]
    for vector in vectors[1:]:
        total = total + vector
    return total


def test_any_order_and_any_split_give_the_same_bytes():
    vectors = [grid(part) for part in parts(8)]
    whole = exact_sum.read(added(vectors))
    for order in ([7, 2, 5, 0, 1, 6, 3, 4], [0, 4, 1, 5, 2, 6, 3, 7]):
        shuffled = [vectors[i] for i in order]
        hosts = [added(shuffled[:3]), added(shuffled[3:6]), added(shuffled[6:])]
        again = exact_sum.read(added(hosts[::-1]))
        assert np.array(again.gradient).tobytes() == np.array(whole.gradient).tobytes()
        assert again.loss == whole.loss
    plain = [np.sum(np.stack(order), axis=0) for order in (parts(8), parts(8)[::-1])]
    assert plain[0].tobytes() != plain[1].tobytes()  # as float32 they depend on the order


def test_the_sum_is_that_of_exact_arithmetic():
    total = exact_sum.read(added([grid(part) for part in parts(8)]))
    for i in range(64):
        true = sum(Fraction(float(part[i])) for part in parts(8)) / 16  # 8 of 2 images each
        assert abs(Fraction(float(np.array(total.gradient)[i])) - true) <= max(
            abs(true) * Fraction(2) ** -22, Fraction(2) ** -50
        )
    assert (total.images, total.bad) == (16, 0)
    assert total.loss == pytest.approx(1.5 / 2, rel=1e-7)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2048.0 / 9, -1e30])
def test_a_gradient_out_of_range_is_counted_and_kept_out(value):
    good, bad = parts(2)
    bad[3] = value
    total = exact_sum.read(added([grid(good), grid(bad)]))
    assert total.bad == 1
    alone = exact_sum.read(added([grid(good), grid(np.zeros_like(bad), loss=0.0)]))
    assert np.array(total.gradient).tobytes() == np.array(alone.gradient).tobytes()
    assert exact_sum.read(grid(good, loss=float("nan"))).bad == 1


def test_the_largest_gradients_that_are_let_through_do_not_overflow():
    of = 1024
    most = np.full(4, np.nextafter(np.float32(2048 / (of + 1)), np.float32(0)), np.float32)
    part = grid(most, of=of)
    assert exact_sum.read(part).bad == 0
    assert exact_sum.read(part * of).gradient.tolist() == pytest.approx(
        (most * of / 2 / of).tolist()
    )
