"""Engines of a real agent that die, hang, take long or are stopped, and what outlives whom."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fluxmesh.cluster.snapshot import ModelVariant
from fluxmesh.wire import messages
from fluxmesh.wire.messages import Decode, Encode, Load
from tests.integration.agents import (
    GONE,
    AgentProcess,
    agent,
    connected,
    encode,
    engine_of,
    failed,
    painting,
    play,
)
from tests.processes import is_gone, wait_until_gone


@pytest.mark.parametrize("moment", ["load", "encode", "step", "decode"])
def test_an_engine_that_is_killed_is_reported_and_the_next_one_does_the_work(
    tmp_path: Path, weights: ModelVariant, moment: str
) -> None:
    async def scene(host: AgentProcess) -> None:
        async with connected(host) as coordinator:
            await coordinator.lease()
            text = await encode(coordinator, weights)
            noise = painting(coordinator, weights, text).noise
            work = {
                "load": Load(**coordinator.head(), weights=weights),
                "encode": Encode(**coordinator.head(), weights=weights, prompt="another"),
                "step": painting(coordinator, weights, text),
                "decode": Decode(
                    **coordinator.head(),
                    weights=weights,
                    images=(0,),
                    height=32,
                    width=32,
                    latents=noise,
                ),
            }[moment]
            engine = await engine_of(coordinator)
            await coordinator.done(work)
            await asyncio.sleep(0.4)
            os.kill(engine, signal.SIGKILL)
            report = await failed(coordinator)  # by its end, and not by a deadline: see its kind
            assert (report.kind, report.fatal, report.job) == (
                messages.ENGINE_KILLED,
                True,
                "job",
            )
            assert "signal 9" in report.text
            status = await coordinator.status()
            assert (status.state, status.engine_pid, status.holds) == ("failed", None, None)
            await coordinator.done(work)  # the same agent starts another
            ends = (messages.Loaded, messages.TextEncoded, messages.Stepped, messages.Pictured)
            kind = dict(zip(("load", "encode", "step", "decode"), ends, strict=True))[moment]
            await coordinator.until(kind)
            assert await engine_of(coordinator) != engine

    # Long enough for this process to come and kill it, however busy the machine is.
    with agent(tmp_path, "--root", weights.model, envs={"FLUXMESH_DELAYS": f"{moment}=3"}) as host:
        play(scene(host))


def test_an_engine_that_hangs_gives_no_sign_while_its_agent_does_and_kill_ends_it(
    tmp_path: Path, weights: ModelVariant
) -> None:
    async def scene(host: AgentProcess) -> None:
        async with connected(host) as coordinator:
            await coordinator.lease()
            text = await encode(coordinator, weights)
            engine = await engine_of(coordinator)
            await coordinator.done(painting(coordinator, weights, text, steps=500))
            await coordinator.until(messages.Stepped)
            os.kill(engine, signal.SIGSTOP)
            # The answer comes behind all that the agent had sent; what it had not read from the
            # engine yet, one report at most, is here two beats later.
            await coordinator.status()
            await coordinator.until_beats(2)
            coordinator.heard.clear()
            await coordinator.until_beats(2)
            assert coordinator.heard == []
            assert (await coordinator.status()).state == "busy"
            await coordinator.done(
                messages.Kill(
                    fence=coordinator.fence, ring_generation=coordinator.ring_generation + 1
                )
            )
            assert is_gone(engine)
            coordinator.ring_generation += 1
            coordinator.read = 0
            await coordinator.done(painting(coordinator, weights, text))
            assert (
                await coordinator.until(messages.Stepped)
            ).ring_generation == coordinator.ring_generation

    # Few reports under way, and not done before this process comes, however busy the machine is.
    with agent(tmp_path, "--root", weights.model, envs={"FLUXMESH_DELAYS": "step=0.5"}) as host:
        play(scene(host))


def test_a_long_unit_beats_until_it_is_done(tmp_path: Path, weights: ModelVariant) -> None:
    async def scene(host: AgentProcess) -> None:
        async with connected(host) as coordinator:
            await coordinator.lease()
            text = await encode(coordinator, weights)
            await coordinator.done(painting(coordinator, weights, text, steps=2))
            while (beat := await coordinator.until(messages.Beat)).doing == "loading":
                continue  # a busy machine takes more than a beat for that, too
            assert beat.doing == "first step"
            await coordinator.until(messages.Stepped)
            await coordinator.until(messages.Stepped)
            coordinator.heard.clear()
            coordinator.read = 0
            await coordinator.done(painting(coordinator, weights, text, steps=1, image=1))
            await coordinator.until(messages.Stepped)
            # Where kernels are compiled it says so: nobody grants it the minutes of a first step.
            beats = {
                report.doing for report in coordinator.heard if isinstance(report, messages.Beat)
            }
            assert beats == {messages.WARM_STEP}

    with agent(tmp_path, "--root", weights.model, envs={"FLUXMESH_DELAYS": "step=1.6"}) as host:
        play(scene(host))


def test_cancel_stops_at_the_next_step_and_drops_what_waits(
    tmp_path: Path, weights: ModelVariant
) -> None:
    async def scene(host: AgentProcess) -> None:
        async with connected(host) as coordinator:
            await coordinator.lease()
            text = await encode(coordinator, weights)
            engine = await engine_of(coordinator)
            for image in range(3):
                await coordinator.done(painting(coordinator, weights, text, steps=500, image=image))
            await coordinator.until(messages.Stepped)
            await coordinator.done(messages.Cancel(fence=coordinator.fence, job="job"))
            await coordinator.until(messages.Cancelled)
            steps = (await coordinator.status()).counters.steps
            assert steps < 500
            for job in ("next", "job"):  # also the cancelled one, from here on
                await coordinator.done(painting(coordinator, weights, text, steps=1, job=job))
                assert (await coordinator.until(messages.Stepped)).job == job
            status = await coordinator.status()
            assert status.counters.steps == steps + 2
            assert status.engine_pid == engine

    with agent(tmp_path, "--root", weights.model, envs={"FLUXMESH_DELAYS": "step=0.1"}) as host:
        play(scene(host))


def test_an_engine_ends_when_its_agent_is_killed(tmp_path: Path, weights: ModelVariant) -> None:
    async def scene(host: AgentProcess) -> int:
        async with connected(host) as coordinator:
            await coordinator.lease()
            text = await encode(coordinator, weights)
            await coordinator.done(painting(coordinator, weights, text, steps=500))
            await coordinator.until(messages.Stepped)
            engine = await engine_of(coordinator)
            host.process.kill()
            return engine

    # It computes when its agent is killed, however late this process comes.
    with agent(tmp_path, "--root", weights.model, envs={"FLUXMESH_DELAYS": "step=0.1"}) as host:
        wait_until_gone([play(scene(host))])


def test_an_agent_that_starts_again_ends_the_engine_that_was_left_behind(
    tmp_path: Path, weights: ModelVariant
) -> None:
    async def engine(host: AgentProcess) -> int:
        async with connected(host) as coordinator:
            return await engine_of(coordinator)

    with agent(tmp_path) as host:
        orphan = play(engine(host))
        os.kill(orphan, signal.SIGSTOP)  # it can't hear that its agent is gone
        time.sleep(0.3)
        host.process.kill()
        host.process.wait()
        key, boot = host.key, host.boot
    assert not is_gone(orphan)
    with agent(tmp_path) as host:
        assert play(engine(host)) != orphan
        assert is_gone(orphan)
        assert (host.key == key, host.boot == boot) == (True, False)


def test_another_process_with_the_orphans_number_is_left_alone(tmp_path: Path) -> None:
    async def until_it_serves(host: AgentProcess) -> None:
        async with connected(host):
            """By then it has looked at the record."""

    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as stranger:
        try:
            (tmp_path / "agent").mkdir(mode=0o700)
            record = tmp_path / "agent" / "engine.json"
            record.write_text(f'{{"pid": {stranger.pid}, "start": "1"}}')
            record.chmod(0o600)
            with agent(tmp_path / "agent") as host:
                play(until_it_serves(host))
            assert stranger.poll() is None
        finally:
            stranger.kill()


def test_an_ephemeral_agent_ends_with_its_stdin_and_leaves_no_process(host: AgentProcess) -> None:
    async def engine() -> int:
        async with connected(host) as coordinator:
            return await engine_of(coordinator)

    pid = play(engine())
    host.close_stdin()
    assert host.process.wait(GONE) == 0
    assert is_gone(pid)
    assert not host.state.exists()


def test_shutting_down_is_answered_and_leaves_no_process(tmp_path: Path) -> None:
    async def scene(host: AgentProcess) -> int:
        async with connected(host) as coordinator:
            engine = await engine_of(coordinator)
            await coordinator.done(messages.ShutDown())
            return engine

    with agent(tmp_path, ephemeral=False) as host:
        engine = play(scene(host))
        assert host.process.wait(GONE) == 0
        assert is_gone(engine)


def test_one_state_folder_has_one_agent(host: AgentProcess) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fluxmesh_agent", "run", "--state", str(host.state)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "An agent runs with" in done.stderr
    assert "Traceback" not in done.stderr
