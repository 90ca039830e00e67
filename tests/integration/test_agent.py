"""What one real agent with a real engine does that it is asked for, over the real transport."""

from __future__ import annotations

import contextlib
import hashlib
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil

from fluxmesh.cluster.snapshot import ModelVariant, StepShape
from fluxmesh.kernels.ops import device
from fluxmesh.request import AdapterRef, GenerateRequest
from fluxmesh.version import __version__
from fluxmesh.wire import messages
from fluxmesh.wire.messages import Decode, Load, Measure
from tests.alone import painted_alone
from tests.checkpoints import make_checkpoint, write_safetensors
from tests.integration.agents import (
    AgentProcess,
    agent,
    connected,
    encode,
    engine_of,
    failed,
    painting,
    play,
)


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
            # What Metal recommends is less than an idle Mac has free. Without /proc nobody knows
            # better than that all of it is.
            whole = psutil.virtual_memory().total
            assert 1 << 20 < status.memory_bytes <= whole and 1 << 20 < status.free_bytes <= whole
            assert status.flops_per_second > 1e6  # of a product during which others may have run
            assert abs(status.clock - time.time()) < 5
            assert status.kind != "unknown"
            assert status.platform == device() and status.machine_bytes >= status.free_bytes
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
    assert any("has the lease" in line for line in lines)
    assert "unmistakable" not in host.log
