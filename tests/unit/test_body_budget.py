"""What bodies hold together, and how many requests of a client are looked at at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from fluxmesh_coordinator.server.guard.limits import BodyBudget, BodyLimits, LimitsMiddleware
from fluxmesh_coordinator.server.paint_request import PaintRequest
from fluxmesh_coordinator.server.problems import ProblemError
from fluxmesh_coordinator.server.queue.fair_queue import FairQueue, QueueBounds, QueueFullError
from tests.serving import Serving

LIMITS = BodyLimits(
    body_bytes=1000, all_bytes=1000, address_bytes=800, free_bytes=100, retry_seconds=7
)


class Sender:
    """A client that sends a body in pieces, the next one when it is told to."""

    def __init__(self, address: str, sizes: list[int], length: int | None = None) -> None:
        self.address, self.sizes, self.length = address, sizes, length
        self.may_go = asyncio.Event()
        self.has_sent = asyncio.Event()
        self.answer: list[Message] = []

    async def receive(self) -> Message:
        if not self.sizes:
            self.has_sent.set()
            await self.may_go.wait()
            return {"type": "http.request", "body": b"", "more_body": False}
        return {"type": "http.request", "body": b"x" * self.sizes.pop(0), "more_body": True}

    async def send(self, message: Message) -> None:
        self.answer.append(message)

    async def ask(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> int:
        """The status of the answer."""
        headers = [] if self.length is None else [(b"content-length", b"%d" % self.length)]
        scope = {"type": "http", "path": "/api/jobs", "headers": headers, "method": "POST",
                 "client": (self.address, 1)}  # fmt: skip
        await app(scope, self.receive, self.send)
        self.has_sent.set()
        return int(self.answer[0]["status"])


async def reads(scope: Scope, receive: Receive, send: Send) -> None:
    while (await receive()).get("more_body"):
        pass
    await Response("ok")(scope, receive, send)


def test_bodies_are_bounded_together_and_small_ones_always_come_through() -> None:
    async def body() -> None:
        app = LimitsMiddleware(reads, LIMITS)
        large = [Sender(f"10.0.0.{k}", [300, 300]) for k in range(2)]  # 500 each are charged
        tasks = [asyncio.create_task(sender.ask(app)) for sender in large]
        for sender in large:
            await sender.has_sent.wait()
        assert app.budget.held == 1000
        refused, small, announced = (
            Sender("10.0.0.3", [100, 1]),
            Sender("10.0.0.3", [60, 40]),
            Sender("10.0.0.3", [], length=101),
        )
        small.may_go.set()
        assert await refused.ask(app) == 503
        assert (b"retry-after", b"7") in refused.answer[0]["headers"]
        assert await announced.ask(app) == 503
        assert await small.ask(app) == 200
        for sender in large:
            sender.may_go.set()
        assert await asyncio.gather(*tasks) == [200, 200]
        assert app.budget.held == 0
        again = Sender("10.0.0.3", [500])
        again.may_go.set()
        assert await again.ask(app) == 200

    asyncio.run(asyncio.wait_for(body(), 60))


def test_an_address_has_a_part_of_it() -> None:
    async def body() -> None:
        app = LimitsMiddleware(reads, LIMITS)
        first = Sender("10.0.0.1", [900])
        task = asyncio.create_task(first.ask(app))
        await first.has_sent.wait()
        second, other = Sender("10.0.0.1", [101]), Sender("10.0.0.2", [200])
        other.may_go.set()
        assert await second.ask(app) == 429
        assert await other.ask(app) == 200
        first.may_go.set()
        assert await task == 200

    asyncio.run(asyncio.wait_for(body(), 60))


@pytest.mark.parametrize("ends", ["refused", "broken", "gone"])
def test_what_a_body_held_is_free_however_it_ends(ends: str) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        if ends == "broken":
            raise RuntimeError
        raise ProblemError(400, "No.", "body")

    async def body() -> None:
        guarded = LimitsMiddleware(app, LIMITS)
        sender = Sender("10.0.0.1", [500])
        if ends == "gone":
            sender.receive = never  # type: ignore[method-assign]
            asked = asyncio.create_task(sender.ask(guarded))
            await asyncio.sleep(0)
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
        else:
            await asyncio.gather(sender.ask(guarded), return_exceptions=True)
        assert guarded.budget.held == 0

    async def never() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    asyncio.run(asyncio.wait_for(body(), 60))


def test_what_does_not_fit_is_not_held() -> None:
    budget = BodyBudget(LIMITS)
    budget.hold("a", 700)
    with pytest.raises(ProblemError) as refused:
        budget.hold("a", 101)
    assert refused.value.status == 429 and budget.held == 700
    with pytest.raises(ProblemError) as refused:
        budget.hold("b", 301)
    assert refused.value.status == 503 and refused.value.retry_after == 7 and budget.held == 700


# Requests that are looked at


def test_those_that_are_looked_at_count_as_waiting() -> None:
    queue = FairQueue(QueueBounds(per_client=2, per_address=3, whole=4))
    with queue.coming("1.1.1.1 anna"), queue.coming("1.1.1.1 anna"):
        with pytest.raises(QueueFullError, match="2 of your requests"):
            queue.check("1.1.1.1 anna")
        with queue.coming("1.1.1.1 ben"), pytest.raises(QueueFullError, match="your address"):
            queue.check("1.1.1.1 carl")
        others = queue.coming("2.2.2.2 dora"), queue.coming("2.2.2.2 dora")
        with others[0], others[1], pytest.raises(QueueFullError, match="line is full"):
            queue.check("3.3.3.3 emil")
    queue.check("1.1.1.1 anna")


@pytest.mark.parametrize("face", ["/api/jobs", "/api/plan"])
def test_a_client_has_few_that_are_looked_at(tmp_path: Path, face: str) -> None:
    import httpx2
    from starlette.applications import Starlette

    serving = Serving(tmp_path, QueueBounds(per_client=2))
    may_look, looking = asyncio.Event(), []

    async def life() -> None:
        resolve = serving.service.resolver.resolve

        async def slow(asked: PaintRequest) -> Any:
            looking.append(asked)
            await may_look.wait()
            return await resolve(asked)

        serving.service.resolver.resolve = slow  # type: ignore[method-assign]
        await serving.service.open()
        app = serving.app_alone()
        assert isinstance(app, Starlette)
        transport = httpx2.ASGITransport(app, client=("127.0.0.1", 1))
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            fields = {"prompt": "a dog"}
            first = [asyncio.create_task(client.post(face, json=fields)) for _ in range(2)]
            while len(looking) < 2:
                await asyncio.sleep(0.005)
            refused = await client.post(face, json=fields)
            assert refused.status_code == 429 and "retry-after" in refused.headers
            may_look.set()
            for answer in await asyncio.gather(*first):
                assert answer.status_code in (202, 503)  # without a mesh there is no plan
        await serving.service.close()

    asyncio.run(asyncio.wait_for(life(), 60))
