"""Who may use a real agent: leases, the line for them, and coordinators that come back or don't."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from fluxmesh.cluster.snapshot import ModelVariant
from fluxmesh.deadlines import DEADLINES
from fluxmesh.wire import messages
from fluxmesh.wire.messages import Encode, Load
from tests.integration.agents import (
    GONE,
    AgentProcess,
    agent,
    connected,
    encode,
    engine_of,
    painting,
    play,
)
from tests.processes import wait_until_gone


def test_who_has_no_lease_changes_nothing(host: AgentProcess, weights: ModelVariant) -> None:
    async def scene() -> None:
        async with connected(host) as holder, connected(host) as other:
            await holder.lease()
            for fence in (0, holder.fence, holder.fence + 1):
                answer = await other.ask(
                    Load(fence=fence, job="job", ring_generation=0, weights=weights)
                )
                assert isinstance(answer, messages.Refused)
                assert answer.code == "fence"
            stale = await holder.ask(
                Load(fence=holder.fence - 1, job="job", ring_generation=0, weights=weights)
            )
            assert isinstance(stale, messages.Refused)
            assert (await holder.status()).state == "idle"

    play(scene())


def test_a_request_that_comes_again_is_answered_again_and_not_done_twice(
    host: AgentProcess, weights: ModelVariant
) -> None:
    async def scene() -> None:
        async with connected(host) as coordinator:
            await coordinator.lease()
            work = Encode(**coordinator.head(), weights=weights, prompt="a cat")
            for _ in range(5):
                assert await coordinator.repeat(work, 1000) == messages.Done()
            await coordinator.until(messages.TextEncoded)
            assert (await coordinator.status()).counters.encodes == 1
            assert (
                sum(isinstance(report, messages.TextEncoded) for report in coordinator.heard) == 1
            )

    play(scene())


@pytest.mark.alone
def test_the_second_waits_sees_its_place_and_gets_the_lease_when_the_first_leaves(
    host: AgentProcess,
) -> None:
    async def scene() -> float:
        async with connected(host) as first, connected(host) as second:
            await first.lease()
            await second.done(messages.AskLease("mine", 1.0))
            queued = await second.until(messages.LeaseQueued)
            assert queued.place == 1
            assert (await first.status()).waiting == 1
            start = time.monotonic()
            await first.done(messages.LeaveQueue())
            granted = await second.until(messages.Granted)
            assert granted.fence > first.fence
            return time.monotonic() - start

    assert min(play(scene()) for _ in range(5)) < 0.2


def test_a_coordinator_whose_connection_breaks_comes_back_to_its_lease(
    host: AgentProcess, weights: ModelVariant
) -> None:
    async def scene() -> bool:
        async with connected(host, client="other") as other:
            async with connected(host, client="me") as coordinator:
                await coordinator.lease()
                fence = coordinator.fence
                await other.done(messages.AskLease("mine", 1.0))
                broke = time.monotonic()
            async with connected(host, client="me") as coordinator:
                await coordinator.done(messages.AskLease("job", 1.0))
                took = time.monotonic() - broke
                if took < DEADLINES.left:  # else it came too late, on a machine that does much else
                    assert (await coordinator.until(messages.Granted)).fence == fence
                    coordinator.fence = fence
                    await encode(coordinator, weights)
                    assert (await other.status()).waiting == 1
                return took < DEADLINES.left

    assert any(play(scene()) for _ in range(20))


def test_a_coordinator_that_falls_silent_loses_the_host_and_its_work_stops(
    tmp_path: Path, weights: ModelVariant
) -> None:
    async def scene(host: AgentProcess) -> None:
        async with connected(host) as first, connected(host) as second:
            await first.lease()
            text = await encode(first, weights)
            await first.done(painting(first, weights, text, steps=500))
            await first.until(messages.Stepped)
            first.is_silent, silent = True, time.monotonic()
            engine = await engine_of(first)  # the last that is heard of it
            await second.lease("mine")
            assert DEADLINES.silence <= time.monotonic() - silent < GONE
            await first.until(messages.Lost)
            status = await second.status()
            assert (status.state, status.engine_pid) == ("ready", engine)  # still warm
            assert 0 < status.counters.steps < 500
            assert status.holder == second.client

    with agent(tmp_path, "--root", weights.model, envs={"FLUXMESH_DELAYS": "step=0.1"}) as host:
        play(scene(host))


def test_an_engine_that_does_not_let_go_of_a_lost_coordinators_work_is_ended(
    tmp_path: Path, weights: ModelVariant
) -> None:
    async def scene(host: AgentProcess) -> None:
        async with connected(host) as first, connected(host) as second:
            await first.lease()
            text = await encode(first, weights)
            engine = await engine_of(first)
            await first.done(painting(first, weights, text, steps=500))
            await first.until(messages.Stepped)
            os.kill(engine, signal.SIGSTOP)
            first.is_silent = True
            await second.lease("mine")
            wait_until_gone([engine])
            assert second.ring_generation == first.ring_generation + 1
            await encode(second, weights)

    with agent(tmp_path, "--root", weights.model, envs={"FLUXMESH_DELAYS": "step=0.1"}) as host:
        play(scene(host))
