"""What a host does while it waits for a collective, in a group of one: order, not time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np
import pytest

from benchmarks.flux2_peers import FluxmeshKlein
from benchmarks.placements import spread
from benchmarks.sizes import SMALL_TRANSFORMERS
from fluxmesh.engine import lookahead
from fluxmesh.engine.lookahead import walked
from fluxmesh.errors import NotFiniteError
from fluxmesh.models.collectives import Ranks
from fluxmesh.models.double_stream import between_blocks, watching
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


@pytest.fixture
def short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of nearly nothing are short, also where something else has the processor."""
    monkeypatch.setattr(lookahead, "SHORT", 60.0)


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


@pytest.mark.usefixtures("short_steps")
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


@pytest.mark.usefixtures("short_steps")
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


@pytest.mark.parametrize("placement", ["one", "sequence", "tensor"])
@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("family", ["FLUX.1", "FLUX.2"])
def test_every_call_of_a_transformer_shows_what_stands_between_its_blocks(
    family: str, calls: int, placement: str
) -> None:
    """Else nothing is begun early, and only a clock on a GPU would tell."""
    ranks = Ranks(mx.distributed.init(), waiting=InGraph())
    if family == "FLUX.1":
        case = ParallelCase("shallow", "one", SHALLOW, 3, (4, 6))
        whole, plan = flow_of(case), plan_of(case, flow_of(case))
        noise, hidden, tokens = noise_of(case), SHALLOW.hidden_size, 9
        flow = whole if placement == "one" else spread(placement, whole, ranks)

        def step() -> mx.array:
            return flow(noise, plan.text, plan.pe, plan.modulations.at(0))
    else:
        config = SMALL_TRANSFORMERS["klein-4b"]
        peer = FluxmeshKlein(config, "float32", None, low_memory=False)
        noise, plan = peer.planned(64, 64, 1, 16)
        hidden, tokens = config.hidden_size, 32
        flow = peer.flow if placement == "one" else spread(placement, peer.flow, ranks)

        def step() -> mx.array:
            return plan.velocity(flow, noise, 0)

    with watching() as halves:
        velocities = [step() for _ in range(calls)]
    assert [half.shape for half in halves] == [(1, tokens, hidden)] * calls
    step()
    assert len(halves) == calls  # nobody watches any more
    assert mx.isfinite(velocities[0]).all()


@pytest.mark.usefixtures("short_steps")
@pytest.mark.parametrize("in_ring", [True, False])
def test_cuda_begins_the_next_step_before_the_host_waits_for_this_one(
    monkeypatch: pytest.MonkeyPatch, in_ring: bool
) -> None:
    done: list[str] = []
    names: dict[int, str] = {}
    commit, wait = mx.async_eval, mx.eval

    def commits(*arrays: mx.array) -> None:
        done.append(names.get(id(arrays[0]), "question"))
        commit(*arrays)

    def waits(*arrays: mx.array) -> None:
        done.append(f"wait for {names[id(arrays[0])]}")
        wait(*arrays)

    monkeypatch.setattr("fluxmesh.engine.lookahead.device", lambda: "cuda")
    ranks = Ranks(mx.distributed.init(), waiting=InGraph()) if in_ring else None
    kept: list[mx.array] = []

    def steps() -> Iterator[StepState]:
        for number in range(4):
            half = between_blocks(mx.ones((1, 1, 2)) * number)
            kept.extend([half, half + 1])
            names[id(half)], names[id(kept[-1])] = f"half {number}", f"step {number}"
            yield StepState(kept[-1], half)

    monkeypatch.setattr(mx, "async_eval", commits)
    monkeypatch.setattr(mx, "eval", waits)
    pace = walked(steps(), 4, ranks, stopping=lambda: False)
    assert len(list(pace)) == 4
    early = [f"half {number}" for number in (2, 3)]
    assert [what for what in done if what.startswith("half")] == early
    for number in (2, 3):
        assert done.index(f"half {number}") == done.index(f"wait for step {number - 1}") - 1


@pytest.mark.usefixtures("short_steps")
@pytest.mark.parametrize("way", ["stopped", "not finite"])
def test_a_ring_that_ends_leaves_the_half_that_has_begun_and_no_more(
    monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """All ranks run its collectives; those of the other half nobody does."""
    monkeypatch.setattr("fluxmesh.engine.lookahead.device", lambda: "cuda")
    ranks = Ranks(mx.distributed.init(), waiting=InGraph())
    halves: list[mx.array] = []

    def steps() -> Iterator[StepState]:
        for number in range(4):
            halves.append(between_blocks(ranks.sum(mx.ones((1, 1, 2)))))
            x = ranks.sum(halves[-1]) * (mx.nan if way == "not finite" and number == 1 else 1)
            yield StepState(x, x)

    pace = walked(steps(), 4, ranks, stopping=lambda: way == "stopped" and len(halves) > 1)
    with pytest.raises(NotFiniteError) if way == "not finite" else contextlib.nullcontext():
        list(pace)
    assert len(halves) == 3
    assert ranks.mark().last is halves[2]


SHORT, LONG = 0.9 * lookahead.SHORT, lookahead.SHORT


@pytest.mark.parametrize(
    ("said", "agreed"),
    [
        ([("cuda", False, SHORT), ("cuda", False, SHORT)], (False, True, True)),
        ([("cuda", False, SHORT), ("cuda", False, LONG)], (False, False, False)),
        ([("cuda", False, SHORT), ("cpu", False, SHORT)], (False, True, False)),
        ([("cuda", False, SHORT), ("metal", False, SHORT)], (False, False, False)),
        ([("cuda", True, SHORT), ("cuda", False, SHORT)], (True, True, True)),
        ([("cpu", True, LONG), ("cuda", False, SHORT)], (True, False, False)),
    ],
)
def test_ranks_conclude_the_same_from_what_all_said(
    monkeypatch: pytest.MonkeyPatch,
    said: list[tuple[str, bool, float]],
    agreed: tuple[bool, bool, bool],
) -> None:
    answers = []
    for device, stops, seconds in said:
        monkeypatch.setattr(lookahead, "device", lambda device=device: device)
        ranks = Ranks(mx.distributed.init(), waiting=OnHost() if device == "metal" else InGraph())
        answers.append(lookahead._answer(stops, seconds, ranks))
    assert lookahead._agreed(np.array(answers, np.int32)) == agreed
