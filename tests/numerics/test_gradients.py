"""Backward passes written by hand: the gradients of MLX's own, in less memory."""

from __future__ import annotations

import dataclasses
import gc

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map

from fluxmesh.kernels.packed_linear import PackedLinear
from fluxmesh.models import layers
from fluxmesh.models.flux1.transformer import Flux
from fluxmesh.models.flux2.transformer import Flux2
from fluxmesh.models.registry import published, runtime_of
from fluxmesh.planning import activations
from fluxmesh.training.compute import custom_gradients, gradient_memory
from fluxmesh.training.compute.lora_layers import TrainedLoras
from fluxmesh.training.compute.loss import Batch, loss_and_gradient
from fluxmesh.training.request import TrainRequest
from tests.checkpoints import TRANSFORMER
from tests.flux2_checkpoint import TRANSFORMER as FLUX2
from tests.flux2_checkpoint import architecture_of
from tests.trainings import asked, learner, make_place


def drawn(*shape: int, seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def packed(into: int, out: int, bits: int) -> PackedLinear:
    linear = nn.Linear(into, out)
    linear.weight, linear.bias = drawn(out, into, seed=8), drawn(out, seed=9)
    return PackedLinear.from_linear(linear, 64, bits)


X = drawn(2, 3, 10, 16, seed=1)
FOUR, EIGHT = packed(128, 24, 4), packed(128, 24, 8)
CASES = {
    "attention": (
        custom_gradients.attention,
        layers.attention,
        [X, drawn(2, 3, 10, 16, seed=2), drawn(2, 3, 10, 16, seed=3)],
    ),
    "plus low rank": (
        custom_gradients.plus_low_rank,
        lambda y, x, a, b: y + x @ a @ b,
        [
            drawn(2, 7, 20, seed=2),
            drawn(2, 7, 12, seed=4),
            drawn(12, 4, seed=5),
            drawn(4, 20, seed=6),
        ],
    ),
    "four bits": (custom_gradients.frozen(FOUR), FOUR, [drawn(2, 7, 128, seed=7)]),
    "eight bits": (custom_gradients.frozen(EIGHT), EIGHT, [drawn(2, 7, 128, seed=7)]),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_mlx(name, monkeypatch):
    monkeypatch.setattr(
        custom_gradients, "SCORES", 2 * 4 * 2 * 10 * 10
    )  # two heads of three at a time
    ours, mlx_s, inputs = CASES[name]
    above = drawn(*mlx_s(*inputs).shape, seed=10)

    def both_ways(function):
        out, back = mx.vjp(lambda *x: [function(*x)], inputs, [above])
        return [np.array(x) for x in (*out, *back)]

    for actual, expected in zip(both_ways(ours), both_ways(mlx_s), strict=True):
        assert np.linalg.norm(actual - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", [name for name in CASES if "bits" not in name])
def test_half_precision_stays_what_it_is(name):
    ours, _, inputs = CASES[name]
    inputs = [x.astype(mx.bfloat16) for x in inputs]
    above = ours(*inputs)
    _, back = mx.vjp(lambda *x: [ours(*x)], inputs, [above])
    assert {x.dtype for x in (above, *back)} == {mx.bfloat16}


def test_a_linear_that_is_not_packed_is_left_alone():
    linear = nn.Linear(4, 4)
    assert custom_gradients.frozen(linear) is linear


@pytest.mark.parametrize("flux", [Flux(TRANSFORMER), Flux2(FLUX2)], ids=["FLUX.1", "FLUX.2"])
def test_attention_is_lent_and_given_back_even_after_an_error(flux):
    blocks = [*flux.double_blocks, *flux.single_blocks]
    with pytest.raises(ZeroDivisionError), custom_gradients.lent(flux):
        assert all(block.attention is custom_gradients.attention for block in blocks)
        raise ZeroDivisionError
    assert all(block.attention is layers.attention for block in blocks)


# --- memory --------------------------------------------------------------------------------------

TEXT, SIDE, WIDE = 64, 12, 128  # tokens, rows and columns of tokens, hidden size
ACTIVATION = 4 * (TEXT + SIDE * SIDE) * WIDE  # bytes


def peak(family: str, singles: int, checkpoint: bool) -> float:
    """Of a gradient beside what is held, in activations, with nothing queued ahead."""
    known = published("dev") if family == "FLUX.1" else architecture_of("klein")
    config = dataclasses.replace(
        TRANSFORMER if family == "FLUX.1" else FLUX2,
        hidden_size=WIDE,
        num_heads=2,
        axes_dim=(16, 24, 24) if family == "FLUX.1" else (16, 16, 16, 16),
        depth=1,
        depth_single_blocks=singles,
    )
    runtime = runtime_of(dataclasses.replace(known, transformer=config))
    flux = runtime.build("transformer")
    flux.update(tree_map(lambda x: 0.05 * drawn(*x.shape, seed=1), flux.parameters()))
    adapters = TrainedLoras(flux, runtime.architecture, TrainRequest("data", 1, lora_rank=2))
    shapes = {name: x.shape for name, x in runtime.blank(mx.float32).items()}
    batch = Batch(
        drawn(1, SIDE * SIDE, config.in_channels, seed=2),
        drawn(1, SIDE * SIDE, config.in_channels, seed=3),
        mx.array([0.5]),
        {
            name: drawn(1, *((TEXT, shape[2]) if len(shape) == 3 else shape[1:]), seed=4)
            for name, shape in shapes.items()
        },
        (SIDE, SIDE),
    )
    assert batch.tokens == TEXT + SIDE * SIDE
    mx.eval(flux.parameters(), adapters.weights(), batch[:4])
    gc.collect()  # what other tests have left
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    with gradient_memory.bounded(0):
        mx.eval(loss_and_gradient(runtime, adapters, batch, 4.0, None, checkpoint))
    return (mx.get_peak_memory() - before) / ACTIVATION


@pytest.mark.parametrize(("checkpoint", "most"), [(True, activations.KEPT), (False, 28)])
@pytest.mark.parametrize("family", ["FLUX.1", "FLUX.2"])
def test_a_block_leaves_little_behind(family, checkpoint, most):
    """Without these backward passes it is 7.5 with checkpointing, and 36 without.

    A thread of MLX that frees a moment late adds to a peak, never takes away: the least of three.
    """
    few, many = (min(peak(family, singles, checkpoint) for _ in range(3)) for singles in (2, 6))
    assert 0.9 < (many - few) / 4 <= most
    if checkpoint:
        assert many <= activations.KEPT * 7 + activations.IN_USE


def test_the_limit_of_memory_holds_while_a_gradient_is_computed(tmp_path, monkeypatch):
    place = make_place(tmp_path)
    limits = []
    own = mx.set_memory_limit

    def watch(limit):
        limits.append(limit)
        return own(limit)

    monkeypatch.setattr(mx, "set_memory_limit", watch)
    for kept in (False, True):
        made = learner(asked(place, tmp_path / "out", grad_checkpoint=kept))
        before = mx.get_memory_limit()
        limits.clear()  # those of encoding the pictures
        made.total(range(2), 2)
        assert mx.get_memory_limit() == before
        if kept:
            assert len(limits) == 4 and limits[1] == limits[3] == before
            (part,) = made.plan.parts(1)
            batch = made.batch(part)
            tokens = len(part.items) * (batch.clean.shape[1] + batch.features["t5"].shape[1])
            assert batch.tokens == tokens
            room = gradient_memory.needed(made.architecture.shape, 4, tokens, made.adapters.size)
            assert 0 < limits[2] - room < mx.get_peak_memory()
        else:
            assert limits == []
