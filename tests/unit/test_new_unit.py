"""A new unit of work is written in one place: codec, agent and coordinator know it by its class."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from fluxmesh.cluster.hostfile import Host
from fluxmesh.cluster.snapshot import HostInfo, ModelVariant
from fluxmesh.wire import messages
from fluxmesh.wire.protocol import TYPES, decode, encode
from fluxmesh_agent.lifecycle import Lifecycle, Send, Tell
from fluxmesh_coordinator.deploy.leased_work import Errand
from fluxmesh_coordinator.jobs.host import HostState, QueuedWork
from fluxmesh_coordinator.jobs.session import JobSession
from fluxmesh_coordinator.jobs.state import JobState
from fluxmesh_coordinator.jobs.training.tasks import Choice, Chosen
from fluxmesh_coordinator.jobs.types import (
    Instruction,
    Job,
    LeasedHost,
    Links,
    Reported,
    SendToAgent,
    Tick,
)
from tests.messages import same
from tests.new_unit import Polish, Polished, Rubbed, polish
from tests.unit.meshes import mac

FEATURES = {"shine": np.ones((1, 3), np.float32), "grain": np.ones((2, 2, 2), np.uint16)}
RUBBED = Rubbed(job="job", ring_generation=0, side=0)
POLISHED = Polished(job="job", ring_generation=0, features=FEATURES)


def leased(rank: int) -> LeasedHost:
    host = Host(rank, "127.0.0.1", ("127.0.0.1",))
    return LeasedHost(info=mac(rank), host=host, fence=1, ring_generation=0)


def test_the_codec_carries_it_and_its_reports() -> None:
    for message in (polish(FEATURES, together=True), RUBBED, POLISHED):
        assert same(decode([bytes(frame) for frame in encode(message)])[1], message)


def test_an_agent_hands_it_to_its_engine_and_its_reports_on() -> None:
    life = Lifecycle()
    life.start()
    work = polish(FEATURES)
    assert life.work(work) == [Send(work)]
    assert (life.state, life.job, life.served) == ("busy", "job", ModelVariant("tiny"))
    assert life.engine_said(RUBBED) == [Tell(RUBBED)]
    over = messages.Account(
        is_over=True, holds=None, counters=messages.EngineCounters(), load_rate=0.0
    )
    assert life.engine_said(over) == [] and life.is_free
    assert life.engine_said(POLISHED) == [Tell(POLISHED)]
    life.kill(messages.Kill(fence=1, ring_generation=1))
    life.start()
    assert life.engine_said(POLISHED) == []  # of the engine that was ended


def test_a_host_knows_how_long_it_may_take_and_what_ends_it() -> None:
    host = HostState(leased(0), 0.0)
    first, second = polish(FEATURES), polish(FEATURES)
    host.sent(first, 0.0)
    host.sent(second, 0.0)
    assert "no sign for 6 s while polishing" in beating(host, 1, 1, then=7.0)
    assert beating(host, 2, 80, then=80.0) == ""
    assert beating(host, 80, 80, then=81.0) == "polishing took more than 80 s"  # two sides
    unit = host.heard(RUBBED, 81.0)
    assert unit is not None and unit.message is first and host.line[0] is unit
    unit = host.heard(POLISHED, 82.0)
    assert unit is not None and unit.message is first
    assert [(other.message, other.since) for other in host.line] == [(second, 82.0)]
    assert host.heard(messages.Warmed(job="job", ring_generation=0, seconds=1.0), 83.0) is None
    assert not host.is_free
    host.heard(POLISHED, 84.0)
    assert host.is_free


def beating(host: HostState, first: int, last: int, then: float) -> str:
    """What is overdue `then`, after its engine has ticked from `first` to `last`."""
    for now in range(first, last + 1):
        host.heard(messages.Beat(job="job", ring_generation=0, doing="polishing"), float(now))
    return host.overdue(then)


class PolishState(JobState[HostState]):
    """Which hosts have polished."""

    def __init__(self) -> None:
        super().__init__(Job(id="job", secret=b"secret"), "tiny")
        self.polished: set[int] = set()

    def give_back(self, host: HostState) -> None:
        host.let_go()

    def goes_on_without(self, rank: int) -> None:
        return

    def ring_ends(self) -> None:
        return


class PolishSession(JobSession[HostState]):
    """Every host polishes once."""

    state: PolishState

    def __init__(self) -> None:
        super().__init__(PolishState())
        self.units: list[QueuedWork | None] = []

    def new_host(self, leased: LeasedHost) -> HostState:
        return HostState(leased, self.now)

    def propose(self, hosts: Sequence[HostInfo]) -> Choice:
        return Choice(Chosen(tuple(host.rank for host in hosts)))

    def begun(self) -> None:
        self.state.polished.clear()

    def returned(self, host: HostState) -> None:
        return

    def reported(self, host: HostState, report: messages.Report, unit: QueuedWork | None) -> None:
        self.units.append(unit)
        if isinstance(report, Polished):
            self.state.polished.add(host.rank)

    def go_on(self) -> None:
        if self.state.polished >= set(self.state.hosts):
            self.finish()
        for host in self.state.hosts.values():
            if host.is_free and host.rank not in self.state.polished:
                self.send(host, polish(FEATURES, ring_generation=host.ring_generation))


def given(instructions: Sequence[Instruction], kind: type[Any]) -> list[int]:
    """Who is sent something of this kind."""
    return [
        each.rank
        for each in instructions
        if isinstance(each, SendToAgent) and isinstance(each.message, kind)
    ]


def test_a_session_hears_its_reports_with_the_unit_and_one_that_hangs_is_ended() -> None:
    session = PolishSession()
    assert given(session.begin([leased(0), leased(1)], Links(), 0.0), Polish) == [0, 1]
    assert session.handle(Reported(0, RUBBED), 1.0) == []
    session.handle(Reported(1, RUBBED), 1.0)
    assert session.handle(Reported(0, POLISHED), 2.0) == []  # host 1 is not done
    assert [unit is not None and type(unit.message) for unit in session.units] == [Polish] * 3
    assert session.state.hosts[0].is_free and not session.state.hosts[1].is_free
    out = session.handle(Tick(), 30.0)
    assert given(out, messages.Kill) == [1]
    kill = out[-1]
    assert isinstance(kill, SendToAgent) and session.state.losses == 1


def test_an_errand_ends_with_the_report_that_ends_it() -> None:
    class PolishedAgent:
        title = "host 0"

        def __init__(self) -> None:
            self.reports = [RUBBED, RUBBED, POLISHED, RUBBED]

        async def ask(self, request: messages.Message, answer: type[messages.Message]) -> None:
            assert isinstance(request, Polish)

        async def report(self) -> messages.Report:
            return self.reports.pop(0)

    async def scene() -> list[messages.Report]:
        granted = messages.Granted(1, 0, None)  # type: ignore[arg-type]
        work: Any = type("Work", (), {"weights": ModelVariant("tiny")})
        errand = Errand(PolishedAgent(), granted, work)  # type: ignore[arg-type]
        unit = polish(FEATURES, **errand.common)
        return [report async for report in errand.do(unit, 1.0)]

    assert asyncio.run(scene()) == [RUBBED, RUBBED, POLISHED]


# Every unit that there is


UNITS = [kind for kind in TYPES.values() if issubclass(kind, messages.EngineUnit)]


@pytest.mark.parametrize("kind", UNITS, ids=lambda kind: kind.__name__)
def test_every_unit_says_of_itself_what_others_must_know(kind: type[messages.EngineUnit]) -> None:
    assert all(report in TYPES.values() for report in kind.reports)
    if kind.reports:
        assert kind.doing != messages.EngineUnit.doing
    else:  # done at once: nothing of it may wait for others
        assert kind.is_collective is messages.EngineUnit.is_collective


def test_every_report_of_work_is_of_one_kind_of_unit() -> None:
    given_by = [report for kind in UNITS for report in kind.reports]
    assert len(given_by) == len(set(given_by))
    of_any = {messages.Failed, messages.Cancelled, messages.LoadProgress, messages.Beat}
    reports = {kind for kind in TYPES.values() if issubclass(kind, messages.EngineReport)}
    assert reports == set(given_by) | of_any
