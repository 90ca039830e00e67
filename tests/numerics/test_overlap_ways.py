"""Each way of the benchmark of overlap computes what the tree's placements do."""

from __future__ import annotations

import functools
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map_with_path

from benchmarks.overlap import WAYS, typical
from benchmarks.overlap_ways import LoneRank, flow_of
from benchmarks.sizes import SMALL_TRANSFORMERS
from fluxmesh.models.flux1.parallel import SequenceFlux, TensorFlux
from fluxmesh.models.flux1.transformer import Flux
from fluxmesh.models.flux2.config import Flux2Config
from fluxmesh.models.flux2.parallel import SequenceFlux2, TensorFlux2
from fluxmesh.models.flux2.transformer import Flux2

SPREAD = [way for way in WAYS if way != "one" and not way.startswith("bare gathers")]
TEXT, ROWS, COLUMNS = 3, 2, 5  # tokens: 13 together, which neither 2 nor 3 ranks share evenly


@functools.cache
def random_model(name: str) -> Any:
    config = SMALL_TRANSFORMERS[name]
    model = Flux2(config) if isinstance(config, Flux2Config) else Flux(config)
    rng = np.random.default_rng(1)

    def draw(path: str, array: mx.array) -> mx.array:
        values = rng.standard_normal(array.shape)
        if path.endswith("scale"):
            return mx.array(1 + 0.2 * values, mx.float32)
        return mx.array(values * (array.shape[-1] ** -0.5 if array.ndim > 1 else 0.3), mx.float32)

    model.update(tree_map_with_path(draw, model.parameters()))
    return model


def step(flow: Any) -> np.ndarray:
    """A velocity of random latents."""
    config = flow.config
    rng = np.random.default_rng(2)
    tokens = ROWS * COLUMNS
    img = mx.array(rng.standard_normal((1, tokens, config.in_channels)), mx.float32)
    txt = mx.array(rng.standard_normal((1, TEXT, config.context_in_dim)), mx.float32)
    axes = len(config.axes_dim)
    ids = rng.integers(0, 9, (TEXT + tokens, axes))
    pe = flow.rope(ids[:TEXT], ids[TEXT:])
    times = mx.array([0.7])
    if isinstance(config, Flux2Config):
        modulation = flow.modulations(times, 4.0).at(0)
    else:
        y = mx.array(rng.standard_normal((1, config.vec_in_dim)), mx.float32)
        modulation = flow.modulations(times, y, 4.0).at(0)
    return np.array(flow(img, txt, pe, modulation))


@functools.cache
def expected(name: str, rank: int, size: int, is_tensor: bool) -> np.ndarray:
    """What the tree's own placement gives, where everyone sends what this rank does."""
    whole, ranks = random_model(name), LoneRank(rank, size)
    if isinstance(whole, Flux2):
        return step((TensorFlux2 if is_tensor else SequenceFlux2)(whole, ranks))
    return step((TensorFlux if is_tensor else SequenceFlux)(whole, ranks))


@pytest.mark.parametrize("way", SPREAD)
@pytest.mark.parametrize("name", ["dev", "klein-4b"])
@pytest.mark.parametrize(("rank", "size"), [(0, 2), (1, 2), (2, 3)])
def test_a_way_computes_what_the_tree_does(name: str, way: str, rank: int, size: int) -> None:
    whole = random_model(name)
    is_tensor = "tensor" in way
    if is_tensor and whole.config.num_heads % size:
        size, rank = 2, rank % 2
    ranks = LoneRank(rank, size)
    actual = step(flow_of(way, whole, ranks))
    wanted = expected(name, rank, size, is_tensor)
    assert actual.shape == wanted.shape
    assert np.linalg.norm(actual - wanted) <= 1e-5 * np.linalg.norm(wanted)
    again = step(flow_of("tensor" if is_tensor else "tree", whole, ranks))
    assert np.array_equal(again, wanted)  # a way leaves the whole as it was


def test_a_step_that_was_begun_ahead_counts_with_its_neighbours() -> None:
    assert typical([0.3, 0.1, 0.2, 0.3, 0.1, 0.2]) == pytest.approx(0.2)
    assert typical([0.4]) == 0.4
