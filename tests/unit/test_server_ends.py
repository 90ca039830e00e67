"""How jobs end that nobody waits for, and the server that ends before its jobs do."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from fluxmesh_coordinator.server.guard.access import Access
from fluxmesh_coordinator.server.paint_request import PaintRequest
from fluxmesh_coordinator.server.problems import ProblemError
from fluxmesh_coordinator.server.queue.fair_queue import QueueBounds
from tests.serving import Serving


def scope(path: str, body: bytes) -> dict[str, Any]:
    return {
        "type": "http", "http_version": "1.1", "method": "POST", "path": path, "raw_path": b"",
        "query_string": b"", "root_path": "", "scheme": "http", "client": ("127.0.0.1", 5),
        "server": ("127.0.0.1", 8420), "asgi": {"version": "3.0", "spec_version": "2.3"},
        "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"application/json"),
                    (b"content-length", b"%d" % len(body))],
    }  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("where", ["running", "queued"])
def test_a_client_that_disconnects_cancels_its_job(
    serving: Serving, stream: bool, where: str
) -> None:
    from fluxmesh_coordinator.server.app import application

    serving.lane.may_go.clear()
    body = json.dumps({"prompt": "a dog", "stream": stream}).encode()

    async def ask(gone: asyncio.Event) -> list[dict[str, Any]]:
        pieces: list[dict[str, Any]] = [{"type": "http.request", "body": body}]
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            if pieces:
                return pieces.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        await app(scope("/v1/images/generations", body), receive, send)
        return sent

    async def life() -> None:
        await serving.service.open()
        gone, stays = asyncio.Event(), asyncio.Event()
        others = [asyncio.create_task(ask(stays))] if where == "queued" else []
        while others and not serving.lane.painted:
            await asyncio.sleep(0.005)
        asked = asyncio.create_task(ask(gone))
        while len(serving.service.rows()) < len(others) + 1 or not serving.lane.painted:
            await asyncio.sleep(0.005)
        job = serving.service.rows()[-1].job
        assert job.stage == where
        gone.set()
        await asked
        assert (await job.events.over()).kind == "cancelled" and not job.names
        assert len(serving.service.rows()) == len(others)
        serving.lane.may_go.set()
        for other in others:
            assert (await other)[0]["status"] == 200
        await serving.service.close()

    app = application(serving.service, Access.of(None))
    asyncio.run(asyncio.wait_for(life(), 60))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_has_gone_before_its_job_was_accepted_has_none(
    serving: Serving, stream: bool
) -> None:
    from fluxmesh_coordinator.server.app import application

    serving.lane.may_go.clear()
    body = json.dumps({"prompt": "a dog", "stream": stream}).encode()
    pieces: list[dict[str, Any]] = [{"type": "http.request", "body": body}]

    async def receive() -> dict[str, Any]:
        return pieces.pop() if pieces else {"type": "http.disconnect"}

    async def send(_message: Any) -> None:
        await asyncio.sleep(0.05)  # a connection that still holds the answer before

    async def life() -> None:
        await serving.service.open()
        await app(scope("/v1/images/generations", body), receive, send)
        while serving.service.rows():
            await asyncio.sleep(0.01)
        serving.lane.may_go.set()
        await serving.service.close()

    app = application(serving.service, Access.of(None))
    asyncio.run(asyncio.wait_for(life(), 60))


def test_a_request_that_is_looked_at_while_the_server_ends_is_told_so(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = serving.service.resolver.resolve

    async def slow(asked: PaintRequest) -> Any:
        ready = await resolve(asked)
        await serving.service.drain()
        return ready

    monkeypatch.setattr(serving.service.resolver, "resolve", slow)

    async def life() -> None:
        await serving.service.open()
        with pytest.raises(ProblemError, match="ending"):
            await serving.service.submit(PaintRequest(prompt="a dog"), "anna")
        assert not serving.service.rows()
        await serving.service.close()

    asyncio.run(life())


def test_the_first_signal_finishes_what_runs_and_tells_those_who_wait(serving: Serving) -> None:
    from fluxmesh_coordinator.server.paint_request import PaintRequest

    async def life() -> None:
        service = serving.service
        await service.open()
        serving.lane.may_go.clear()
        running = await service.submit(PaintRequest(prompt="a dog"), "a")
        while running.stage != "running":
            await asyncio.sleep(0.005)
        waiting = await service.submit(PaintRequest(prompt="a cat"), "a")
        drained = asyncio.create_task(service.drain())
        assert (await waiting.events.over()).data["code"] == "ending"
        assert not drained.done() and running.stage == "running"
        with pytest.raises(Exception, match="ending"):
            await service.submit(PaintRequest(prompt="a bird"), "a")
        serving.lane.may_go.set()
        await drained
        assert running.stage == "done" and len(running.names) == 1
        await service.close()

    asyncio.run(asyncio.wait_for(life(), 60))


def test_the_second_signal_cancels_what_runs(serving: Serving) -> None:
    from fluxmesh_coordinator.server.paint_request import PaintRequest

    async def life() -> None:
        service = serving.service
        await service.open()
        serving.lane.may_go.clear()
        running = await service.submit(PaintRequest(prompt="a dog"), "a")
        while running.stage != "running":
            await asyncio.sleep(0.005)
        drained = asyncio.create_task(service.drain())
        await asyncio.sleep(0.02)
        service.cancel_all()
        await drained
        assert running.stage == "cancelled"
        await service.close()

    asyncio.run(asyncio.wait_for(life(), 60))


def test_twenty_clients_are_served_in_turns_and_nothing_is_lost(tmp_path: Path) -> None:
    """A sample of `tools/serve_load.py`."""
    from fluxmesh_coordinator.server.paint_request import PaintRequest

    serving = Serving(tmp_path, QueueBounds(per_client=5, per_address=100, whole=100))
    serving.lane.seconds = 0

    async def life() -> None:
        service = serving.service
        await service.open()
        serving.lane.may_go.clear()
        asked = PaintRequest(prompt="a dog", width=16, height=16, steps=1)
        jobs = [
            await service.submit(asked, f"10.0.0.1 {name}") for name in range(20) for _ in range(5)
        ]
        serving.lane.may_go.set()
        for job in jobs:
            assert (await job.events.over()).kind == "done" and len(job.names) == 1
        assert service.rows() == []
        await service.close()

    asyncio.run(asyncio.wait_for(life(), 60))
    order = [job.client for job in serving.lane.painted]
    assert len(order) == 100
    for turn in range(1, 5):  # the first began before the others came
        assert len(set(order[20 * turn : 20 * turn + 20])) >= 19
    names = [picture.name for picture in serving.pictures.newest(200)[0]]
    assert len(set(names)) == 100
