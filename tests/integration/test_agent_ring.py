"""Two real agents with a real ring between their engines: shards, spread work, cancel, a death."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from fluxmesh.cluster.shares import Shares
from fluxmesh.cluster.snapshot import ModelVariant
from fluxmesh.request import AdapterRef
from fluxmesh.storage.keys import Keys
from fluxmesh.wire import messages
from fluxmesh.wire.messages import Decode, Load, Paint
from tests.checkpoints import TRANSFORMER, make_checkpoint, write_safetensors
from tests.integration.agents import (
    Coordinator,
    agent,
    connected,
    encode,
    engine_of,
    join_ring,
    joins_of,
    painting,
    play,
)


@asynccontextmanager
async def mesh(
    folder: Path, weights: ModelVariant, count: int = 2, **envs: str
) -> AsyncIterator[list[Coordinator]]:
    user = Keys.new()
    async with AsyncExitStack() as stack:
        coordinators = []
        for rank in range(count):
            state = folder / f"agent{rank}"
            host = stack.enter_context(agent(state, "--root", weights.model, user=user, envs=envs))
            coordinators.append(await stack.enter_async_context(connected(host)))
        for coordinator in coordinators:
            await coordinator.lease()
        yield coordinators


async def paint(coordinators: list[Coordinator], works: list[Paint]) -> list[messages.Stepped]:
    """Gives each rank its work, and returns what rank 0 told."""
    for coordinator, work in zip(coordinators, works, strict=True):
        await coordinator.done(work)
    steps = [
        await coordinators[0].until(messages.Stepped)
        for _ in range(works[0].steps - works[0].first)
    ]
    for coordinator in coordinators[1:]:
        for _ in steps:
            assert (await coordinator.until(messages.Stepped)).latents is None
    return steps


@pytest.mark.parametrize("placement", ["tensor", "sequence"])
def test_low_memory_in_a_ring_paints_the_same_and_holds_less(
    tmp_path: Path, weights: ModelVariant, placement: str
) -> None:
    async def scene() -> None:
        async with mesh(tmp_path, weights) as coordinators:
            await join_ring(coordinators, 1)
            text = await encode(coordinators[0], weights)

            async def painted(**how: object) -> tuple[np.ndarray, list[int]]:
                works = [
                    painting(coordinator, weights, text, placement=placement, **how)
                    for coordinator in coordinators
                ]
                steps = await paint(coordinators, works)
                return steps[-1].latents, [
                    (await coordinator.status()).counters.transformer_bytes
                    for coordinator in coordinators
                ]

            for coordinator in coordinators:
                await coordinator.done(Load(**coordinator.head(), weights=weights, low_memory=True))
                assert (await coordinator.until(messages.Loaded)).holding.nbytes == 0
            low, held = await painted(low_memory=True)
            plain, whole = await painted(job="another")  # what was released is loaded again
            assert np.array_equal(low, plain)
            assert all(a < 0.9 * b for a, b in zip(held, whole, strict=True))
            again, left = await painted(job="third", low_memory=True)  # released, not loaded
            assert np.array_equal(again, plain) and left == held
            more, _ = await painted(job="third", low_memory=True, image=1)
            assert np.array_equal(more, plain)

    play(scene())


def error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("shards", [1, 2])
def test_two_engines_paint_in_a_ring_what_one_paints(
    tmp_path: Path, weights: ModelVariant, shards: int
) -> None:
    async def scene() -> None:
        async with mesh(tmp_path, weights) as coordinators:
            await join_ring(coordinators, 1)
            text = await encode(coordinators[0], weights)
            for shard, coordinator in enumerate(coordinators):
                load = Load(
                    **coordinator.head(),
                    weights=weights,
                    shards=shards,
                    shard=shard if shards > 1 else 0,
                )
                await coordinator.done(load)
                holding = (await coordinator.until(messages.Loaded)).holding
                assert (holding.shards, holding.shard) == (shards, shard if shards > 1 else 0)
            spread = {}
            for placement in ("tensor", "sequence") if shards == 1 else ("tensor",):
                works = [
                    painting(coordinator, weights, text, placement=placement)
                    for coordinator in coordinators
                ]
                steps = await paint(coordinators, works)
                assert [step.step for step in steps] == [1, 2, 3]
                # From the second step's latents on: to the same bytes.
                first = {"first": 2, "latents": steps[1].latents}
                works = [
                    painting(coordinator, weights, text, placement=placement, **first)
                    for coordinator in coordinators
                ]
                again = await paint(coordinators, works)
                assert [step.step for step in again] == [3]
                assert np.array_equal(again[0].latents, steps[2].latents)
                spread[placement] = steps[2].latents
            counters = [(await coordinator.status()).counters for coordinator in coordinators]
            for counted in counters:
                assert counted.steps == 4 * len(spread)
                assert counted.sent_bytes > 10_000
            await coordinators[0].done(painting(coordinators[0], weights, text))
            for _ in range(3):
                alone = await coordinators[0].until(messages.Stepped)
            for placement, latents in spread.items():
                assert error(latents, alone.latents) <= 1e-5, placement
            status = [await coordinator.status() for coordinator in coordinators]
            assert [s.counters.steps for s in status] == [4 * len(spread) + 3, 4 * len(spread)]
            assert len({s.ring for s in status}) == 1
            assert [(s.ring_rank, s.ring_size) for s in status] == [(0, 2), (1, 2)]

    play(scene())


def test_engines_paint_in_unequal_shares_what_one_paints_and_change_them_between_jobs(
    tmp_path: Path, weights: ModelVariant
) -> None:
    tensor = Shares(heads=(1, 1), columns=(64, 192))  # of two heads

    async def scene() -> None:
        async with mesh(tmp_path, weights) as coordinators:
            await join_ring(coordinators, 1)
            text = await encode(coordinators[0], weights)

            async def painted(placement: str, shares: Shares, job: str) -> np.ndarray:
                works = [
                    replace(
                        painting(coordinator, weights, text, placement=placement, job=job),
                        shares=shares,
                    )
                    for coordinator in coordinators
                ]
                return (await paint(coordinators, works))[-1].latents

            uneven = [Shares(tokens=(2, 1)), Shares(tokens=(1, 5)), Shares()]
            spread, sent = [], [0]
            for number, shares in enumerate(uneven):
                spread.append(await painted("sequence", shares, f"{number}"))
                sent.append((await coordinators[0].status()).counters.sent_bytes)
            first, second, even = (after - before for before, after in pairwise(sent))
            assert second > first > even  # each gives as much as the longest share is
            spread += [await painted("tensor", tensor, "a"), await painted("tensor", Shares(), "b")]
            await coordinators[1].done(
                replace(
                    painting(coordinators[1], weights, text, placement="sequence", job="wrong"),
                    shares=Shares(tokens=(1, 1, 1)),
                )
            )
            failed = await coordinators[1].until(messages.Failed)
            assert "shares of tokens are those of 3 hosts, and the ring has 2" in failed.text
            counted = []
            for shard, coordinator in enumerate(coordinators):
                load = Load(
                    **coordinator.head(), weights=weights, shards=2, shard=shard, shares=tensor
                )
                await coordinator.done(load)
                holding = (await coordinator.until(messages.Loaded)).holding
                assert (holding.shards, holding.shard, holding.shares) == (2, shard, tensor)
                counted.append((await coordinator.status()).counters.block_bytes)
            assert 1.25 * counted[0] < counted[1]
            spread.append(await painted("tensor", tensor, "c"))
            after = [(await coordinator.status()) for coordinator in coordinators]
            assert [status.counters.block_bytes for status in after] == counted  # not loaded anew
            await coordinators[0].done(painting(coordinators[0], weights, text, job="alone"))
            for _ in range(3):
                alone = await coordinators[0].until(messages.Stepped)
            for latents in spread:
                assert error(latents, alone.latents) <= 1e-5

    play(scene())


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("fuse", [False, True])
def test_shards_with_an_adapter_and_quantized_ones_paint_what_the_whole_paints(
    tmp_path: Path, bits: int | None, fuse: bool
) -> None:
    # Wide enough for a shard to have whole quantization groups.
    transformer = replace(TRANSFORMER, hidden_size=128, num_heads=4)
    made = make_checkpoint(tmp_path / "wide", transformer=transformer)
    rng = np.random.default_rng(3)
    low = {"lora_down": (4, 128), "lora_up": (128, 4)}
    key = "diffusion_model.double_blocks.0.img_attn.proj.{}.weight"
    arrays = {
        key.format(leaf): 0.1 * rng.standard_normal(shape, dtype=np.float32)
        for leaf, shape in low.items()
    }
    write_safetensors(tmp_path / "adapter.safetensors", arrays)
    data = np.frombuffer((tmp_path / "adapter.safetensors").read_bytes(), np.uint8)
    sha = hashlib.sha256(data).hexdigest()
    adapted = ModelVariant(str(made.path), "float32", bits, (AdapterRef(sha, 0.5),), fuse)

    async def scene() -> None:
        async with mesh(tmp_path, adapted) as coordinators:
            for coordinator in coordinators:
                await coordinator.done(
                    messages.PutFile(
                        fence=coordinator.fence, sha256=sha, offset=0, total=len(data), data=data
                    )
                )
            text = await encode(coordinators[0], adapted)
            await coordinators[0].done(painting(coordinators[0], adapted, text))
            for _ in range(3):
                alone = await coordinators[0].until(messages.Stepped)
            await join_ring(coordinators, 1)
            for shard, coordinator in enumerate(coordinators):
                await coordinator.done(
                    Load(**coordinator.head(), weights=adapted, shards=2, shard=shard)
                )
                await coordinator.until(messages.Loaded)
            works = [
                painting(coordinator, adapted, text, placement="tensor")
                for coordinator in coordinators
            ]
            steps = await paint(coordinators, works)
            assert error(steps[-1].latents, alone.latents) <= 1e-5

    play(scene())


def test_a_shard_is_a_shard_in_the_engine_and_while_it_loads(
    tmp_path: Path, weights: ModelVariant
) -> None:
    async def scene() -> None:
        async with mesh(tmp_path, weights) as coordinators:
            counted: dict[tuple[int, int], messages.EngineCounters] = {}
            for shards in (1, 2):
                for shard, coordinator in enumerate(coordinators):
                    part = shard if shards > 1 else 0
                    await coordinator.done(
                        Load(**coordinator.head(), weights=weights, shards=shards, shard=part)
                    )
                    await coordinator.until(messages.Loaded)
                    counted[shards, shard] = (await coordinator.status()).counters
            whole = counted[1, 0].block_bytes
            D = TRANSFORMER.hidden_size
            largest = 4 * 7 * D * D  # linear1 of a single block, float32
            for shard in (0, 1):
                shard_counters = counted[2, shard]
                assert whole / 2 <= shard_counters.block_bytes <= (1 / 2 + 0.01) * whole
                assert shard_counters.transformer_bytes <= shard_counters.load_peak_bytes
                assert shard_counters.load_peak_bytes <= 1.1 * (
                    shard_counters.transformer_bytes + largest
                )

    play(scene())


def test_cancel_stops_all_ranks_at_the_same_step_and_they_paint_on(
    tmp_path: Path, weights: ModelVariant
) -> None:
    async def scene() -> None:
        async with mesh(tmp_path, weights, FLUXMESH_DELAYS="step=0.15") as coordinators:
            await join_ring(coordinators, 1)
            text = await encode(coordinators[0], weights)
            for image in range(2):
                for coordinator in coordinators:
                    more = {"steps": 400, "image": image, "placement": "tensor"}
                    await coordinator.done(painting(coordinator, weights, text, **more))
            await coordinators[0].until(messages.Stepped)
            await coordinators[0].done(messages.Cancel(fence=coordinators[0].fence, job="job"))
            await asyncio.sleep(0.4)  # one rank hears of it later, and stops at the same step
            await coordinators[1].done(messages.Cancel(fence=coordinators[1].fence, job="job"))
            for coordinator in coordinators:
                await coordinator.until(messages.Cancelled)
            counted = [(await coordinator.status()).counters for coordinator in coordinators]
            assert counted[0].steps == counted[1].steps < 400
            assert counted[0].images == 0
            works = [
                painting(coordinator, weights, text, placement="tensor", steps=2, job="next")
                for coordinator in coordinators
            ]
            steps = await paint(coordinators, works)
            await coordinators[0].done(
                Decode(
                    **coordinators[0].head("next"),
                    weights=weights,
                    images=(0,),
                    height=32,
                    width=32,
                    latents=steps[1].latents,
                )
            )
            assert (await coordinators[0].until(messages.Pictured)).pixels.shape == (32, 32, 3)

    play(scene())


def test_after_a_rank_is_killed_all_join_again_and_go_on_from_the_last_step(
    tmp_path: Path, weights: ModelVariant
) -> None:
    steps = 16  # 13 of them, or 4 s, for this process to come and kill one

    async def scene() -> None:
        async with mesh(tmp_path, weights, FLUXMESH_DELAYS="step=0.3") as coordinators:
            await join_ring(coordinators, 1)
            text = await encode(coordinators[0], weights)
            victim = await engine_of(coordinators[1])
            for coordinator in coordinators:
                await coordinator.done(
                    painting(coordinator, weights, text, placement="tensor", steps=steps)
                )
            for _ in range(3):
                kept = await coordinators[0].until(messages.Stepped)
            os.kill(victim, signal.SIGKILL)
            while not any(isinstance(heard, messages.Failed) for heard in coordinators[1].heard):
                await asyncio.sleep(0.02)
            last = [m for m in coordinators[0].heard if isinstance(m, messages.Stepped)][-1]
            assert last.step >= kept.step
            for coordinator in coordinators:
                await coordinator.done(messages.Kill(fence=coordinator.fence, ring_generation=2))
                coordinator.heard.clear()  # the survivor fails too, sooner or later
                coordinator.read = 0
            assert [(await coordinator.status()).engine_pid for coordinator in coordinators] == [
                None,
                None,
            ]
            await join_ring(coordinators, 2)
            works = [
                painting(
                    coordinator,
                    weights,
                    text,
                    placement="tensor",
                    steps=steps,
                    first=last.step,
                    latents=last.latents,
                )
                for coordinator in coordinators
            ]
            resumed = await paint(coordinators, works)
            assert [step.step for step in resumed] == list(range(last.step + 1, steps + 1))
            whole = await paint(
                coordinators,
                [
                    painting(coordinator, weights, text, placement="tensor", steps=steps)
                    for coordinator in coordinators
                ],
            )
            assert np.array_equal(whole[-1].latents, resumed[-1].latents)

    play(scene())


def test_a_stranger_on_the_rings_port_ends_the_ring_generation_and_fresh_ports_form_another(
    tmp_path: Path, weights: ModelVariant
) -> None:
    async def scene() -> None:
        async with mesh(tmp_path, weights) as coordinators:
            ports = []
            for coordinator in coordinators:
                answer = await coordinator.ask(
                    messages.AskPorts(fence=coordinator.fence, ip="127.0.0.1")
                )
                assert isinstance(answer, messages.Ports)
                ports.append(answer.ports)
            joins = joins_of(coordinators, 1, ports)
            await coordinators[0].done(joins[0])
            stranger = await knock(ports[0][0])
            stranger.write(b"\0" * 4096)
            await coordinators[1].done(joins[1])
            await asyncio.sleep(3.0)
            heard = [report for coordinator in coordinators for report in coordinator.heard]
            assert not any(isinstance(report, messages.Joined) for report in heard)
            for coordinator in coordinators:
                await coordinator.done(messages.Kill(fence=coordinator.fence, ring_generation=2))
                assert (await coordinator.status()).counters.transformer_bytes == 0
                coordinator.read = len(coordinator.heard)
            stranger.close()
            await join_ring(coordinators, 2)
            text = await encode(coordinators[0], weights)
            works = [
                painting(coordinator, weights, text, placement="tensor")
                for coordinator in coordinators
            ]
            assert len(await paint(coordinators, works)) == 3

    play(scene())


async def knock(port: int) -> asyncio.StreamWriter:
    """A connection to a port, as soon as somebody listens there."""
    for _ in range(6000):
        try:
            return (await asyncio.open_connection("127.0.0.1", port))[1]
        except OSError:
            await asyncio.sleep(0.01)
    raise AssertionError(f"nobody listens at {port}")


def test_engines_time_their_ring_alike_within_the_time_they_have(
    tmp_path: Path, weights: ModelVariant
) -> None:
    """One that was cancelled begins too, and ends on all: the others would wait in a collective."""

    async def scene() -> None:
        async with mesh(tmp_path, weights, 3) as coordinators:
            await join_ring(coordinators, 1)
            ring_generation = coordinators[0].ring_generation
            for coordinator in reversed(coordinators):  # the first comes last, all wait for it
                for job in ("cancelled", "job"):
                    await coordinator.done(
                        messages.MeasureRing(
                            fence=coordinator.fence,
                            job=job,
                            ring_generation=ring_generation,
                            seconds=0.5,
                        )
                    )
                if coordinator is coordinators[1]:
                    await coordinator.done(
                        messages.Cancel(fence=coordinator.fence, job="cancelled")
                    )
            timings = [await coordinator.until(messages.RingTimed) for coordinator in coordinators]
            assert timings[0] == timings[1] == timings[2]
            timed = timings[0]
            assert (timed.job, timed.ring_generation) == ("job", 1)
            for table in (timed.gathers, timed.sums):
                sizes = [point.nbytes for point in table]
                assert sizes[0] == 4096 and sizes == sorted(sizes)
                assert all(0 < point.seconds < 60 for point in table)
            assert 0 <= timed.hidden <= 1
            status = await coordinators[0].status()
            assert status.state == "idle" and status.holds is None

    play(scene())
