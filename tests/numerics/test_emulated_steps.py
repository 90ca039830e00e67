"""Steps that emulated hosts walk are the model's: its collectives, with what stands beside them."""

from __future__ import annotations

import types
from dataclasses import replace

import mlx.core as mx
import pytest

from benchmarks.emulated import steps
from benchmarks.emulated.steps import StepPiece, computed, hidden, least, slower, traced, walked
from benchmarks.flux2_peers import FluxmeshKlein
from benchmarks.peers import Fluxmesh
from benchmarks.sizes import SMALL, SMALL_KLEIN
from fluxmesh.cluster.shares import Shares
from fluxmesh.cluster.snapshot import CollectiveTime, Placement
from fluxmesh.models.base import Architecture, ModelDefaults
from fluxmesh.models.collectives import Ranks
from fluxmesh.models.flux1.architecture import Flux1Architecture
from fluxmesh.planning.workload import ModelSizes, Workload
from fluxmesh.request import GenerateRequest
from tests.flux2_checkpoint import TEXT, architecture_of

SIZE = (64, 64)


def unequal(placement: Placement, sizes: Architecture) -> Shares:
    """A quarter of the tokens or columns, and one head, for the second host."""
    if placement == "sequence":
        return Shares(tokens=(3, 1))
    heads, quarter = sizes.partition.heads, sizes.partition.columns // 4
    return Shares(heads=(heads - 1, 1), columns=(3 * quarter, quarter))


def model(family: str) -> tuple[Fluxmesh, Architecture]:
    if family == "flux2":
        config = replace(SMALL_KLEIN, context_in_dim=TEXT.width)
        return FluxmeshKlein(config, "bfloat16", None, low_memory=False), architecture_of(
            "klein", config
        )
    defaults = ModelDefaults(
        steps=4, guidance=3.5, height=64, width=64, t5_max_length=SMALL.text_tokens
    )
    parts = (SMALL.transformer, SMALL.t5, SMALL.clip, SMALL.autoencoder, defaults)
    peer = Fluxmesh(SMALL.transformer, "bfloat16", None, low_memory=False)
    return peer, Flux1Architecture(*parts)


@pytest.mark.parametrize("family", ["flux1", "flux2"])
@pytest.mark.parametrize("placement", ["sequence", "tensor"])
@pytest.mark.parametrize("is_even", [True, False])
def test_a_traced_step_sends_what_the_planner_counts(
    family: str, placement: Placement, is_even: bool
) -> None:
    peer, sizes = model(family)
    shares = Shares() if is_even else unequal(placement, sizes)
    request = GenerateRequest(prompt="", seed=0, model="m", height=SIZE[0], width=SIZE[1])
    work = Workload.of(ModelSizes(sizes).fill(request), ModelSizes(sizes))
    nbytes = work.collective_bytes(placement, 2, shares)
    whole = peer.flow
    for rank in range(2):
        pieces = traced(peer, sizes, SIZE, placement, rank, 2, shares, steps=1)
        kind = "sum" if placement == "tensor" else "gather"
        sent = [piece.nbytes for piece in pieces if piece.end == kind]
        if placement == "sequence":  # the last one joins the velocity, and is small
            last = sent.pop()
            assert 0 < last < nbytes
        assert sent == [nbytes] * work.shape.collectives(placement)
        others = {piece.end for piece in pieces} - {kind}
        assert others == ({"step"} if placement == "tensor" else {"wait", "step"})
        assert pieces[-1].end == "step" and all(piece.seconds > 0 for piece in pieces)
    assert peer.flow is whole


def test_a_single_blocks_mlp_is_computed_while_its_keys_travel() -> None:
    peer, sizes = model("flux1")
    pieces = traced(peer, sizes, SIZE, "sequence", 0, 2, steps=3)
    beside = [piece.seconds for piece in pieces if piece.end == "wait"][:-1]  # but the velocity's
    doubles = SMALL.transformer.depth
    assert min(beside[doubles:]) > 0 and computed(pieces) > sum(beside) > 0


def test_one_host_computes_all_in_one_piece() -> None:
    peer, sizes = model("flux1")
    (piece,) = traced(peer, sizes, SIZE, "data", steps=1)
    assert piece.end == "step" and piece.nbytes == 0 and piece.seconds > 0


class FalseRing:
    """A ring whose clock is a number: what is sent takes a second for each 1000 bytes."""

    def __init__(self) -> None:
        self.now, self.calls = 100.0, list[str]()

    def _done(self, what: str, x: mx.array) -> float:
        self.calls.append(what)
        return self.now + x.nbytes / 1000

    def most(self, value: int) -> int:
        return value

    def sum(self, x: mx.array) -> mx.array:
        self.now = self._done("sum", x)
        return x

    def begin_gather(self, x: mx.array) -> object:
        done = self._done("gather", x)

        def result() -> None:
            self.now = max(self.now, done)

        return types.SimpleNamespace(result=result)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def ring(monkeypatch: pytest.MonkeyPatch) -> FalseRing:
    made = FalseRing()
    monkeypatch.setattr(steps, "time", made)
    return made


def seconds(ring: FalseRing, *pieces: StepPiece) -> list[float]:
    ranks: Ranks = ring  # type: ignore[assignment]
    return walked(ranks, pieces, 2)


def test_a_walked_step_computes_while_a_gather_travels_and_waits_for_a_sum(ring: FalseRing) -> None:
    assert seconds(
        ring,
        StepPiece("gather", 1000, 2.0),
        StepPiece("wait", 0, 0.25),  # 0.75 of the gather are waited for
        StepPiece("sum", 500, 1.0),
        StepPiece("step", 0, 3.0),
    ) == pytest.approx([2.0 + 1.0 + 1.0 + 0.5 + 3.0] * 2)
    assert ring.calls == ["gather", "sum"] * 2


def test_computing_that_takes_longer_than_a_gather_hides_all_of_it(ring: FalseRing) -> None:
    pieces = (StepPiece("gather", 1000, 0.0), StepPiece("wait", 0, 4.0))
    assert seconds(ring, *pieces) == pytest.approx([4.0, 4.0])


def test_a_process_that_wakes_up_late_does_not_make_its_device_slower(ring: FalseRing) -> None:
    """What was slept too long is made up for until the next collective is waited for."""
    sleep = ring.sleep
    ring.sleep = lambda seconds: sleep(seconds + 0.1 if seconds else 0.0)  # type: ignore[method-assign]
    pieces = (StepPiece("gather", 1000, 1.0), StepPiece("wait", 0, 5.0))
    first, _ = seconds(ring, *pieces)
    assert first == pytest.approx(6.1)


@pytest.mark.parametrize(("spent", "part"), [(0.05, 1.0), (0.0, 0.0)])
def test_what_is_hidden_of_a_gather_is_what_travels_beside_computing(
    ring: FalseRing, spent: float, part: float
) -> None:
    table = [CollectiveTime(10, 0.01), CollectiveTime(50, 0.05), CollectiveTime(5000, 5.0)]
    if not spent:  # a ring that sends nothing while its host computes
        begin = ring.begin_gather
        ring.begin_gather = lambda x: types.SimpleNamespace(result=lambda: begin(x).result())  # type: ignore
    assert hidden(ring, table) == pytest.approx(part)  # type: ignore[arg-type]


def test_of_traces_each_piece_counts_where_it_was_shortest() -> None:
    one = [StepPiece("sum", 8, 1.0), StepPiece("step", 0, 4.0)]
    other = [StepPiece("sum", 8, 2.0), StepPiece("step", 0, 3.0)]
    assert [piece.seconds for piece in least(one, other)] == [1.0, 3.0]
    assert computed(slower(one, 2.0)) == 10.0
