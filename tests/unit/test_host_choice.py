"""Which of those in line begin now, and on which hosts: by tables of times, without a mesh."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from fluxmesh.cluster.snapshot import MeshView
from fluxmesh.planning.plan import Plan, plan
from fluxmesh.request import FilledRequest
from fluxmesh_coordinator.commands.generate import ReadyPrompt, Spread
from fluxmesh_coordinator.server.queue import host_choice
from fluxmesh_coordinator.server.queue.host_choice import (
    PaintWay,
    Start,
    Ways,
    choose,
    planned_ways,
)
from fluxmesh_coordinator.server.queue.served_job import ServedJob
from tests.unit.meshes import ask, full, mac, resolved

SECONDS = 10.0  # of a picture, on one host


def job(name: str) -> ServedJob:
    return ServedJob(
        id=name, client=name, fingerprint="", model="tiny", n_images=1, height=64, width=64,
        steps=4, seed=7, ready=None,
    )  # fmt: skip


def some(*ranks: int) -> frozenset[int]:
    return frozenset(ranks)


def table(
    kinds: Mapping[str, str],
    busy: Mapping[int, float],
    seconds: Mapping[int, float] | None = None,
    gain: float = 0.6,
) -> Ways:
    """Ways as a planner has them: a job is `alone` on one host, `whole` on all of the mesh, or
    `any`: a ring of all takes it `gain` of the time. `seconds` are a host's, of one picture.
    """
    speeds = seconds or {}

    def ways(asked: ServedJob, ranks: frozenset[int]) -> Sequence[PaintWay]:
        kind = kinds.get(asked.id, "any")
        every: list[PaintWay] = []
        if kind in ("alone", "any"):
            for rank in sorted(ranks, key=lambda rank: (busy.get(rank, 0.0), rank)):
                wait = busy.get(rank, 0.0)
                every.append(PaintWay(some(rank), wait + speeds.get(rank, SECONDS), wait))
        if kind in ("whole", "any") and len(ranks) > 1 and kinds.get("mesh", "") in (
            "", str(len(ranks)),
        ):  # fmt: skip
            wait = max(busy.get(rank, 0.0) for rank in ranks)
            every.append(PaintWay(ranks, wait + gain * SECONDS, wait))
        return sorted(every, key=lambda way: way.seconds)

    return ways


def chosen(
    line: Sequence[ServedJob], free: frozenset[int], busy: Mapping[int, float], **more: object
) -> tuple[str, list[int]] | None:
    kinds = {"mesh": str(len(free) + len(busy)), **more.pop("kinds", {})}  # type: ignore[dict-item]
    start = choose(line, free, busy, table(kinds, busy, **more))  # type: ignore[arg-type]
    return None if start is None else (start.job.id, sorted(start.ranks))


def test_who_is_alone_has_all_hosts_and_its_own_plan_says_which_it_needs() -> None:
    def no_ways(asked: ServedJob, ranks: frozenset[int]) -> Sequence[PaintWay]:
        raise AssertionError("nobody else waits: nothing is planned twice")

    start = choose([job("a")], some(0, 1, 2), {}, no_ways)
    assert start is not None and start.ranks == some(0, 1, 2)
    assert choose([], some(0, 1), {}, no_ways) is None
    assert choose([job("a")], some(), {0: 5.0}, no_ways) is None


def test_a_mesh_of_one_host_plans_nothing_before_the_job_does() -> None:
    def no_ways(asked: ServedJob, ranks: frozenset[int]) -> Sequence[PaintWay]:
        raise AssertionError("there is one host")

    start = choose([job("a"), job("b")], some(0), {}, no_ways)
    assert start is not None and (start.job.id, start.ranks) == ("a", some(0))


def test_two_that_wait_take_a_host_each_where_that_is_cheaper_for_the_mesh() -> None:
    line = [job("a"), job("b")]
    assert chosen(line, some(0, 1), {}) == ("a", [0])
    assert chosen(line[1:], some(1), {0: SECONDS}) == ("b", [1])
    # A ring of two that takes less than half of the time is cheaper than a host each.
    assert chosen(line, some(0, 1), {}, gain=0.4) == ("a", [0, 1])


def test_who_comes_beside_a_job_that_runs_begins_on_the_hosts_that_are_idle() -> None:
    assert chosen([job("b")], some(1), {0: 8.0}) == ("b", [1])
    # It waits where the busy host is done so soon that both together are faster.
    assert chosen([job("b")], some(1), {0: 1.0}) is None
    # But not where others wait behind it.
    assert chosen([job("b"), job("c")], some(1), {0: 1.0}) == ("b", [1])


def test_a_job_that_needs_the_whole_mesh_keeps_the_hosts_that_it_waits_for() -> None:
    line = [job("all"), job("small")]
    kinds = {"all": "whole", "small": "alone"}
    assert chosen(line, some(1), {0: 5.0}, kinds=kinds) is None  # it would be in the way
    assert chosen(line, some(0, 1), {}, kinds=kinds) == ("all", [0, 1])
    # Who is done before the hosts come free does not delay it.
    assert chosen(line, some(1), {0: 20.0}, kinds=kinds) == ("small", [1])


def test_one_that_waits_is_overtaken_by_guesses_only_so_often() -> None:
    head = job("all")
    kinds, busy = {"all": "whole", "small": "alone", "mesh": "2"}, {0: 20.0}
    begun = []
    for _ in range(10):
        start = choose([head, job("small")], some(1), busy, table(kinds, busy))
        if start is None:
            break
        assert start.overtakes is head
        head.overtaken += 1  # as the service counts
        begun.append(start)
    assert len(begun) == 4


def of_models(
    models: Mapping[str, str], loaded: Mapping[int, str], seconds: Mapping[str, float], read: float
) -> Ways:
    """A job of each model by its id's letters; a host has one model, and needs `read` for others.

    `seconds` are those of a picture, by id.
    """

    def ways(asked: ServedJob, ranks: frozenset[int]) -> Sequence[PaintWay]:
        every = []
        for rank in sorted(ranks):
            load = 0.0 if loaded[rank] == models[asked.id] else read
            every.append(PaintWay(some(rank), load + seconds.get(asked.id, SECONDS), 0.0, load))
        return sorted(every, key=lambda way: way.seconds)

    return ways


def line_of(models: Mapping[str, str]) -> list[ServedJob]:
    return [replace(job(name), model=model) for name, model in models.items()]


def begun_one_after_another(
    models: Mapping[str, str], seconds: Mapping[str, float], read: float
) -> list[str]:
    """The order in which these jobs begin on one host that has the model `a`."""
    line, loaded, order = line_of(models), {0: "a"}, []
    while line:
        start = choose(line, some(0), {}, of_models(models, loaded, seconds, read))
        assert start is not None and start.ranks == some(0)
        if start.overtakes is not None:
            assert start.overtakes is line[0]
            start.overtakes.overtaken += 1
        line.remove(start.job)
        loaded[0] = models[start.job.id]
        order.append(start.job.id)
    return order


def test_of_those_in_line_who_has_its_model_in_memory_goes_first() -> None:
    models = {"1": "b", "2": "a", "3": "b", "4": "a"}
    assert begun_one_after_another(models, {}, 30.0) == ["2", "4", "1", "3"]
    # It is no matter of seconds that nobody notices.
    assert begun_one_after_another(models, {}, 0.5) == ["1", "2", "3", "4"]
    # Nor does anybody wait for who takes longer than the model takes to be read.
    assert begun_one_after_another(models, {"2": 500.0}, 30.0) == ["4", "1", "3", "2"]


def test_a_job_whose_model_is_not_in_memory_is_overtaken_only_so_often() -> None:
    models = {"first": "b", **{f"{k}": "a" for k in range(9)}}
    order = begun_one_after_another(models, {}, 30.0)
    assert order == ["0", "1", "2", "3", "first", "4", "5", "6", "7", "8"]
    line = line_of(models)
    line[0].overtaken = 4  # by others that were thought to be done in time
    start = choose(line, some(0), {}, of_models(models, {0: "a"}, {}, 30.0))
    assert start is not None and start.job is line[0]


def test_who_finds_its_model_on_another_host_overtakes_nobody() -> None:
    models = {"1": "b", "2": "a"}
    ways = of_models(models, {0: "a", 1: "b"}, {}, 30.0)
    first, second = line = line_of(models)
    start = choose(line, some(0, 1), {}, ways)
    assert start == Start(first, some(1))
    assert choose([second], some(0), {1: SECONDS}, ways) == Start(second, some(0))


def test_models_in_line_are_told_from_each_other_by_their_weights() -> None:
    quantized = resolved(ask(seed=1, bits=4))
    jobs = [
        replace(job(name), ready=ReadyPrompt(each, None))  # type: ignore[arg-type]
        for name, each in (("a", resolved(ask(seed=1))), ("b", resolved(ask(seed=2))),
                           ("c", quantized))
    ]  # fmt: skip
    assert jobs[0].denoiser == jobs[1].denoiser != jobs[2].denoiser


def test_others_begin_on_hosts_that_the_first_in_line_does_not_wait_for() -> None:
    def ways(asked: ServedJob, ranks: frozenset[int]) -> Sequence[PaintWay]:
        if asked.id == "pair":  # it fits on hosts 0 and 1 alone
            return [PaintWay(some(0, 1), 8.0, 5.0)] if some(0, 1) <= ranks else []
        return [PaintWay(some(rank), SECONDS) for rank in sorted(ranks - {0})]

    start = choose([job("pair"), job("small")], some(1, 2), {0: 5.0}, ways)
    assert start == Start(start.job, some(2)) if start else False
    assert start is not None and start.job.id == "small" and start.overtakes is None


def test_a_slow_host_is_left_idle_for_one_and_used_for_many() -> None:
    kinds = dict.fromkeys("abcdefgh", "alone")
    seconds = {0: SECONDS, 1: 6 * SECONDS}
    few = [job("a"), job("b")]
    assert chosen(few, some(1), {0: 2.0}, kinds=kinds, seconds=seconds) is None
    many = [job(name) for name in "abcdefgh"]
    start = chosen(many, some(1), {0: 2.0}, kinds=kinds, seconds=seconds)
    assert start is not None and start[1] == [1]  # the line would take longer


def test_what_nothing_can_paint_begins_and_tells_why() -> None:
    def none(asked: ServedJob, ranks: frozenset[int]) -> Sequence[PaintWay]:
        return []

    start = choose([job("a"), job("b")], some(1), {0: 5.0}, none)
    assert start is not None and (start.job.id, start.ranks) == ("a", some(1))


def test_in_any_mix_no_host_has_two_jobs_none_starves_and_the_whole_mesh_gets_its_turn() -> None:
    """A clock of its own: 300 jobs on three hosts, a tenth of which want all hosts together."""
    chance = random.Random(7)
    for _ in range(5):
        line: list[ServedJob] = []
        kinds: dict[str, str] = {"mesh": "3"}
        ends: dict[str, tuple[float, frozenset[int]]] = {}
        arrived: dict[str, float] = {}
        waited: dict[str, float] = {}
        now, number = 0.0, 0
        while number < 60 or line or ends:
            if number < 60 and (not line or chance.random() < 0.6):
                name, number = f"j{number}", number + 1
                kinds[name] = "whole" if chance.random() < 0.1 else "alone"
                arrived[name] = now
                line.append(job(name))
            while True:
                busy = {rank: end - now for end, ranks in ends.values() for rank in ranks}
                free = some(0, 1, 2) - frozenset(busy)
                start = choose(line, free, busy, table(kinds, busy))
                if start is None:
                    break
                assert start.ranks <= free
                if start.overtakes is not None:
                    start.overtakes.overtaken += 1
                line.remove(start.job)
                whole = kinds[start.job.id] == "whole"
                ranks = start.ranks if not whole else some(0, 1, 2)
                ends[start.job.id] = (now + (6.0 if whole else SECONDS), ranks)
                waited[start.job.id] = now - arrived[start.job.id]
            if ends:
                now = min(end for end, _ in ends.values())
                ends = {name: each for name, each in ends.items() if each[0] > now}
        assert len(waited) == 60
        # Nobody waits longer than those take that stood before it, one after another.
        assert all(waited[f"j{k}"] <= (k + 1) * SECONDS for k in range(60))


def test_the_planner_is_asked_once_for_jobs_that_are_alike_and_for_few_hosts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, ...]] = []

    def counted(request: FilledRequest, view: MeshView, *more: Any, **keys: Any) -> Plan:
        asked.append(view.ranks)
        return plan(request, view, *more, **keys)

    monkeypatch.setattr(host_choice, "plan", counted)
    view = full(*[mac(rank) for rank in range(4)])
    line = [
        replace(job(name), ready=ReadyPrompt(resolved(ask(seed=k)), None))  # type: ignore[arg-type]
        for k, name in enumerate("abc")
    ]
    busy = {0: 100.0, 1: 100.0, 2: 100.0}
    ways = planned_ways(view, busy)
    start = choose(line, some(3), busy, ways)
    assert start is not None and (start.job.id, start.ranks) == ("a", some(3))
    assert asked == [(3,)]  # what all hosts could do is of no interest: they are busy for long
    assert ways(line[1], some(3)) is ways(line[0], some(3)) and asked == [(3,)]
    (way,) = ways(line[0], some(0))
    assert way.wait == 100.0 < way.seconds
    sequence = replace(line[0], spread=Spread(placement="sequence"))
    assert {len(way.ranks) for way in ways(sequence, some(0, 1, 2, 3))} == {2, 3, 4}
    assert ways(sequence, some(3)) == []
    assert ways(replace(line[0], ready=None), some(3)) == []
