"""Jobs on a whole mesh in one process, for tests: what is asked, what is heard, what must come."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np

from fluxmesh import events
from fluxmesh.deadlines import DEADLINES
from fluxmesh_coordinator.jobs.generation.state import GenerationJob
from fluxmesh_coordinator.runtime.agent_pool import AgentPool
from tests.fakes import FakeMesh, expected
from tests.unit.meshes import ask, small

SIZES = small()


def job(name: str = "job", **keys: Any) -> GenerationJob:
    placement, force = keys.pop("placement", None), keys.pop("force_shard", False)
    request = ask(**{"height": 32, "width": 32, "steps": 3, **keys})
    return GenerationJob(
        id=name,
        secret=b"secret",
        request=request,
        sizes=SIZES,
        placement=placement,
        force_shard=force,
    )


class Heard(list[events.Event]):
    """The events of a job, and something to do when the first of a kind comes."""

    def __init__(self, kind: type[Any] | None = None, do: Callable[[], Any] | None = None) -> None:
        super().__init__()
        self.kind, self.do = kind, do

    def __call__(self, event: events.Event) -> None:
        self.append(event)
        if self.do is not None and self.kind is not None and isinstance(event, self.kind):
            do, self.do = self.do, None
            do()

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self if isinstance(event, kind)]


def check(heard: Heard, done: GenerationJob) -> None:
    """Every picture came once, and is right."""
    pictures = {event.image: event.pixels for event in heard.of(events.Picture)}
    assert len(heard.of(events.Picture)) == len(pictures) == done.request.n_images
    for image, pixels in pictures.items():
        assert np.array_equal(pixels, expected(done.request, SIZES, image))


def play(
    folder: Path, hosts: int, body: Callable[[FakeMesh, AgentPool], Awaitable[None]], **more: Any
) -> None:
    """Runs `body` on a mesh of that many hosts and a coordinator connected to it."""

    async def run() -> None:
        async with FakeMesh(folder, hosts, more.get("agents", DEADLINES)) as mesh:
            restart = more.get("restart")
            if restart is not None:
                restart = restart(mesh, asyncio.get_running_loop())
            deadlines = more.get("deadlines", DEADLINES)
            pool = AgentPool(mesh.record, mesh.network.dialer(), restart, deadlines=deadlines)
            async with pool:
                await asyncio.wait_for(body(mesh, pool), 60)

    asyncio.run(run())


def together(loop: asyncio.AbstractEventLoop, work: Any) -> None:
    """Starts a coroutine and keeps it alive."""
    task = loop.create_task(work)
    task.add_done_callback(lambda _: None)
    _TASKS.append(task)


_TASKS: list[Any] = []
