"""What a job told: heard by many, from any point, with the newest preview alone."""

from __future__ import annotations

import asyncio

from fluxmesh_coordinator.server.faces.event_stream import kept_alive, written
from fluxmesh_coordinator.server.queue.event_log import EventLog


async def kinds(log: EventLog, first: int = 0) -> list[tuple[int, str]]:
    return [(event.number, event.kind) async for event in log.follow(first)]


def test_who_comes_late_and_who_was_cut_off_hear_all_of_it() -> None:
    async def body() -> None:
        log = EventLog()
        early = asyncio.create_task(kinds(log))
        await asyncio.sleep(0)
        log.append("queued", {})
        await asyncio.sleep(0)
        log.append("step", {"image": 0})
        log.append("done", {})
        log.append("step", {"image": 1})  # after the end: nobody hears it
        everything = [(0, "queued"), (1, "step"), (2, "done")]
        assert await early == everything == await kinds(log)
        assert await kinds(log, 2) == [(2, "done")] and await kinds(log, 9) == []
        assert (await log.over()).kind == "done"

    asyncio.run(body())


def test_an_old_preview_is_let_go_of_and_all_of_them_at_the_end() -> None:
    async def body() -> None:
        log = EventLog()
        for step in range(3):
            log.append("preview", {"image": 0, "data": f"{step}"})
            log.append("preview", {"image": 1, "data": f"{step}"})
        newest = log.latest("preview")
        assert newest is not None and newest.data == {"image": 1, "data": "2"}
        log.append("note", {"text": ""})
        listening = log.follow()
        assert [(await anext(listening)).number for _ in range(3)] == [4, 5, 6]
        log.append("done", {})
        assert await kinds(log) == [(6, "note"), (7, "done")]

    asyncio.run(body())


def test_a_quiet_stream_sends_comments_and_closes_what_it_reads() -> None:
    async def body() -> None:
        closed = asyncio.Event()

        async def slow() -> object:
            try:
                yield written({"a": 1}, kind="step", number=3)
                await asyncio.sleep(10)
            finally:
                closed.set()

        stream = kept_alive(slow(), quiet=0.01)  # type: ignore[arg-type]
        assert await anext(stream) == 'id: 3\nevent: step\ndata: {"a": 1}\n\n'
        assert (await anext(stream)).startswith(": ")
        await stream.aclose()  # type: ignore[attr-defined]
        assert closed.is_set()

    asyncio.run(body())
