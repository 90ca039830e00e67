"""A job as the program that began it holds it: `Mesh.start` makes it, `Mesh` and a training ask it.

The job runs in the mesh's thread; everything here may block the thread that asks.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Iterator
from concurrent.futures import Future

from fluxmesh_coordinator.jobs.types import Input, Told
from fluxmesh_coordinator.runtime.job_runner import JobRunner


class Running:
    """A job that runs in a mesh's thread."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        runner: JobRunner,
        done: Future[None],
        box: queue.SimpleQueue[Told | None],
    ) -> None:
        self.lent = runner.lent
        self._loop, self._runner, self._done, self._box = loop, runner, done, box

    def feed(self, event: Input) -> None:
        """Gives the job's session an input."""
        self._loop.call_soon_threadsafe(self._runner.feed, event)

    def events(self) -> Iterator[Told]:
        """What it tells, as it happens, to its end. Raises how it failed."""
        while (event := self._box.get()) is not None:
            yield event
        self._box.put(None)  # for whoever asks again
        self._done.result()

    def stop(self) -> None:
        """Cancels it, unless it has ended, and waits for the hosts to let go."""
        if not self._done.done():
            self._loop.call_soon_threadsafe(self._runner.stop.set)
            self._done.exception()  # we were told to stop

    def cancel(self) -> None:
        """Has it end at its next step, and does not wait: its events end with `CancelledError`."""
        self._loop.call_soon_threadsafe(self._runner.stop.set)

    def wait(self) -> None:
        """Waits for its end. Raises how it failed."""
        self._done.result()
