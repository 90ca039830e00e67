"""Two, three and four real ranks on loopback, held to one host: same latents, 1/N of the work."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.checkpoints import make_checkpoint
from tests.parallel import worker
from tests.parallel.cases import ON_DISK, STEPS, WAITING_SIZES, ParallelCase, cases
from tests.parallel.ring import once, run_ranks, written

SIZES = (2, 3, 4)
TIMEOUT = 180.0  # of all ranks together: a hang is a failure, not a wait
# Whoever needs a ring first runs it for all tests, and others wait for it.
pytestmark = pytest.mark.timeout(300)
CASES = [case for case in cases(2, Path()) if case.placement == "tensor"]
NAMES = [case.name for case in CASES if not case.cache]
EXACT = [case.name for case in CASES if not case.cache and case.dtype == "float32"]
HALVES = {"bfloat16": "odd", "float16": "odd", "float16, 4 bits": "quantized and adapted"}


class RanksResult(NamedTuple):
    """A case on N ranks, and on one host."""

    case: ParallelCase
    latents: list[np.ndarray]  # of each rank
    did: list[dict[str, Any]]  # by each rank
    on_host: list[np.ndarray]  # latents of each rank, where hosts wait for collectives, if they do
    did_on_host: list[dict[str, Any]]
    nonces: list[tuple[bool, bool]]  # whether each rank thought the same, and different ones, equal
    expected: np.ndarray
    one_did: dict[str, Any]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    def make(folder: Path) -> None:
        make_checkpoint(folder, seed=2, transformer=ON_DISK, guidance=True)

    model = once(tmp_path_factory, "parallel-model", make)

    @functools.cache
    def ranks(size: int) -> list[tuple[Any, dict[str, Any]]]:
        """What each rank wrote: latents, and what it did."""
        folder = once(
            tmp_path_factory,
            f"parallel-{size}",
            lambda here: run_ranks(size, [str(size), str(model)], here, TIMEOUT),
        )
        return [written(folder, rank) for rank in range(size)]

    @functools.cache
    def alone(case: ParallelCase) -> tuple[np.ndarray, dict[str, Any]]:
        return worker.run(case)

    def find(size: int, name: str, placement: str) -> RanksResult:
        case = next(
            case for case in cases(size, model) if (case.name, case.placement) == (name, placement)
        )
        every, key = ranks(size), f"{name}/{placement}"
        waits = size in WAITING_SIZES
        expected, did = alone(replace(case, placement="one"))
        return RanksResult(
            case,
            [latents[key] for latents, _ in every],
            [report[key] for _, report in every],
            [latents[f"{key}/on host"] for latents, _ in every if waits],
            [report[f"{key}/on host"] for _, report in every if waits],
            [(report["same nonce"], report["strange nonce"]) for _, report in every],
            expected,
            did,
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
@pytest.mark.parametrize("name", HALVES)
def test_two_bytes_a_number_are_no_worse_than_twice_one_hosts(result, size, placement, name):
    outcome = result(size, name, placement)
    exact = result(size, HALVES[name], placement).expected
    one_host = error(outcome.expected, exact)
    assert one_host > 1e-5  # rounding is at work
    assert error(outcome.latents[0], exact) <= 2 * one_host


def test_float16_is_nearer_to_float32_than_bfloat16(result):
    exact = result(2, "odd", "tensor").expected
    half, other = (
        error(result(2, name, "tensor").expected, exact) for name in ("float16", "bfloat16")
    )
    assert half < other / 4


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("placement", ["tensor", "sequence"])
def test_every_rank_has_the_same_whole_latents(result, size, placement):
    for name in NAMES:
        outcome = result(size, name, placement)
        shape = (outcome.case.images, outcome.case.image_tokens, outcome.case.config.out_channels)
        for latents, did in zip(outcome.latents, outcome.did, strict=True):
            assert latents.shape == shape and did["dtype"] == "mlx.core.float32"
            assert latents.tobytes() == outcome.latents[0].tobytes(), name


@pytest.mark.parametrize("size", WAITING_SIZES)
@pytest.mark.parametrize("placement", ["tensor", "sequence"])
@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_a_host_that_waits_for_collectives_gets_what_the_graph_gets(result, size, placement, name):
    outcome = result(size, name, placement)
    assert len(outcome.on_host) == size
    for waited, lazy in zip(outcome.on_host, outcome.latents, strict=True):
        assert waited.tobytes() == lazy.tobytes()
    assert outcome.did_on_host == outcome.did  # work, collectives, bytes sent, steps reused


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_tensor_sums_twice_a_double_block_and_once_a_single_block(result, size, name):
    outcome = result(size, name, "tensor")
    case, config = outcome.case, outcome.case.config
    number = 4 if case.dtype == "float32" else 2
    sums = (2 * config.depth + config.depth_single_blocks) * STEPS * case.images * case.calls
    activations = case.tokens * config.hidden_size * number  # bytes of all tokens, at one place
    modulations = (12 * config.depth + 3 * config.depth_single_blocks + 2) * config.hidden_size
    once = (size - 1) * (STEPS * case.calls * modulations * number // size)
    for did in outcome.did:
        assert did["traffic"] == {
            "sums": sums,
            "gathers": 1,
            "bytes": sums * 2 * (size - 1) * activations // size + once,
        }


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_sequence_gathers_once_a_block_and_once_a_step(result, size, name):
    outcome = result(size, name, "sequence")
    case, config = outcome.case, outcome.case.config
    number = 4 if case.dtype == "float32" else 2
    blocks = config.depth + config.depth_single_blocks
    tokens = -(-case.tokens // size) * size  # with what fills them up
    activations = tokens * config.hidden_size * number
    velocity = (size - 1) * tokens // size * config.out_channels * number
    steps = STEPS * case.images * case.calls
    for did in outcome.did:
        assert did["traffic"] == {
            "sums": 0,
            "gathers": (blocks + 1) * steps,
            "bytes": (blocks * 2 * (size - 1) * activations // size + velocity) * steps,
        }


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("placement", ["tensor", "sequence"])
@pytest.mark.parametrize("name", NAMES)
def test_each_rank_does_its_part_of_the_blocks_work(result, size, placement, name):
    outcome = result(size, name, placement)
    case, config = outcome.case, outcome.case.config
    D, M, S = config.hidden_size, config.mlp_hidden_dim, case.tokens
    blocks = config.depth + config.depth_single_blocks
    calls = STEPS * case.images * case.calls
    linears = blocks * S * (4 * D * D + 2 * D * M) * calls
    attention = blocks * 2 * S * S * D * calls
    for did in outcome.did:
        if placement == "tensor":
            assert (did["linears"] * size, did["attention"] * size) == (linears, attention)
        else:
            own = -(-S // size)
            assert (did["linears"] * S, did["attention"] * S) == (linears * own, attention * own)


@pytest.mark.parametrize("size", SIZES)
def test_a_stranger_in_the_ring_is_found_by_every_rank(result, size):
    assert result(size, "odd", "tensor").nonces == [(True, False)] * size


@pytest.mark.parametrize("size", SIZES)
def test_a_shard_is_a_shard(result, size):
    for name in ("odd", "shallow", "bfloat16", "quantized", "fused", "from files"):
        outcome = result(size, name, "tensor")
        for did in outcome.did:
            assert did["held"] <= (1 / size + 0.01) * outcome.one_did["held"], name


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("placement", ["tensor", "sequence"])
def test_all_ranks_skip_the_steps_that_one_host_skips(result, size, placement):
    outcome = result(size, "cached", placement)
    reused = np.array(outcome.one_did["reused"])  # [steps, images]
    assert reused[1:-1].any() and not reused[1:-1].all() and not reused[[0, -1]].any()
    assert [did["reused"] for did in outcome.did] == [reused.tolist()] * size
    for latents in outcome.latents:
        assert latents.tobytes() == outcome.latents[0].tobytes()
        assert error(latents, outcome.expected) <= 1e-5


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("placement", ["tensor", "sequence"])
def test_a_step_that_is_skipped_sends_what_its_first_block_sends(result, size, placement):
    outcome = result(size, "cached", placement)
    case, config = outcome.case, outcome.case.config
    reused = np.array(outcome.one_did["reused"])
    computed = (~reused).sum()
    compared = (case.steps - 2) * case.images  # neither the first step nor the last
    if placement == "tensor":
        sums = 2 * reused.size + computed * (2 * (config.depth - 1) + config.depth_single_blocks)
        collectives = {"sums": sums, "gathers": 1 + compared}
    else:
        gathers = 2 * reused.size + computed * (config.depth - 1 + config.depth_single_blocks)
        collectives = {"sums": 0, "gathers": gathers + compared}
    for did in outcome.did:
        assert {name: did["traffic"][name] for name in collectives} == collectives
