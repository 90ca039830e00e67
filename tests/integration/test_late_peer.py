"""Real engines on an emulated Metal, in a ring whose last rank comes late to one collective."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from fluxmesh import events
from fluxmesh.cluster.snapshot import ModelVariant
from fluxmesh.wire import messages
from fluxmesh_coordinator.jobs.generation.dispatch import GenerationDispatch
from tests.alone import painted_alone
from tests.integration.agents import encode, join_ring, painting, play
from tests.integration.test_agent_ring import mesh, paint
from tests.integration.test_mesh import mesh_of, pictures, request_of
from tests.paths import ROOT
from tests.watchdog import LIMIT, Metal

LATE = 8.0  # seconds
PATHS = os.pathsep.join(str(ROOT / part) for part in ("", "agent", "coordinator"))


# Of the first step, and in the middle of the second one.
@pytest.mark.parametrize(("placement", "call"), [("tensor", 5), ("sequence", 11)])
def test_a_ring_on_metal_goes_on_when_a_peer_comes_8_seconds_late(
    tmp_path: Path, weights: ModelVariant, placement: str, call: int
) -> None:
    async def scene() -> None:
        assert LATE > LIMIT
        envs = Metal("host", call, LATE).envs(PATHS)
        async with mesh(tmp_path, weights, **envs) as coordinators:
            await join_ring(coordinators, 1)
            text = await encode(coordinators[0], weights)
            timed = []
            for job in ("late", "in time"):
                start = time.monotonic()
                works = [
                    painting(coordinator, weights, text, placement=placement, job=job)
                    for coordinator in coordinators
                ]
                steps = await paint(coordinators, works)
                timed.append((time.monotonic() - start, steps[-1].latents))
            (late, latents), (_, expected) = timed
            assert late >= LATE
            assert np.array_equal(latents, expected)
            status = [await coordinator.status() for coordinator in coordinators]
            assert [(s.ring_rank, s.ring_size) for s in status] == [(0, 2), (1, 2)]

    play(scene())


def test_an_engine_whose_gpu_waited_for_a_late_peer_says_so(
    tmp_path: Path, weights: ModelVariant
) -> None:
    async def scene() -> None:
        async with mesh(tmp_path, weights, **Metal("graph", 11, LATE).envs(PATHS)) as coordinators:
            await join_ring(coordinators, 1)
            text = await encode(coordinators[0], weights)
            for coordinator in coordinators:
                await coordinator.done(painting(coordinator, weights, text, placement="sequence"))
            failed = await coordinators[0].until(messages.Failed)
            assert (failed.kind, failed.fatal) == (messages.PEER_LATE, True)
            assert failed.text == (
                "macOS ended the GPU's work while denoising, because it took longer than the 5 s "
                "or so that its watchdog allows: another host of the ring came late, or other apps "
                "kept the GPU busy."
            )

    play(scene())


@pytest.mark.parametrize(
    ("road", "call", "plans"),
    [
        ("host", 5, ["sequence"]),  # a first step may take long: it is waited for
        ("host", 12, ["sequence", "sequence"]),  # a later one is late after 5 s: one step is lost
        ("graph", 5, ["sequence", "data"]),  # should a GPU wait after all
    ],
)
def test_a_late_peer_costs_a_mesh_a_step_at_most(
    checkpoint: Path,
    tmp_path: Path,
    road: str,
    call: int,
    plans: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The collectives that are counted are those of steps.
    monkeypatch.setattr(GenerationDispatch, "_measure_ring", lambda dispatch: True)
    request = request_of(checkpoint, steps=4)
    (alone,) = painted_alone(request)
    with mesh_of(tmp_path, 2, checkpoint, Metal(road, call, LATE).envs(PATHS)) as mesh:
        job_events = list(mesh.generate(request, "sequence"))
    (picture,) = pictures(job_events)
    assert np.abs(picture.astype(int) - alone.astype(int)).max() <= 1
    assert [event.placement for event in job_events if isinstance(event, events.Planned)] == plans
    steps = [event.step for event in job_events if isinstance(event, events.Step)]
    assert steps == [1, 2, 3, 4]  # none that was acknowledged is made again
