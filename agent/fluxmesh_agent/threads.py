"""What blocks, in a thread that nobody waits for when the agent ends.

`asyncio.to_thread` borrows from a pool whose threads are all waited for, however long they take: a
probe of a link may sit in a socket for half a minute, an engine that the system does not end for
ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def in_thread(block: Callable[[], T]) -> T:
    """What `block()` returns or raises. Cancelled, it goes on, and nobody hears of it."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def give(result: T) -> None:
        if not future.done():
            future.set_result(result)

    def fail(error: BaseException) -> None:
        if not future.done():
            future.set_exception(error)

    def run() -> None:
        # Where the loop is closed, the agent has ended meanwhile, and nobody wants to know.
        with contextlib.suppress(RuntimeError):
            try:
                result = block()
            except BaseException as error:
                loop.call_soon_threadsafe(fail, error)
            else:
                loop.call_soon_threadsafe(give, result)

    threading.Thread(target=run, daemon=True).start()
    return await future
