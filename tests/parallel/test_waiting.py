"""What a host does while it waits for a collective, in a group of one: order, not time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx
import pytest

from fluxmesh.engine.lookahead import walked
from fluxmesh.models.collectives import Ranks
from fluxmesh.models.waiting import InGraph, OnHost, Waiting, waiting_here
from fluxmesh.sampling.denoise import StepState
from tests.parallel.cases import SHALLOW, ParallelCase, flow_of, noise_of, plan_of


class Recorded(OnHost):
    """Keeps what was given to compute meanwhile, collective by collective."""

    def __init__(self) -> None:
        self.meanwhile: list[int] = []

    def end(self, result: mx.array, meanwhile: Sequence[mx.array]) -> None:
        self.meanwhile.append(len(meanwhile))
        super().end(result, meanwhile)


def one_step(placement: str, waiting: Waiting) -> mx.array:
    case = ParallelCase("shallow", placement, SHALLOW, 3, (4, 6))
    flow = flow_of(case, Ranks(mx.distributed.init(), waiting=waiting))
    plan = plan_of(case, flow)
    return flow(noise_of(case), plan.text, plan.pe, plan.modulations.at(0))


def test_queries_and_a_single_blocks_mlp_are_computed_while_keys_and_values_travel() -> None:
    recorded = Recorded()
    one_step("sequence", recorded)
    assert recorded.meanwhile == [1, 2, 0]  # a block of each kind, and the velocity


def test_all_that_does_not_need_a_collective_is_given_to_the_device_before_the_host_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []
    evaluate, commit = mx.eval, mx.async_eval

    def waits(*arrays: mx.array) -> None:
        done.append("wait")
        evaluate(*arrays)

    def commits(*arrays: mx.array) -> None:
        done.append(f"commit {len(arrays)}")
        commit(*arrays)

    monkeypatch.setattr(mx, "eval", waits)
    monkeypatch.setattr(mx, "async_eval", commits)
    ranks = Ranks(mx.distributed.init(), waiting=OnHost())
    pending = ranks.begin_gather(mx.ones((2, 2)))
    assert done == ["commit 1"]  # it is on its way
    other = mx.zeros(3) + 1
    every = pending.result(other, other * 2)
    assert done == ["commit 1", "commit 2", "wait"]
    ranks.sum(every + 1)  # one after another: the first is waited for before the next is sent
    assert done[3:] == ["wait", "commit 1", "commit 0", "wait"]


def test_no_two_collectives_are_in_flight_at_once() -> None:
    """Each is told to come after the one before: their times add up, as plans have them."""

    class Chained(InGraph):
        def __init__(self) -> None:
            self.before: list[mx.array] = []
            self.begun: list[mx.array] = []

        def after(self, last: mx.array, x: mx.array) -> mx.array:
            self.before.append(last)
            return super().after(last, x)

        def begin(self, result: mx.array) -> None:
            self.begun.append(result)

    for placement in ("sequence", "tensor"):
        chained = Chained()
        mx.eval(one_step(placement, chained))
        assert len(chained.begun) > 2
        assert all(a is b for a, b in zip(chained.begun[:-1], chained.before, strict=True))


@pytest.mark.parametrize("placement", ["tensor", "sequence"])
def test_where_the_graph_waits_nothing_is_computed_before_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, placement: str
) -> None:
    def refuse(*_arrays: mx.array) -> None:
        raise AssertionError("it computes")

    case = ParallelCase("shallow", placement, SHALLOW, 3, (4, 6))
    flow = flow_of(case, Ranks(mx.distributed.init(), waiting=InGraph()))
    plan = plan_of(case, flow)
    monkeypatch.setattr(mx, "eval", refuse)
    monkeypatch.setattr(mx, "async_eval", refuse)
    flow(noise_of(case), plan.text, plan.pe, plan.modulations.at(0))


@pytest.mark.parametrize(
    ("device", "kind"), [("metal", OnHost), ("cuda", InGraph), ("cpu", InGraph)]
)
def test_only_metal_has_its_host_wait(
    monkeypatch: pytest.MonkeyPatch, device: str, kind: type[Waiting]
) -> None:
    monkeypatch.setattr("fluxmesh.models.waiting.device", lambda: device)
    assert type(waiting_here()) is kind
    assert Ranks(mx.distributed.init()).looks_ahead == (device != "metal")


@pytest.mark.parametrize(("waiting", "built"), [(InGraph(), 3), (OnHost(), 2)])
def test_a_step_is_built_ahead_only_where_that_computes_nothing(
    waiting: Waiting, built: int
) -> None:
    made = 0

    def steps() -> Iterator[StepState]:
        nonlocal made
        for _ in range(4):
            made += 1
            x = mx.ones(2) * made
            yield StepState(x, x)

    ranks = Ranks(mx.distributed.init(), waiting=waiting)
    pace = walked(steps(), 4, ranks, stopping=lambda: False)
    next(pace)
    next(pace)  # the first one tells how long a step is
    assert made == built
    assert len(list(pace)) == 2


def test_the_question_whether_to_stop_is_on_its_way_before_the_next_step_is_described(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In one graph of CUDA's, `depends` would not keep it from running beside the next gather."""
    done: list[str] = []

    class Asking(Ranks):
        def ask(self, value: int) -> mx.array:
            done.append("ask")
            self.asked = super().ask(value)
            return self.asked

    ranks = Asking(mx.distributed.init(), waiting=InGraph())
    commit = mx.async_eval

    def commits(*arrays: mx.array) -> None:
        done.append("answer" if arrays[0] is getattr(ranks, "asked", None) else "step")
        commit(*arrays)

    monkeypatch.setattr(mx, "async_eval", commits)

    def steps() -> Iterator[StepState]:
        for number in range(3):
            done.append(f"describe {number}")
            x = mx.ones((2,)) + number
            yield StepState(x, x)

    assert len(list(walked(steps(), 3, ranks, stopping=lambda: False))) == 3
    described = [i for i, what in enumerate(done) if what.startswith("describe")]
    ahead = done[described[2] - 3 : described[2] + 1]
    assert ahead == ["step", "ask", "answer", "describe 2"]
