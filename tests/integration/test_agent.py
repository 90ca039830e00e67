"""One real agent with a real engine over the real transport: answers, deaths, hangs, leases."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from fluxmesh.cluster.snapshot import ModelVariant, StepShape
from fluxmesh.request import AdapterRef, GenerateRequest
from fluxmesh.storage.processes import started_at
from fluxmesh.version import __version__
from fluxmesh.wire import messages
from fluxmesh.wire.messages import Decode, Encode, Load, Measure
from tests.alone import painted_alone
from tests.checkpoints import make_checkpoint, write_safetensors
from tests.integration.agents import (
    AgentProcess,
    Coordinator,
    agent,
    connected,
    encode,
    painting,
    play,
)

GONE = 10.0  # seconds within which what should end has ended


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> ModelVariant:
    return ModelVariant(str(make_checkpoint(tmp_path_factory.mktemp("model")).path), "float32")


@pytest.fixture
def host(tmp_path: Path, weights: ModelVariant) -> Iterator[AgentProcess]:
    with agent(tmp_path / "agent", "--root", weights.model) as running:
        yield running


def is_running(pid: int) -> bool:
    return started_at(pid) is not None


def wait_gone(pid: int, seconds: float = GONE) -> None:
    end = time.monotonic() + seconds
    while is_running(pid):
        assert time.monotonic() < end, f"process {pid} is still there"
        time.sleep(0.02)


async def engine_of(coordinator: Coordinator) -> int:
    pid = (await coordinator.status()).engine_pid
    assert pid is not None
    return pid


async def failed(coordinator: Coordinator, seconds: float = GONE) -> messages.Failed:
    """The next report of a failure."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for report in coordinator.heard:
            if isinstance(report, messages.Failed):
                coordinator.heard.clear()
                coordinator.read = 0
                return report
        await asyncio.sleep(0.02)
    raise AssertionError(f"nothing failed: {coordinator.heard}")


def test_an_image_by_way_of_an_agent_is_that_of_this_process(
    host: AgentProcess, weights: ModelVariant
) -> None:
    async def scene() -> np.ndarray:
        async with connected(host) as coordinator:
            await coordinator.lease()
            text = await encode(coordinator, weights, "two dogs")
            await coordinator.done(painting(coordinator, weights, text, seed=5))
            for number in (1, 2, 3):
                step = await coordinator.until(messages.Stepped)
                assert step.step == number
                assert step.latents is not None
            await coordinator.done(
                Decode(
                    **coordinator.head(),
                    weights=weights,
                    images=(0,),
                    height=32,
                    width=32,
                    latents=step.latents,
                )
            )
            picture = (await coordinator.until(messages.Pictured)).pixels
            status = await coordinator.status()
            assert (status.state, status.job, status.ring_generation) == ("ready", "job", 0)
            counted = status.counters
            assert (counted.images, counted.steps, counted.encodes, counted.decodes) == (1, 3, 1, 1)
            assert counted.sent_bytes == 0
            assert status.holds is not None
            assert status.holds.weights == weights
            assert status.holds.nbytes > counted.transformer_bytes > counted.block_bytes > 0
            assert coordinator.client == status.holder
            return picture

    request = GenerateRequest(
        "two dogs", 5, weights.model, height=32, width=32, steps=3, dtype="float32"
    )
    assert np.array_equal(play(scene()), painted_alone(request)[0])


def test_status_says_what_the_host_is_before_anything_is_loaded(host: AgentProcess) -> None:
    async def scene() -> None:
        async with connected(host) as coordinator:
            status = await coordinator.status()
            assert status.state == "idle"
            assert status.holds is None
            # What Metal recommends is less than an idle Mac has free.
            whole = psutil.virtual_memory().total
            assert 1 << 20 < status.memory_bytes <= whole and 1 << 20 < status.free_bytes < whole
            assert status.flops_per_second > 1e8
            assert abs(status.clock - time.time()) < 5
            assert status.kind != "unknown"
            assert status.platform == "cpu" and status.machine_bytes > status.free_bytes
            assert status.pid == host.process.pid

    play(scene())


def test_a_host_says_no_more_memory_than_its_owner_allows(tmp_path: Path) -> None:
    async def scene(host: AgentProcess) -> None:
        async with connected(host) as coordinator:
            assert (await coordinator.status()).memory_bytes == 1 << 30

    with agent(tmp_path, "--memory", str(1 << 30)) as host:
        play(scene(host))


def test_damaged_weights_are_told_and_the_engine_lives_to_load_others(
    tmp_path: Path, weights: ModelVariant
) -> None:
    broken = make_checkpoint(tmp_path / "broken").path
    file = next((broken / "transformer").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1000])

    async def scene(host: AgentProcess) -> None:
        async with connected(host) as coordinator:
            await coordinator.lease()
            engine = await engine_of(coordinator)
            await coordinator.done(Load(**coordinator.head(), weights=ModelVariant(str(broken))))
            report = await failed(coordinator)
            assert (report.kind, report.fatal, report.job) == ("WeightsError", False, "job")
            assert file.name in report.text
            await coordinator.done(Load(**coordinator.head(), weights=weights))
            await coordinator.until(messages.Loaded)
            assert await engine_of(coordinator) == engine

    with agent(tmp_path / "agent", "--root", "/") as host:
        play(scene(host))


def test_a_step_and_a_decode_are_measured(host: AgentProcess, weights: ModelVariant) -> None:
    async def scene() -> None:
        async with connected(host) as coordinator:
            await coordinator.lease()
            await coordinator.done(
                Measure(**coordinator.head(), weights=weights, height=32, width=32)
            )
            timed = await coordinator.until(messages.Timed)
            measured = (await coordinator.status()).measured
            assert measured == (timed.measured,)
            assert measured[0].decode_seconds is not None
            assert 0 < measured[0].step_seconds < 10
            assert measured[0].kernels_seconds is not None  # nothing was compiled before
            assert measured[0].first_seconds is None
            assert abs(measured[0].when - time.time()) < 60
            made = StepShape.of(weights, "data", 1, 32, 32)
            assert (await coordinator.status()).compiled == (made,)
            await coordinator.done(
                Measure(**coordinator.head(), weights=weights, height=32, width=32)
            )
            again = (await coordinator.until(messages.Timed)).measured
            assert again.kernels_seconds is None and again.when > measured[0].when
            (kept,) = (await coordinator.status()).measured  # what nobody will measure again
            assert kept == replace(again, kernels_seconds=measured[0].kernels_seconds)
            await coordinator.done(
                Measure(**coordinator.head(), weights=weights, height=32, width=48)
            )
            other = (await coordinator.until(messages.Timed)).measured
            assert other.kernels_seconds is None and other.first_seconds is not None
            await coordinator.done(
                messages.Kill(
                    fence=coordinator.fence, ring_generation=coordinator.ring_generation + 1
                )
            )
            assert (await coordinator.status()).compiled == ()

    play(scene())


def test_an_adapter_is_sent_once_and_changes_the_image(
    host: AgentProcess, weights: ModelVariant, tmp_path: Path
) -> None:
    rng = np.random.default_rng(1)
    low = {"lora_down": (4, 64), "lora_up": (64, 4)}
    arrays = {
        f"diffusion_model.double_blocks.0.img_attn.proj.{leaf}.weight": rng.standard_normal(
            shape, dtype=np.float32
        )
        for leaf, shape in low.items()
    }
    write_safetensors(tmp_path / "adapter.safetensors", arrays)
    data = np.frombuffer((tmp_path / "adapter.safetensors").read_bytes(), np.uint8)
    sha = hashlib.sha256(data).hexdigest()
    adapted = ModelVariant(weights.model, "float32", adapters=(AdapterRef(sha),))

    async def scene() -> None:
        async with connected(host) as coordinator:
            await coordinator.lease()
            assert await coordinator.ask(
                messages.HasFile(fence=coordinator.fence, sha256=sha)
            ) == messages.Found(False)
            await coordinator.done(Load(**coordinator.head(), weights=adapted))
            assert (await failed(coordinator)).kind == "AdapterError"
            for start in range(0, len(data), 1500):
                piece = data[start : start + 1500]
                await coordinator.done(
                    messages.PutFile(
                        fence=coordinator.fence,
                        sha256=sha,
                        offset=start,
                        total=len(data),
                        data=piece,
                    )
                )
            assert await coordinator.ask(
                messages.HasFile(fence=coordinator.fence, sha256=sha)
            ) == messages.Found(True)
            latents = []
            for each in (weights, adapted):
                text = await encode(coordinator, each)
                await coordinator.done(painting(coordinator, each, text, steps=1))
                latents.append((await coordinator.until(messages.Stepped)).latents)
            assert np.abs(latents[0] - latents[1]).max() > 0.01

    play(scene())


def test_a_model_outside_of_the_roots_is_refused_and_the_engine_lives(
    host: AgentProcess, weights: ModelVariant
) -> None:
    async def scene() -> None:
        async with connected(host) as coordinator:
            await coordinator.lease()
            engine = await engine_of(coordinator)
            for name in ("/etc", str(host.state), "../.."):
                await coordinator.done(Load(**coordinator.head(), weights=ModelVariant(name)))
                report = await failed(coordinator)
                assert (report.kind, report.fatal) == ("ModelNotFoundError", False)
            await encode(coordinator, weights)
            assert await engine_of(coordinator) == engine

    play(scene())


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
            start = time.monotonic()
            report = await failed(coordinator)
            assert time.monotonic() - start < 1.0
            assert (report.kind, report.fatal, report.job) == ("Died", True, "job")
            assert "signal 9" in report.text
            status = await coordinator.status()
            assert (status.state, status.engine_pid, status.holds) == ("failed", None, None)
            await coordinator.done(work)  # the same agent starts another
            ends = (messages.Loaded, messages.TextEncoded, messages.Stepped, messages.Pictured)
            kind = dict(zip(("load", "encode", "step", "decode"), ends, strict=True))[moment]
            await coordinator.until(kind)
            assert await engine_of(coordinator) != engine

    slow = {"FLUXMESH_DELAYS": "load=0.8,encode=0.8,step=0.8,decode=0.8"}
    with agent(tmp_path, "--root", weights.model, envs=slow) as host:
        play(scene(host))


def test_an_engine_that_hangs_gives_no_sign_while_its_agent_does_and_kill_ends_it(
    host: AgentProcess, weights: ModelVariant
) -> None:
    async def scene() -> None:
        async with connected(host) as coordinator:
            await coordinator.lease()
            text = await encode(coordinator, weights)
            engine = await engine_of(coordinator)
            await coordinator.done(painting(coordinator, weights, text, steps=500))
            await coordinator.until(messages.Stepped)
            os.kill(engine, signal.SIGSTOP)
            await asyncio.sleep(0.3)
            coordinator.heard.clear()
            beats = coordinator.beats
            await asyncio.sleep(2.5)
            assert coordinator.heard == []
            assert coordinator.beats >= beats + 2
            assert (await coordinator.status()).state == "busy"
            await coordinator.done(
                messages.Kill(
                    fence=coordinator.fence, ring_generation=coordinator.ring_generation + 1
                )
            )
            assert not is_running(engine)
            coordinator.ring_generation += 1
            coordinator.read = 0
            await coordinator.done(painting(coordinator, weights, text))
            assert (
                await coordinator.until(messages.Stepped)
            ).ring_generation == coordinator.ring_generation

    play(scene())


def test_a_long_unit_beats_until_it_is_done(tmp_path: Path, weights: ModelVariant) -> None:
    async def scene(host: AgentProcess) -> None:
        async with connected(host) as coordinator:
            await coordinator.lease()
            text = await encode(coordinator, weights)
            await coordinator.done(painting(coordinator, weights, text, steps=2))
            assert (await coordinator.until(messages.Beat)).doing == "first step"
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
    host: AgentProcess, weights: ModelVariant
) -> None:
    async def scene() -> None:
        async with connected(host) as coordinator:
            await coordinator.lease()
            text = await encode(coordinator, weights)
            engine = await engine_of(coordinator)
            for image in range(3):
                await coordinator.done(painting(coordinator, weights, text, steps=500, image=image))
            await coordinator.until(messages.Stepped)
            start = time.monotonic()
            await coordinator.done(messages.Cancel(fence=coordinator.fence, job="job"))
            await coordinator.until(messages.Cancelled)
            assert time.monotonic() - start < 2.0
            steps = (await coordinator.status()).counters.steps
            assert steps < 500
            for job in ("next", "job"):  # also the cancelled one, from here on
                await coordinator.done(painting(coordinator, weights, text, steps=1, job=job))
                assert (await coordinator.until(messages.Stepped)).job == job
            status = await coordinator.status()
            assert status.counters.steps == steps + 2
            assert status.engine_pid == engine

    play(scene())


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
    async def scene() -> None:
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
            assert time.monotonic() - start < 0.2

    play(scene())


def test_a_coordinator_whose_connection_breaks_comes_back_to_its_lease(
    host: AgentProcess, weights: ModelVariant
) -> None:
    async def scene() -> None:
        async with connected(host, client="me") as coordinator:
            await coordinator.lease()
            fence = coordinator.fence
        async with (
            connected(host, client="other") as other,
            connected(host, client="me") as coordinator,
        ):
            await other.done(messages.AskLease("mine", 1.0))
            await coordinator.lease()
            assert coordinator.fence == fence
            await encode(coordinator, weights)
            assert (await other.status()).waiting == 1

    play(scene())


def test_a_coordinator_that_falls_silent_loses_the_host_and_its_work_stops(
    tmp_path: Path, weights: ModelVariant
) -> None:
    async def scene(host: AgentProcess) -> None:
        async with connected(host, beats=False) as first, connected(host) as second:
            await first.lease()
            text = await encode(first, weights)
            engine = await engine_of(first)
            await first.done(painting(first, weights, text, steps=300))
            silent = time.monotonic()
            await second.lease("mine")
            assert 4.5 < time.monotonic() - silent < 10.0
            await first.until(messages.Lost)
            status = await second.status()
            assert (status.state, status.engine_pid) == ("ready", engine)  # still warm
            assert 10 < status.counters.steps < 300
            assert status.holder == second.client

    with agent(tmp_path, "--root", weights.model, envs={"FLUXMESH_DELAYS": "step=0.1"}) as host:
        play(scene(host))


def test_an_engine_that_does_not_let_go_of_a_lost_coordinators_work_is_ended(
    tmp_path: Path, weights: ModelVariant
) -> None:
    async def scene(host: AgentProcess) -> None:
        async with connected(host, beats=False) as first, connected(host) as second:
            await first.lease()
            text = await encode(first, weights)
            engine = await engine_of(first)
            await first.done(painting(first, weights, text, steps=300))
            await asyncio.sleep(0.3)
            os.kill(engine, signal.SIGSTOP)
            silent = time.monotonic()
            await second.lease("mine")
            assert time.monotonic() - silent < 10.0
            assert not is_running(engine)
            assert second.ring_generation == first.ring_generation + 1
            await encode(second, weights)

    with agent(tmp_path, "--root", weights.model) as host:
        play(scene(host))


def test_an_engine_ends_when_its_agent_is_killed(host: AgentProcess, weights: ModelVariant) -> None:
    async def scene() -> int:
        async with connected(host) as coordinator:
            await coordinator.lease()
            text = await encode(coordinator, weights)
            await coordinator.done(painting(coordinator, weights, text, steps=300))
            await coordinator.until(messages.Stepped)
            engine = await engine_of(coordinator)
            host.process.kill()
            return engine

    wait_gone(play(scene()), 3.0)


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
    assert is_running(orphan)
    with agent(tmp_path) as host:
        assert play(engine(host)) != orphan
        assert not is_running(orphan)
        assert (host.key == key, host.boot == boot) == (True, False)


def test_another_process_with_the_orphans_number_is_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as stranger:
        try:
            (tmp_path / "agent").mkdir(mode=0o700)
            record = tmp_path / "agent" / "engine.json"
            record.write_text(f'{{"pid": {stranger.pid}, "start": "1"}}')
            record.chmod(0o600)
            with agent(tmp_path / "agent"):
                time.sleep(0.5)
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
    assert not is_running(pid)
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
        assert not is_running(engine)


def test_one_state_folder_has_one_agent(host: AgentProcess) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fluxmesh_agent", "run", "--state", str(host.state)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1
    assert "An agent runs with" in done.stderr
    assert "Traceback" not in done.stderr


def test_another_version_is_refused_and_nothing_works_before_hello(host: AgentProcess) -> None:
    async def scene() -> None:
        async with connected(host) as coordinator:
            answer = await coordinator.ask(messages.Hello("again", "0.0.0"))
            assert isinstance(answer, messages.Refused)
            assert answer.code == "version"
            assert __version__ in answer.text
            connection = coordinator.connection
            coordinator.seq += 1
        async with connected(host) as coordinator:
            answer = await coordinator.ask(messages.Joined(ring_generation=1, rank=1))
            assert isinstance(answer, messages.Refused)
            assert answer.code == "usage"
        with contextlib.suppress(Exception):
            await connection.close()

    play(scene())


def test_the_log_names_no_prompt(host: AgentProcess, weights: ModelVariant) -> None:
    async def scene() -> tuple[str, ...]:
        async with connected(host) as coordinator:
            await coordinator.lease()
            await encode(coordinator, weights, "an unmistakable prompt")
            answer = await coordinator.ask(messages.AskLogs(50))
            assert isinstance(answer, messages.Logs)
            return answer.lines

    lines = play(scene())
    assert any("says hello" in line for line in lines)
    assert "unmistakable" not in host.log
