"""An event loop in a thread of its own, for programs whose main thread blocks.

Signals are the main thread's: Ctrl-C stops who waits here, between two of its own lines, and never
a task of the loop. What ran there is cancelled, and puts itself in order before the loop ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, Self, TypeVar

from fluxmesh.deadlines import DEADLINES
from fluxmesh.storage.interrupts import uninterrupted

T = TypeVar("T")


class LoopThread:
    """Runs coroutines for whoever asks from another thread; a context manager."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, or what it raised. Who is interrupted meanwhile cancels it."""
        future: Future[T] = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Cancels what still runs, waits for it, and ends the loop; twice is harmless."""
        if self.loop.is_closed():
            return
        with uninterrupted():
            ending = asyncio.run_coroutine_threadsafe(self._end_all(), self.loop)
            with contextlib.suppress(TimeoutError):
                ending.result(2 * DEADLINES.puts_right + 1.0)
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()
            self.loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    async def _end_all(self) -> None:
        """Those that are cancelled already put themselves in order: a second cancel would stop it.

        They end what they have begun themselves; what is left then has nobody to do so.
        """
        await self._wait([task for task in self._others() if task.cancelling()])
        left = self._others()
        for task in left:
            task.cancel()
        await self._wait(left)
        await self.loop.shutdown_asyncgens()

    def _others(self) -> list[asyncio.Task[Any]]:
        return [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]

    async def _wait(self, tasks: list[asyncio.Task[Any]]) -> None:
        if tasks:
            await asyncio.wait(tasks, timeout=DEADLINES.puts_right)
        for task in tasks:
            if task.done() and not task.cancelled():
                task.exception()  # seen: how each of them ended is nobody's concern
