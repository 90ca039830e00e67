"""Work side by side: all of it done, or none of it left behind."""

from __future__ import annotations

import asyncio

import pytest

from fluxmesh.errors import FluxmeshError
from fluxmesh.wire.tasks import end, together


def test_results_come_in_the_order_of_what_was_asked() -> None:
    async def work(number: int) -> int:
        await asyncio.sleep(0.02 / number)
        return number

    assert asyncio.run(together(map(work, (1, 2, 3)))) == [1, 2, 3]
    assert asyncio.run(together([])) == []


def test_where_one_raises_the_others_are_over_before_its_own_error_is_raised() -> None:
    over: list[str] = []

    async def fails() -> None:
        await asyncio.sleep(0)
        raise FluxmeshError("Host 1 is gone.")

    async def lasts() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            over.append("lasts")

    async def scene() -> None:
        with pytest.raises(FluxmeshError, match="Host 1 is gone"):
            await together([lasts(), fails()])
        assert over == ["lasts"]

    asyncio.run(scene())


def test_tasks_are_over_when_they_were_ended_however_they_end() -> None:
    async def refuses() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            raise FluxmeshError("It is told to nobody.")

    async def scene() -> None:
        tasks = [asyncio.create_task(refuses()), asyncio.create_task(asyncio.sleep(60))]
        await asyncio.sleep(0)
        await end(*tasks)
        assert all(task.done() for task in tasks) and tasks[1].cancelled()
        await end(*tasks)  # twice is harmless
        await end()

    asyncio.run(scene())
