"""One agent as the commands of a mesh talk to it: requests with their answers, and its reports.

Stands on `fluxmesh.wire.transport` and below `status.py` and `bringup.py`. A job has the whole of
`session.py` for what can go wrong; here a connection that ends is an error that names the host.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable
from types import TracebackType
from typing import Self, TypeVar

from fluxmesh.deadlines import DEADLINES, Deadlines
from fluxmesh.errors import FluxmeshError, HostUnreachableError
from fluxmesh.machine.clock import RunningClock
from fluxmesh.version import __version__
from fluxmesh.wire import messages
from fluxmesh.wire.tasks import end
from fluxmesh.wire.transport.base import Connection, ConnectionClosed, Dialer
from fluxmesh_coordinator.agents.mesh_file import Member
from fluxmesh_coordinator.jobs.failures import REFUSALS, error_of

T = TypeVar("T", bound=messages.Message)


class AgentClient:
    """A conversation with one agent; an async context manager that says `Hello` first."""

    def __init__(
        self,
        dialer: Dialer,
        member: Member,
        name: str = "",
        client: str | None = None,
        deadlines: Deadlines = DEADLINES,
    ) -> None:
        """`client` is who we are to the agent, the same in every conversation of a coordinator."""
        self._client = client or secrets.token_hex(16)
        self.member, self.deadlines = member, deadlines
        self.title = f"host {member.rank} ({name or member.address})"
        self._dialer = dialer
        self._connection: Connection | None = None
        self._answers: dict[int, asyncio.Future[messages.Message]] = {}
        self._reports: asyncio.Queue[messages.Report | None] = asyncio.Queue()  # None is the end
        self._tasks: list[asyncio.Task[None]] = []
        self._seq = 0
        self._clock = RunningClock()  # an agent is not silent while we sleep
        self._heard = 0.0
        self._over: FluxmeshError | None = None
        self._may_hold = False  # a lease, or a place in line
        self.welcome: messages.Welcome | None = None

    async def __aenter__(self) -> Self:
        try:
            self._connection = await self._dialer.connect(self.member.address, self.member.key)
        except ConnectionClosed as error:
            raise HostUnreachableError(f"{self.title}: {error}") from None
        self._clock.begin()
        self._heard = self._clock.tick()
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._beat())]
        try:
            hello = messages.Hello(self._client, __version__)
            self.welcome = await self.ask(hello, messages.Welcome)
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def ask(
        self, message: messages.Message, kind: type[T], seconds: float | None = None
    ) -> T:
        """The answer to a request. Raises `FluxmeshError` that names the host.

        It has `seconds` to come, or as many as an answer may take (`Deadlines`).
        """
        seconds = self.deadlines.answer if seconds is None else seconds
        future = await self.post(message)
        if isinstance(message, messages.LeaveQueue):
            self._may_hold = False
        try:
            async with asyncio.timeout(seconds):
                answer = await future
        except TimeoutError:
            raise HostUnreachableError(
                f"{self.title}: its agent does not answer within {seconds:.0f} s; "
                "look at `fluxmesh logs`."
            ) from None
        if isinstance(answer, messages.Refused):
            raise error_of(REFUSALS.get(answer.code, ""), f"{self.title}: {answer.text}")
        if not isinstance(answer, kind):
            raise FluxmeshError(f"{self.title}: it answers with {type(answer).__name__}.")
        return answer

    async def post(self, message: messages.Message) -> asyncio.Future[messages.Message]:
        """Sends a request. Its answer, be it `Refused`, comes in the future, which raises, as this
        does, `HostUnreachableError` where the agent is gone."""
        if self._over is not None or self._connection is None:
            raise self._over or HostUnreachableError(f"{self.title}: not connected.")
        self._seq += 1
        seq = self._seq
        future: asyncio.Future[messages.Message] = asyncio.get_running_loop().create_future()
        self._answers[seq] = future
        future.add_done_callback(lambda _: self._answers.pop(seq, None))
        try:
            await self._connection.send(message, seq)
        except ConnectionClosed as error:
            future.cancel()
            raise HostUnreachableError(f"{self.title}: {error}") from None
        return future

    async def report(self) -> messages.Report:
        """The next report. Raises `HostUnreachableError` once the agent is gone."""
        report = await self._reports.get()
        if report is None:
            self._reports.put_nowait(None)  # for whoever asks again
            raise self._over or HostUnreachableError(f"{self.title}: not connected.")
        return report

    async def lease(
        self,
        job: str,
        seconds: float,
        waiting: Callable[[messages.LeaseQueued], None],
        title: str = "",
    ) -> messages.Granted:
        """Waits in line for this host's lease; `seconds` is how long it will be used, and `title`
        what for, for people.

        One that it had before must have been given up: what was told of it is forgotten.
        """
        self._forget_reports()
        self._may_hold = True
        request = messages.AskLease(job, seconds, title)
        await self.ask(request, messages.Done)
        while True:
            try:
                async with asyncio.timeout(self.deadlines.hear_place):
                    report: messages.Report | None = await self.report()
            except TimeoutError:  # asking again is harmless, and tells what was not heard
                report = None
            match report:
                case messages.Granted():
                    return report
                case messages.LeaseQueued():
                    waiting(report)
                case messages.Lost() | None:  # this machine slept, and has lost its place
                    await self.ask(request, messages.Done)

    def _forget_reports(self) -> None:
        while not self._reports.empty():
            if self._reports.get_nowait() is None:
                self._reports.put_nowait(None)
                return

    async def close(self) -> None:
        """Ends the conversation, and with it the lease."""
        await end(*self._tasks)
        self._tasks = []
        if self._connection is not None:
            if self._may_hold and self._over is None:
                self._may_hold = False
                with contextlib.suppress(FluxmeshError, TimeoutError):
                    async with asyncio.timeout(self.deadlines.note):
                        await self._connection.send(messages.LeaveQueue(), self._seq + 1)
            await self._connection.close()
        self._end(f"{self.title}: the connection is closed.")

    async def _listen(self) -> None:
        assert self._connection is not None
        try:
            while True:
                seq, message = await self._connection.receive()
                self._heard = self._clock.tick()
                if isinstance(message, messages.Report):
                    self._reports.put_nowait(message)
                elif seq in self._answers and not self._answers[seq].done():
                    self._answers[seq].set_result(message)
        except FluxmeshError as error:  # closed, or a message that is none
            self._end(f"{self.title}: {error}")

    async def _beat(self) -> None:
        assert self._connection is not None
        with contextlib.suppress(ConnectionClosed):
            while True:
                await asyncio.sleep(self.deadlines.heartbeat)
                now = self._clock.tick()
                self._seq += 1
                await self._connection.send(messages.Heartbeat(), self._seq)
                if self.welcome is None:
                    continue  # a new agent answers when its engine has said what it is
                if now - self._heard > self.deadlines.silence:
                    self._end(f"{self.title}: its agent is silent; see whether the host hangs.")
                    return

    def _end(self, text: str) -> None:
        if self._over is None:
            self._over = HostUnreachableError(text)
            for future in self._answers.values():
                if not future.done():
                    future.set_exception(self._over)
                    future.exception()  # nobody need be waiting for it any more
            self._reports.put_nowait(None)
