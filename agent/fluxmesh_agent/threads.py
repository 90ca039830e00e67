"""What blocks, in a thread that nobody waits for when the agent ends.

`asyncio.to_thread` borrows from a pool whose threads are all waited for, however long they take: a
probe of a link may sit in a socket for half a minute, an engine that the system does not end for
ever.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def in_thread(block: Callable[[], T]) -> T:
    """What `block()` returns or raises. Cancelled, it goes on, and nobody hears of it."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def tell(set_it: Callable[[], None]) -> None:
        if not future.done():
            set_it()

    def run() -> None:
        try:
            result = block()
        except BaseException as error:
            say, told = future.set_exception, error
        else:
            say, told = future.set_result, result
        try:
            loop.call_soon_threadsafe(tell, lambda: say(told))
        except RuntimeError:
            return  # the loop is closed: the agent has ended meanwhile

    threading.Thread(target=run, daemon=True).start()
    return await future
