"""A real agent that stood still, as a Mac that slept: its coordinator comes back to its lease."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

from fluxmesh.cluster.snapshot import ModelVariant
from fluxmesh.wire import messages
from fluxmesh.wire.messages import Load
from tests.integration.agents import AgentProcess, agent, coordinator, play

ASLEEP = 7.0  # seconds: more than ZeroMQ and a lease bear of silence


def test_a_coordinator_finds_its_lease_and_its_weights_after_the_agent_slept(
    tmp_path: Path,
) -> None:
    async def scene(host: AgentProcess) -> None:
        async with coordinator(host, client="me") as one:
            await one.lease()
            await one.done(Load(**one.head(), weights=ModelVariant("tiny", "float32")))
            await one.until(messages.Loaded)
            before, fence = await one.status(), one.fence
            host.process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(ASLEEP)
        host.process.send_signal(signal.SIGCONT)
        async with coordinator(host, client="me") as one:
            await one.lease()
            after = await one.status()
            assert one.fence == fence
            assert (after.engine_pid, after.holds) == (before.engine_pid, before.holds)
        assert "passed unseen" in host.log

    with agent(tmp_path, "--root", "/") as host:
        try:
            play(scene(host))
        finally:
            host.process.send_signal(signal.SIGCONT)
