"""What is said between one leased host and a job: reports come in, messages go out in order.

Between `client.py` (a conversation with an agent) and `job_runner.py`, which opens one of these for
every lease and reads the inbox that all of them fill.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fluxmesh.errors import FluxmeshError, HostUnreachableError
from fluxmesh.wire import messages
from fluxmesh.wire.tasks import end
from fluxmesh_coordinator.agents.client import AgentClient
from fluxmesh_coordinator.jobs.types import Answered, Input, Reported


class HostLink:
    """One host, from its lease to its end."""

    def __init__(
        self,
        rank: int,
        client: AgentClient,
        inbox: asyncio.Queue[Input],
        lost: Callable[[int, AgentClient, str], None],
    ) -> None:
        """`lost` hears why the host is out of reach; more than once is harmless."""
        self.rank, self.client = rank, client
        self._inbox, self._lost = inbox, lost
        self._outbox: asyncio.Queue[messages.Changing] = asyncio.Queue()
        self._tasks = [
            asyncio.create_task(self._listen()),
            asyncio.create_task(self._deliver()),
        ]

    def send(self, message: messages.Changing) -> None:
        """After all that was sent before."""
        self._outbox.put_nowait(message)

    async def close(self) -> None:
        await end(*self._tasks)

    def _gone(self, reason: str) -> None:
        self._lost(self.rank, self.client, reason)

    async def _listen(self) -> None:
        """Everything that the agent reports, until it is gone."""
        try:
            while True:
                self._inbox.put_nowait(Reported(self.rank, await self.client.report()))
        except FluxmeshError as error:
            self._gone(str(error))

    async def _deliver(self) -> None:
        while True:
            message = await self._outbox.get()
            try:
                answer = await self.client.post(message)
            except HostUnreachableError as error:
                self._gone(str(error))
                return
            except FluxmeshError as error:
                refused = messages.Refused("usage", str(error))
                self._inbox.put_nowait(Answered(self.rank, message, refused))
                continue
            answer.add_done_callback(self._answerer(message))
            asyncio.get_running_loop().call_later(
                self.client.deadlines.order, self._must_be_there, answer
            )

    def _answerer(
        self, message: messages.Changing
    ) -> Callable[[asyncio.Future[messages.Message]], None]:
        def heard(answer: asyncio.Future[messages.Message]) -> None:
            # One that fails ends the conversation, which `_listen` tells.
            if not answer.cancelled() and answer.exception() is None:
                self._inbox.put_nowait(Answered(self.rank, message, answer.result()))

        return heard

    def _must_be_there(self, answer: asyncio.Future[messages.Message]) -> None:
        if not answer.done():
            seconds = self.client.deadlines.order
            self._gone(f"{self.client.title}: its agent does not answer within {seconds:.0f} s.")
