"""A real agent that stood still, as a Mac that slept: its coordinator comes back to its lease."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path

from fluxmesh.cluster.snapshot import ModelVariant
from fluxmesh.deadlines import DEADLINES
from fluxmesh.wire import messages
from fluxmesh.wire.messages import Load
from tests.integration.agents import AgentProcess, agent, connected, play

ASLEEP = 7.0  # seconds: more than ZeroMQ and a lease bear of silence


def test_a_coordinator_finds_its_lease_and_its_weights_after_the_agent_slept(
    tmp_path: Path,
) -> None:
    async def scene(host: AgentProcess) -> bool:
        async with connected(host, client="me") as coordinator:
            await coordinator.lease()
            await coordinator.done(
                Load(**coordinator.head(), weights=ModelVariant("tiny", "float32"))
            )
            await coordinator.until(messages.Loaded)
            before, fence = await coordinator.status(), coordinator.fence
            host.process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(ASLEEP)
        woke = time.monotonic()
        host.process.send_signal(signal.SIGCONT)
        async with connected(host, client="me") as coordinator:
            await coordinator.lease()
            took = time.monotonic() - woke
            after = await coordinator.status()
            assert after.engine_pid == before.engine_pid
            if took < DEADLINES.left:  # else it came too late, on a machine that does much else
                assert (coordinator.fence, after.holds) == (fence, before.holds)
        assert "passed unseen" in host.log
        return took < DEADLINES.left

    with agent(tmp_path, "--root", "/") as host:
        try:
            assert any(play(scene(host)) for _ in range(10))
        finally:
            host.process.send_signal(signal.SIGCONT)
