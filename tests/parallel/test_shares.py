"""Ranks with unequal shares on loopback, held to one host: same latents, each its own part."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from fluxmesh.cluster.shares import EVEN, Shares
from fluxmesh.errors import UsageError
from fluxmesh.models.flux1.partition import cuts, partition
from fluxmesh.models.partition import Shard, TokenRuns
from fluxmesh.models.slicing import shard_of
from fluxmesh.weights import hub
from fluxmesh.weights.loading import load_transformer
from tests.checkpoints import make_checkpoint
from tests.parallel import shares_cases
from tests.parallel.cases import ON_DISK, ParallelCase, flow_of, quantizable
from tests.parallel.flux2_cases import REFERENCES, Flux2Case
from tests.parallel.ring import once, run_ranks, written
from tests.parallel.shares_cases import SharedCase, cases, key_of
from tests.parallel.test_sharding import assert_same
from tests.shards import copied_shard

SIZES = (2, 3)
TIMEOUT = 280.0  # of all ranks together: a hang is a failure, not a wait
# Whoever needs a ring first runs it for all tests, and others wait for it.
pytestmark = pytest.mark.timeout(400)
CASES = {key_of(case): case for case in cases(2, Path())}
EXACT = [key for key, case in CASES.items() if case.dtype == "float32"]
SEQUENCE = [key for key, case in CASES.items() if case.placement == "sequence"]
# Neither skips a step nor computes an adapter beside its linears.
COUNTED = [
    key
    for key, case in CASES.items()
    if not (case.cache or getattr(case, "is_adapted", False) or getattr(case, "adapter", ""))
]


class SharesResult(NamedTuple):
    """A case on N ranks, and on one host."""

    case: SharedCase
    latents: list[np.ndarray]  # of each rank
    did: list[dict[str, Any]]  # by each rank
    on_host: list[tuple[np.ndarray, dict[str, Any]]]  # where hosts wait for collectives
    expected: np.ndarray
    one_did: dict[str, Any]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    def make(folder: Path) -> None:
        make_checkpoint(folder, seed=2, transformer=ON_DISK, guidance=True)

    model = once(tmp_path_factory, "parallel-model", make)

    @functools.cache
    def ranks(size: int) -> list[tuple[Any, dict[str, Any]]]:
        words = [str(size), str(model)]
        folder = once(
            tmp_path_factory,
            f"shares-{size}",
            lambda here: run_ranks(size, words, here, TIMEOUT, "shares_cases"),
        )
        return [written(folder, rank) for rank in range(size)]

    @functools.cache
    def alone(case: SharedCase) -> tuple[np.ndarray, dict[str, Any]]:
        return shares_cases.run(case)

    def find(size: int, key: str) -> SharesResult:
        case = next(case for case in cases(size, model) if key_of(case) == key)
        every = ranks(size)
        expected, one_did = alone(replace(case, placement="one", shares=EVEN))
        return SharesResult(
            case,
            [latents[key] for latents, _ in every],
            [did[key] for _, did in every],
            [(latents[f"{key}/on host"], did[f"{key}/on host"]) for latents, did in every],
            expected,
            one_did,
        )

    return find


def error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("key", EXACT)
def test_hosts_with_unequal_shares_paint_what_one_paints(result, size, key):
    outcome = result(size, key)
    assert outcome.expected.dtype == np.float32 and outcome.expected.std() > 0.3
    for latents in outcome.latents:
        assert latents.tobytes() == outcome.latents[0].tobytes()
        assert error(latents, outcome.expected) <= 1e-5
    reused = np.array(outcome.one_did["reused"])
    assert all(np.array_equal(did["reused"], reused) for did in outcome.did)
    assert bool(outcome.case.cache) == bool(reused.any())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("placement", ["tensor", "sequence"])
def test_bfloat16_is_no_worse_than_twice_one_hosts(result, size, placement):
    outcome = result(size, f"FLUX.1 bfloat16/{placement}")
    exact = result(size, f"FLUX.1 odd/{placement}").expected
    one_host = error(outcome.expected, exact)
    assert one_host > 1e-5  # rounding is at work
    assert error(outcome.latents[0], exact) <= 2 * one_host


@pytest.mark.parametrize("size", SIZES)
def test_a_host_that_waits_for_collectives_gets_what_the_graph_gets(result, size):
    for key in CASES:
        outcome = result(size, key)
        for (waited, did), lazy, expected in zip(
            outcome.on_host, outcome.latents, outcome.did, strict=True
        ):
            assert waited.tobytes() == lazy.tobytes(), key
            assert did == expected, key  # work, collectives, bytes sent, steps reused


def tokens_of(case: SharedCase) -> int:
    """All that pass through the blocks at a step."""
    more = sum(rows * columns for rows, columns in REFERENCES)
    at_every_step = getattr(case, "references", "") == "at every step"
    return case.text_tokens + case.image_tokens + more * at_every_step


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("key", COUNTED)
def test_each_rank_does_its_own_share_of_the_blocks_work(result, size, key):
    outcome = result(size, key)
    case, config = outcome.case, outcome.case.config
    D, M, S = config.hidden_size, config.mlp_hidden_dim, tokens_of(case)
    inner = 3 if isinstance(case, Flux2Case) else 2  # a gated MLP has two matrices inside
    calls = case.steps * case.calls * (config.depth + config.depth_single_blocks)
    keys = S
    if getattr(case, "references", "") == "remembered":
        keys += sum(rows * columns for rows, columns in REFERENCES)
    runs = TokenRuns.of(S, size, case.shares).own
    for rank, did in enumerate(outcome.did):
        if case.placement == "sequence":
            linears = runs[rank] * (4 * D * D + inner * D * M)
            attention = 2 * runs[rank] * keys * D
        else:
            heads = case.shares.heads[rank] * D // config.num_heads
            linears = S * (4 * D * heads + inner * D * case.shares.columns[rank])
            attention = 2 * S * keys * heads
        assert (did["linears"], did["attention"]) == (calls * linears, calls * attention)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("key", [key for key in SEQUENCE if key in COUNTED])
def test_each_rank_gives_as_much_to_a_gather_as_the_longest_run_is(result, size, key):
    outcome = result(size, key)
    case, config = outcome.case, outcome.case.config
    number = 4 if case.dtype == "float32" else 2
    blocks = config.depth + config.depth_single_blocks
    longest = max(TokenRuns.of(tokens_of(case), size, case.shares).own)
    each = longest * (2 * blocks * config.hidden_size + config.out_channels) * number
    calls = case.steps * case.calls
    for did in outcome.did:
        assert did["traffic"] == {
            "sums": 0,
            "gathers": (blocks + 1) * calls,
            "bytes": (size - 1) * each * calls,
        }


@pytest.mark.parametrize("size", SIZES)
def test_each_rank_holds_its_share_of_the_weights(result, size):
    for key in ("FLUX.1 odd/tensor", "FLUX.1 from files/tensor", "FLUX.2 quantized/tensor"):
        outcome = result(size, key)
        heads, columns = outcome.case.shares.heads, outcome.case.shares.columns
        parts = [did["held"] / outcome.one_did["held"] for did in outcome.did]
        for part, *both in zip(parts, heads, columns, strict=True):
            shares = both[0] / sum(heads), both[1] / sum(columns)
            assert min(shares) - 0.01 <= part <= max(shares) + 0.03, key
        assert 1 <= sum(parts) <= 1.1


# Without a ring


@pytest.mark.parametrize("bits", [None, 4])
def test_a_share_from_files_is_the_share_of_the_whole(tmp_path, bits):
    config = replace(quantizable(2), hidden_size=256, num_heads=8)
    config = replace(config, in_channels=64, out_channels=64, vec_in_dim=32, context_in_dim=32)
    checkpoint = hub.resolve(str(make_checkpoint(tmp_path, seed=1, transformer=config).path))
    whole = load_transformer(checkpoint, bits=bits)
    shares = Shares(heads=(4, 2, 2), columns=(256, 640, 128))
    for rank in range(3):
        shard = Shard(rank, 3, shares)
        part = load_transformer(checkpoint, bits=bits, shard=shard)
        assert part.single_blocks[0].qkv_dim == 3 * 32 * shares.heads[rank]
        assert_same(part, copied_shard(whole, shard))


def test_the_parts_of_each_linear_are_the_whole_and_none_overlaps():
    shares = Shares(heads=(7, 4, 1), columns=(200, 8, 80))
    config = replace(ON_DISK, hidden_size=72, axes_dim=(2, 2, 2))
    every = [cuts(config, Shard(rank, 3, shares)) for rank in range(3)]
    for name, cut in every[0].items():
        places = np.concatenate([part[name].indices for part in every])
        assert sorted(places) == list(range(cut.length)), name


def test_shares_that_the_shapes_do_not_allow_are_refused():
    flux = flow_of(ParallelCase("groups", "one", quantizable(2), bits=4))
    heads = Shares(heads=(3, 1), columns=(256, 256))
    with pytest.raises(UsageError, match="96 of 128 columns are one host's share, not whole"):
        shard_of(flux, Shard(0, 2, heads))
    columns = Shares(heads=(2, 2), columns=(500, 12))
    with pytest.raises(UsageError, match="not whole quantization groups of 64"):
        shard_of(flux, Shard(0, 2, columns))
    with pytest.raises(UsageError, match="shares of 5 heads are not those of 4"):
        shard_of(flux, Shard(0, 2, Shares(heads=(3, 2), columns=(256, 256))))
    with pytest.raises(UsageError, match="those of 2 hosts, and the ring has 3"):
        TokenRuns.of(19, 3, Shares(tokens=(2, 1)))
    assert partition(quantizable(2)).units(quantized=True) == (4, 128)
    assert partition(quantizable(2)).units(quantized=False) == (1, 64)
