"""FLUX.2 on two, three and four real ranks on loopback, held to one host; and shards without."""

from __future__ import annotations

import functools
import weakref
from dataclasses import replace
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from fluxmesh.errors import UsageError
from fluxmesh.models.collectives import Ranks
from fluxmesh.models.flux2.config import Flux2Config
from fluxmesh.models.flux2.parallel import SequenceFlux2, TensorFlux2
from fluxmesh.models.flux2.partition import cuts, partition
from fluxmesh.models.flux2.positions import image_positions, text_positions
from fluxmesh.models.flux2.transformer import Flux2
from fluxmesh.models.partition import Shard
from fluxmesh.models.slicing import shard_of
from tests.parallel import flux2_cases
from tests.parallel.flux2_cases import (
    ODD,
    REFERENCES,
    WAITING_SIZES,
    Flux2Case,
    cases,
    flux_of,
    quantizable,
)
from tests.parallel.ring import once, run_ranks, written
from tests.shards import used

SIZES = (2, 3, 4)
TIMEOUT = 250.0  # of all ranks together: a hang is a failure, not a wait
# Whoever needs a ring first runs it for all tests, and others wait for it.
pytestmark = pytest.mark.timeout(300)
CASES = {case.name: case for case in cases(2) if case.placement == "tensor"}
NAMES = [name for name, case in CASES.items() if not case.cache]
EXACT = [name for name in NAMES if CASES[name].dtype == "float32"]


class Flux2Result(NamedTuple):
    """A case on N ranks, and on one host."""

    case: Flux2Case
    latents: list[np.ndarray]  # of each rank
    did: list[dict[str, Any]]  # by each rank
    on_host: list[tuple[np.ndarray, dict[str, Any]]]  # where hosts wait for collectives
    expected: np.ndarray
    one_did: dict[str, Any]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    @functools.cache
    def ranks(size: int) -> list[tuple[Any, dict[str, Any]]]:
        folder = once(
            tmp_path_factory,
            f"flux2-parallel-{size}",
            lambda here: run_ranks(size, [str(size)], here, TIMEOUT, "flux2_cases"),
        )
        return [written(folder, rank) for rank in range(size)]

    @functools.cache
    def alone(case: Flux2Case) -> tuple[np.ndarray, dict[str, Any]]:
        return flux2_cases.run(case, None)

    def find(size: int, name: str, placement: str) -> Flux2Result:
        (case,) = (c for c in cases(size) if (c.name, c.placement) == (name, placement))
        key = f"{name}/{placement}"
        every = ranks(size)
        expected, one_did = alone(replace(case, placement="one"))
        return Flux2Result(
            case,
            [latents[key] for latents, _ in every],
            [did[key] for _, did in every],
            [
                (latents[f"{key}/on host"], did[f"{key}/on host"])
                for latents, did in every
                if size in WAITING_SIZES
            ],
            expected,
            one_did,
        )

    return find


def error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("placement", ["tensor", "sequence"])
@pytest.mark.parametrize("name", EXACT)
def test_many_hosts_paint_what_one_paints(result, size, placement, name):
    outcome = result(size, name, placement)
    assert outcome.expected.dtype == np.float32 and outcome.expected.std() > 0.3
    for latents in outcome.latents:
        assert error(latents, outcome.expected) <= 1e-5


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("placement", ["tensor", "sequence"])
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_two_bytes_a_number_are_no_worse_than_twice_one_hosts(result, size, placement, name):
    outcome = result(size, name, placement)
    exact = result(size, "odd", placement).expected
    one_host = error(outcome.expected, exact)
    assert one_host > 1e-5  # rounding is at work
    assert error(outcome.latents[0], exact) <= 2 * one_host


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("placement", ["tensor", "sequence"])
def test_every_rank_has_the_same_whole_latents(result, size, placement):
    for name in CASES:
        outcome = result(size, name, placement)
        for latents, did in zip(outcome.latents, outcome.did, strict=True):
            assert latents.shape == outcome.expected.shape and did["dtype"] == "mlx.core.float32"
            assert latents.tobytes() == outcome.latents[0].tobytes(), name


@pytest.mark.parametrize("size", WAITING_SIZES)
@pytest.mark.parametrize("placement", ["tensor", "sequence"])
@pytest.mark.parametrize("name", CASES)
def test_a_host_that_waits_for_collectives_gets_what_the_graph_gets(result, size, placement, name):
    outcome = result(size, name, placement)
    assert len(outcome.on_host) == size
    for (waited, did), lazy, expected in zip(
        outcome.on_host, outcome.latents, outcome.did, strict=True
    ):
        assert waited.tobytes() == lazy.tobytes()
        assert did == expected  # work, collectives, bytes sent, steps reused


def tokens_of(case: Flux2Case) -> int:
    """All that pass through the blocks at a step."""
    more = sum(rows * columns for rows, columns in REFERENCES)
    own = case.text_tokens + case.image_tokens
    return own + (more if case.references == "at every step" else 0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_tensor_sums_twice_a_double_block_and_once_a_single_block(result, size, name):
    outcome = result(size, name, "tensor")
    case, config = outcome.case, outcome.case.config
    number = 4 if case.dtype == "float32" else 2
    sums = (2 * config.depth + config.depth_single_blocks) * case.steps * case.calls
    activations = tokens_of(case) * config.hidden_size * number
    traffic = {
        "sums": sums,
        "gathers": 0,
        "bytes": sums * (2 * (size - 1) * activations // size),
    }
    for did in outcome.did:
        assert did["traffic"] == traffic
        remembered = case.references == "remembered"
        assert did["before"]["sums"] == (sums // case.steps if remembered else 0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_sequence_gathers_once_a_block_and_once_a_step(result, size, name):
    outcome = result(size, name, "sequence")
    case, config = outcome.case, outcome.case.config
    number = 4 if case.dtype == "float32" else 2
    blocks = config.depth + config.depth_single_blocks
    tokens = -(-tokens_of(case) // size) * size  # with what fills them up
    activations = tokens * config.hidden_size * number
    velocity = (size - 1) * tokens // size * config.out_channels * number
    calls = case.steps * case.calls
    for did in outcome.did:
        assert did["traffic"] == {
            "sums": 0,
            "gathers": (blocks + 1) * calls,
            "bytes": (blocks * 2 * (size - 1) * activations // size + velocity) * calls,
        }
        remembered = case.references == "remembered"
        assert did["before"]["gathers"] == (blocks if remembered else 0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("placement", ["tensor", "sequence"])
@pytest.mark.parametrize("name", [name for name in NAMES if not CASES[name].is_adapted])
def test_each_rank_does_its_part_of_the_blocks_work(result, size, placement, name):
    outcome = result(size, name, placement)
    case, config = outcome.case, outcome.case.config
    D, M, S = config.hidden_size, config.mlp_hidden_dim, tokens_of(case)
    keys = S
    if case.references == "remembered":
        keys += sum(rows * columns for rows, columns in REFERENCES)
    blocks = (config.depth + config.depth_single_blocks) * case.steps * case.calls
    linears = blocks * S * (4 * D * D + 3 * D * M)
    attention = blocks * 2 * S * keys * D
    for did in outcome.did:
        if placement == "tensor":
            assert (did["linears"] * size, did["attention"] * size) == (linears, attention)
        else:
            own = -(-S // size)
            assert (did["linears"] * S, did["attention"] * S) == (linears * own, attention * own)


@pytest.mark.parametrize("size", SIZES)
def test_a_shard_is_a_shard(result, size):
    for name in ("odd", "shallow", "bfloat16", "quantized"):
        outcome = result(size, name, "tensor")
        for did in outcome.did:
            assert did["held"] * size == outcome.one_did["held"], name


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("placement", ["tensor", "sequence"])
def test_all_ranks_skip_the_steps_that_one_host_skips(result, size, placement):
    outcome = result(size, "cached", placement)
    reused = np.array(outcome.one_did["reused"])
    assert reused[1:-1].any() and not reused[1:-1].all() and not reused[[0, -1]].any()
    assert [did["reused"] for did in outcome.did] == [reused.tolist()] * size
    for latents in outcome.latents:
        assert error(latents, outcome.expected) <= 1e-5


# Without a ring


@pytest.mark.parametrize("size", [2, 3, 4, 12])
def test_the_parts_of_each_linear_are_the_whole_and_none_overlaps(size):
    every = [cuts(ODD, Shard(rank, size)) for rank in range(size)]
    for name, cut in every[0].items():
        places = np.concatenate([part[name].indices for part in every])
        assert sorted(places) == list(range(cut.length)), name


def test_a_gate_and_what_it_gates_are_on_the_same_host():
    M = ODD.mlp_hidden_dim
    cut = cuts(ODD, Shard(1, 3))["double_blocks.0.img_mlp.0"]
    gate, up = np.split(cut.indices, 2)
    assert np.array_equal(gate + M, up)


def test_the_published_models_divide_by_what_their_heads_divide_by():
    klein_9b = Flux2Config(hidden_size=4096, num_heads=32)
    dev = Flux2Config(hidden_size=6144, num_heads=48)
    for config, fit in (
        (Flux2Config(), [1, 2, 3, 4, 6, 8, 12, 24]),
        (klein_9b, [1, 2, 4, 8, 16, 32]),
        (dev, [1, 2, 3, 4, 6, 8, 12, 16, 24, 48]),
    ):
        for quantized in (False, True):
            sizes = [n for n in range(1, 50) if partition(config).obstacle(n, quantized) is None]
            assert sizes == fit
    with pytest.raises(UsageError, match=r"32 heads don't divide by 3; use 1, 2, 4, 8, 16, 32 of"):
        shard_of(Flux2(klein_9b), Shard(0, 3))  # lazy: nothing of the 9 B is computed


def test_quantization_groups_that_do_not_divide_are_refused():
    narrow = replace(quantizable(2), num_heads=8, axes_dim=(4, 4, 4, 4))
    flux = flux_of(Flux2Case("narrow", "one", narrow, bits=4))
    shard_of(flux, Shard(0, 2))
    with pytest.raises(UsageError, match="are 32, not whole quantization groups of 64"):
        shard_of(flux, Shard(0, 4))


def test_a_group_of_one_computes_the_same_bytes_by_the_same_code():
    flux = flux_of(Flux2Case("odd", "one"))
    rng = np.random.default_rng(2)
    img, txt = (
        mx.array(rng.standard_normal((2, *s)), dtype=mx.float32) for s in ((6, 16), (5, 12))
    )
    ids = text_positions(5), image_positions(2, 3)
    modulation = flux.modulations(mx.array([0.7]), 3.0).at(0)
    expected = flux(img, txt, flux.rope(*ids), modulation)
    for kind in (TensorFlux2, SequenceFlux2):
        ranks = Ranks(mx.distributed.init())
        flow = kind(flux, ranks)
        assert (flow.config, flow.dtype) == (flux.config, flux.dtype)
        modulation = flow.modulations(mx.array([0.7]), 3.0).at(0)
        actual = flow(img, txt, flow.rope(*ids), modulation)
        if kind is TensorFlux2:
            assert mx.array_equal(actual, expected)
        assert mx.linalg.norm(actual - expected) <= 1e-6 * mx.linalg.norm(expected)
        assert ranks.traffic.bytes == 0


def test_a_shard_keeps_what_was_released_and_is_free_once_it_is_dropped():
    flux = flux_of(Flux2Case("odd", "one"))
    flux.release_modulation()
    part = shard_of(flux, Shard(0, 2))
    assert used(part).keys() == {name for name, _ in tree_flatten(flux.parameters())}
    assert part.modulation_released
    flow = TensorFlux2(shard_of(flux, Shard()), Ranks(mx.distributed.init()))
    weight = weakref.ref(flow.flux)
    del flow
    assert weight() is None  # at once, without a search for cycles


def test_a_shard_is_refused_where_it_does_not_belong():
    ranks = Ranks(mx.distributed.init())  # rank 0 of 1
    part = shard_of(flux_of(Flux2Case("odd", "one")), Shard(1, 2))
    with pytest.raises(UsageError, match="Part 1 of 2 .* where rank 0 of 1 runs"):
        TensorFlux2(part, ranks)
    with pytest.raises(UsageError, match="needs all weights on every host"):
        SequenceFlux2(part, ranks)
