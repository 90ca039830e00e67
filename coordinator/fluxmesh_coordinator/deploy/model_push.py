"""`fluxmesh models push`, without its screen: a checkpoint goes from who has it to who lacks it.

    a host that has it ──► the next in the hostfile that lacks it ──► the next …

Each host passes on what it has, while more of it comes in: so the cables of all of them carry at
once, and many hosts have it hardly later than one. A host that is lost breaks the chain there; who
stood behind it goes on, from where it was, with a host that has all of it. Where no host of the
mesh has it, an agent of this machine that lives as long as the push is the first of the chain.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Protocol

from fluxmesh.deadlines import DEADLINES
from fluxmesh.errors import (
    FluxmeshError,
    HostUnreachableError,
    LocalNetworkError,
    ModelNotFoundError,
    UsageError,
)
from fluxmesh.storage.keys import Keys
from fluxmesh.weights import hub
from fluxmesh.weights.embedded.checkpoints import embedded_names
from fluxmesh.wire import messages
from fluxmesh.wire.messages.parcel import TOKEN_BYTES
from fluxmesh.wire.tasks import end
from fluxmesh.wire.transport.base import Dialer
from fluxmesh_coordinator.agents.client import AgentClient
from fluxmesh_coordinator.agents.launch import start_ephemeral
from fluxmesh_coordinator.agents.mesh_file import Member, MeshRecord
from fluxmesh_coordinator.agents.status import run, user_keys

HERE = -1  # this machine, which is no host of the mesh
TRIES = 4  # of one host to get it, from one that has it or another
DAY = 86400.0  # seconds
LOOK = 120.0  # seconds to read samples of a checkpoint from a slow disk


class PushWatcher(Protocol):
    """Whom a push tells how it goes."""

    def progress(self, rank: int, what: str, done: int, total: int) -> None:
        """Bytes that are on a host's disk."""

    def note(self, text: str) -> None:
        """One sentence for people."""

    def failed(self, rank: int, text: str) -> None:
        """A host that does not get it, and why."""

    def arrived(self, push: Arrived) -> None:
        """A host has all of it."""


@dataclass(frozen=True)
class Arrived:
    """What one host got."""

    rank: int
    source: int  # the rank that sent the last of it; `HERE` is this machine
    nbytes: int  # that were sent; the rest was there
    total_bytes: int
    seconds: float
    address: str  # of the host's own, at which it came in


@dataclass
class _Host:
    """One agent, as a push sees it."""

    client: AgentClient
    ips: tuple[str, ...]
    parcel: messages.ModelParcel | None = None  # that it has, or is getting
    is_whole: bool = False
    is_lost: bool = False  # it will not have it
    passes_on: asyncio.Event = field(default_factory=asyncio.Event)  # or never will
    begun: float = 0.0  # when the first byte came
    begun_bytes: int = 0  # that were there then
    address: str = ""  # of its own, at which it comes in


def push_model(
    mesh: MeshRecord,
    model: str,
    watcher: PushWatcher,
    ranks: Sequence[int] | None = None,
    keys: Keys | None = None,
) -> tuple[dict[int, Arrived], dict[int, FluxmeshError]]:
    """Copies `model`, as `hub.full_name` calls it, to the hosts `ranks` that lack it, or to all.

    Returns what the hosts got that did, and why others did not, by rank. Raises `FluxmeshError`:
    `ModelNotFoundError` where nobody has it, `HostUnreachableError` where no host answers.
    """
    alias = hub.alias_of(model)
    if alias in embedded_names():
        raise UsageError(f"{alias} comes with fluxmesh, so every host has it.")
    keys = keys or user_keys()
    return run(keys, lambda dialer: _Push(mesh, model, watcher, dialer).run(ranks))


class _Push:
    """One `fluxmesh models push`."""

    def __init__(self, mesh: MeshRecord, model: str, watcher: PushWatcher, dialer: Dialer) -> None:
        self.mesh, self.model, self.watcher, self.dialer = mesh, model, watcher, dialer
        self.hosts: dict[int, _Host] = {}
        self.errors: dict[int, FluxmeshError] = {}
        self.arrived: dict[int, Arrived] = {}
        self._awaited: dict[bytes, asyncio.Future[tuple[str, ...]]] = {}

    async def run(
        self, ranks: Sequence[int] | None
    ) -> tuple[dict[int, Arrived], dict[int, FluxmeshError]]:
        async with AsyncExitStack() as stack:
            await asyncio.gather(*(self._reach(stack, member) for member in self.mesh.members))
            if not self.hosts:
                raise HostUnreachableError(str(next(iter(self.errors.values()))))
            targets = await self._look(stack, ranks)
            listening = [asyncio.create_task(self._listen(rank)) for rank in self.hosts]
            stack.push_async_callback(end, *listening)
            sources = self._chain(targets)
            bringing = [asyncio.create_task(self._bring(rank, sources[rank])) for rank in targets]
            stack.push_async_callback(end, *bringing)
            for task in bringing:
                await task
        return self.arrived, self.errors

    # Who has it

    async def _reach(self, stack: AsyncExitStack, member: Member) -> None:
        host = self.mesh.hostfile.hosts[member.rank]
        try:
            client = AgentClient(self.dialer, member, host.name)
            self.hosts[member.rank] = _Host(await stack.enter_async_context(client), host.ips)
        except FluxmeshError as error:
            self._lose(member.rank, error)

    async def _look(self, stack: AsyncExitStack, ranks: Sequence[int] | None) -> list[int]:
        """The hosts that are to get it; from now on it is known who has it.

        What this machine has is what all shall have, else what the first host has.
        """
        answers: dict[int, messages.ModelHere] = {}

        async def ask(rank: int, host: _Host) -> None:
            try:
                question = messages.AskModel(self.model)
                answers[rank] = await host.client.ask(question, messages.ModelHere, LOOK)
            except FluxmeshError as error:
                self._lose(rank, error)

        await asyncio.gather(*(ask(*each) for each in self.hosts.items()))
        here = await asyncio.to_thread(self._content_here)
        holders = {rank: answers[rank].parcel for rank in sorted(answers)}
        contents = [here, *(parcel.content for parcel in holders.values() if parcel is not None)]
        wanted = next((content for content in contents if content), None)
        if wanted is None:
            problem = next(iter(answers.values())).problem if answers else ""
            raise ModelNotFoundError(
                f"No host of the mesh has {self.model}, nor has this machine. {problem}"
            )
        for rank, parcel in holders.items():
            if parcel is not None and parcel.content == wanted:
                self.hosts[rank].parcel, self.hosts[rank].is_whole = parcel, True
        if not any(host.is_whole for host in self.hosts.values()):
            await self._join(stack)
        places = set[str]()
        targets: list[int] = []
        for rank in sorted(answers):
            place = answers[rank].place
            if self.hosts[rank].is_whole or (ranks is not None and rank not in ranks):
                continue
            if place in places:  # another agent of that machine gets it for both
                self.watcher.note(f"Host {rank} keeps its models where another host does.")
                continue
            places.add(place)
            targets.append(rank)
        return targets

    def _content_here(self) -> str:
        """Of the model on this machine; "" where it has none."""
        try:
            return hub.resolve(self.model, download=False).content
        except FluxmeshError:
            return ""

    async def _join(self, stack: AsyncExitStack) -> None:
        """An agent of this machine, with what this machine has, for as long as it takes."""
        local = await asyncio.to_thread(start_ephemeral)
        stack.callback(local.close)
        from fluxmesh.wire.transport.dialer import CurveDialer

        dialer = CurveDialer(local.keys)
        stack.push_async_callback(dialer.close)
        client = AgentClient(dialer, local.record.members[0], "this machine")
        host = _Host(await stack.enter_async_context(client), ())
        answer = await client.ask(messages.AskModel(self.model), messages.ModelHere, LOOK)
        if answer.parcel is None:
            raise FluxmeshError(answer.problem)
        host.parcel, host.is_whole = answer.parcel, True
        self.hosts[HERE] = host

    def _chain(self, targets: Iterable[int]) -> dict[int, int]:
        """From whom each host gets it: the last one before it that has it, or gets it too."""
        wanted = set(targets)
        whole = [rank for rank in sorted(self.hosts) if self.hosts[rank].is_whole]
        later = [rank for rank in sorted(self.hosts) if rank >= whole[0]]
        sources: dict[int, int] = {}
        before = whole[0]
        for rank in [*later, *(set(self.hosts) - set(later))]:
            if rank in wanted:
                sources[rank] = before
            if rank in wanted or self.hosts[rank].is_whole:
                before = rank
        return sources

    # One host

    async def _bring(self, rank: int, source: int) -> None:
        """Until a host has it, or will not."""
        host, failed = self.hosts[rank], Counter[int]()  # how often each source did
        try:
            while True:
                try:
                    await self._copy(source, rank)
                    break
                except LocalNetworkError as error:
                    failed[source] += 1
                    source = self._another(rank, failed, error)
                    self.watcher.note(
                        f"Host {rank} goes on with what {self._name(source)} has: {error}"
                    )
        except FluxmeshError as error:
            self._lose(rank, error)
            return
        assert host.parcel is not None
        host.is_whole = True
        total = host.parcel.nbytes
        seconds = time.monotonic() - host.begun
        self.arrived[rank] = Arrived(
            rank, source, total - host.begun_bytes, total, seconds, host.address
        )
        self.watcher.arrived(self.arrived[rank])

    def _another(self, rank: int, failed: Counter[int], error: FluxmeshError) -> int:
        """A host that has all of it, and failed least. Raises `error` where there is none."""
        whole = [each for each, host in self.hosts.items() if host.is_whole and each != rank]
        if not whole or failed.total() >= TRIES:
            raise error
        return min(whole, key=lambda each: (failed[each], each))

    async def _copy(self, source: int, rank: int) -> None:
        """Raises `LocalNetworkError` where another source might do, `FluxmeshError` where not."""
        sender, receiver = self.hosts[source], self.hosts[rank]
        if not sender.is_whole:
            await sender.passes_on.wait()
        if sender.is_lost or sender.parcel is None:
            raise LocalNetworkError(f"{self._name(source)} did not get it.".capitalize())
        parcel = receiver.parcel = sender.parcel
        token = secrets.token_bytes(TOKEN_BYTES)
        awaited = self._awaited[token] = asyncio.get_running_loop().create_future()
        order = messages.ReceiveModel(self.model, parcel, token, receiver.ips)
        receiving = asyncio.create_task(receiver.client.ask(order, messages.Done, DAY))
        sending: asyncio.Task[messages.Done] | None = None
        try:
            await asyncio.wait({receiving, awaited}, return_when=asyncio.FIRST_COMPLETED)
            if awaited.done():
                receiver.passes_on.set()
                send = messages.SendModel(self.model, parcel, token, awaited.result())
                sending = asyncio.create_task(sender.client.ask(send, messages.Done, DAY))
                await asyncio.wait({receiving, sending}, return_when=asyncio.FIRST_COMPLETED)
                if not receiving.done() and sending.exception() is not None:
                    await asyncio.wait({receiving}, timeout=DEADLINES.push_reason)
                    if not receiving.done():
                        raise LocalNetworkError(str(sending.exception()))
            await receiving
        finally:
            del self._awaited[token]
            for task, host in ((receiving, receiver), (sending, sender)):
                if task is not None and not task.done():
                    await self._stop(host, token)
            await end(*(task for task in (receiving, sending) if task is not None))

    async def _stop(self, host: _Host, token: bytes) -> None:
        with contextlib.suppress(FluxmeshError):
            await host.client.post(messages.StopModel(token))

    async def _listen(self, rank: int) -> None:
        """What one agent tells by itself."""
        host = self.hosts[rank]
        with contextlib.suppress(HostUnreachableError):  # who asks it something hears of that
            while True:
                report = await host.client.report()
                if isinstance(report, messages.ModelAwaited):
                    if not host.begun:
                        host.begun, host.begun_bytes = time.monotonic(), report.done_bytes
                    awaited = self._awaited.get(report.token)
                    if awaited is not None and not awaited.done():
                        awaited.set_result(report.addresses)
                elif isinstance(report, messages.ModelProgress):
                    host.address = report.address
                    self.watcher.progress(rank, "receiving", report.done_bytes, report.total_bytes)

    def _lose(self, rank: int, error: FluxmeshError) -> None:
        self.errors[rank] = error
        if rank in self.hosts:
            self.hosts[rank].is_lost = True
            self.hosts[rank].passes_on.set()
        self.watcher.failed(rank, str(error))

    def _name(self, rank: int) -> str:
        return "this machine" if rank == HERE else f"host {rank}"
