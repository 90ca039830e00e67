"""Work side by side in one event loop: all of it done, or none of it left behind.

asyncio's `TaskGroup` raises a group of errors; a user reads one sentence, so `together` raises the
first error as it is. Where each one's failure is a result of its own (hosts that are asked, those
that fail are left out), `asyncio.gather` with `return_exceptions` is the tool.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


async def together(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results, in order. Where one raises, the others are broken off before it is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancels tasks and waits until they are over; how each of them ended is nobody's concern."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
