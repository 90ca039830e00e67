"""The agent itself: between coordinators (transport), the lease and the engine, in one event loop.

    coordinator ◄──► conversation.py ──► Service ──► leases.py      who may change the host
                                           ├───► lifecycle.py   what is to be done, as instructions
                                           ├───► upkeep.py      what is done when nobody asks
                                           └───► supervisor.py  the engine's process

Every request is answered once: one that is repeated under the same `seq` gets the same answer, and
is not done again. What an engine reports goes to the holder of the lease alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Coroutine, Sequence
from dataclasses import replace

from fluxmesh.bounds import sendable
from fluxmesh.cluster.snapshot import StepTiming
from fluxmesh.deadlines import DEADLINES, Deadlines
from fluxmesh.errors import FluxmeshError, LocalNetworkError, UsageError
from fluxmesh.machine.awake import Wakefulness
from fluxmesh.machine.clock import RunningClock
from fluxmesh.storage.homes import AgentHome, read_private, write_private
from fluxmesh.storage.log_tail import last_lines
from fluxmesh.version import __version__
from fluxmesh.wire import messages
from fluxmesh.wire.limits import MAX_HEADER
from fluxmesh.wire.messages import Done, Heartbeat, Hello, Message, Refused
from fluxmesh.wire.tasks import end
from fluxmesh.wire.transport.base import Connection, ConnectionClosed, Listener
from fluxmesh_agent import links, upkeep
from fluxmesh_agent.adapter_store import AdapterStore
from fluxmesh_agent.conversation import CoordinatorConversation
from fluxmesh_agent.leases import Holds, InLine, Leases, Loses, Notice
from fluxmesh_agent.lifecycle import (
    OWN,
    Instruction,
    KillEngine,
    Lifecycle,
    Refusal,
    Send,
    StartEngine,
    Tell,
)
from fluxmesh_agent.model_paths import Roots
from fluxmesh_agent.pushes import Pushes, Pushing
from fluxmesh_agent.status import status_of
from fluxmesh_agent.supervisor import EngineOptions, EngineStays, Supervisor
from fluxmesh_agent.upkeep import Upkeep

log = logging.getLogger(__name__)

LINE = 2000  # characters of a log's line that are shown
LOG_BYTES = MAX_HEADER * 3 // 4


class AgentClock(RunningClock):
    """Silences and graces of coordinators are counted by it: they begin again when we wake."""

    def woke(self, now: float, seconds: float) -> None:
        log.info("%.0f s passed unseen: this machine slept, or its clock was set", seconds)


def fitting(lines: Sequence[str]) -> tuple[str, ...]:
    """The last of a log's lines, as many as one message holds."""
    room, kept = LOG_BYTES, list[str]()
    for line in reversed(lines):
        room -= len(line.encode()) + 5  # and what packing adds
        if room < 0:
            break
        kept.append(line)
    return tuple(reversed(kept))


class Service:
    """One agent."""

    def __init__(
        self,
        listener: Listener,
        home: AgentHome,
        options: EngineOptions,
        stopping: asyncio.Event | None = None,
        deadlines: Deadlines = DEADLINES,
    ) -> None:
        """It ends when `stopping` is set, from then on or before."""
        self.boot = secrets.token_hex(8)
        self.deadlines = deadlines
        self.listener, self.home = listener, home
        self.lifecycle = Lifecycle(options.envs)
        # Fences of earlier lives were smaller: it begins with the time.
        self.leases = Leases(first_fence=int(time.time() * 1000), deadlines=deadlines)
        engine_heard = (self._engine_said, self._engine_ended)
        self.supervisor = Supervisor(home, options, *engine_heard, deadlines)
        self.adapters = AdapterStore(home.adapters)
        roots = Roots(home.adapters, options.models, options.roots)
        ip = listener.address.rpartition(":")[0].strip("[]")
        self.pushes = Pushes(roots, ip, deadlines)
        self.upkeep = Upkeep(_kept(home), deadlines)
        self.measured: dict[tuple[object, ...], StepTiming] = {}
        self.stopping = stopping or asyncio.Event()
        self._clients: dict[str, CoordinatorConversation] = {}
        self._order = asyncio.Lock()  # of what is done to the engine
        self._engine_known = asyncio.Event()  # it has told what it computes on, or has failed
        self._clock = AgentClock()
        self._late: float | None = None  # when an abandoned engine is ended, by that clock
        self._tasks: set[asyncio.Task[None]] = set()
        self._wakefulness = Wakefulness()

    async def run(self) -> None:
        """Serves until `stopping` is set, or a coordinator says `ShutDown`; ends the engine."""
        self.supervisor.end_orphan()
        async with self._order:
            with contextlib.suppress(EngineStays):  # whoever asks is told
                await self._carry_out(self.lifecycle.start())
        self._spawn(self._accept())
        self._spawn(self._keep_time())
        try:
            await self.stopping.wait()
            log.info("the agent ends")
            self.home.keep.unlink(missing_ok=True)  # on purpose: the mesh is no more
        finally:
            await end(*self._tasks)
            with contextlib.suppress(EngineStays):  # it is on record for the next agent
                await self.supervisor.kill()
            self._wakefulness.let_go()
            await self.listener.close()

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._finish)
        return task

    def _finish(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a task of the agent failed", exc_info=task.exception())

    async def _accept(self) -> None:
        with contextlib.suppress(ConnectionClosed):
            while True:
                self._spawn(self._converse(await self.listener.accept()))

    async def _keep_time(self) -> None:
        beat = 0.0
        while True:
            now = self._clock.tick()
            if now - beat >= self.deadlines.heartbeat:
                beat = now
                for client in self._clients.values():
                    client.tell(Heartbeat())
                    if client.waits:  # its heartbeats stand in line behind what it asked for
                        self.leases.hear(client.name, now)
            self._tick(now)
            if not self._order.locked() and self._due(now) is not None:
                self._spawn(self._look_after())
            if self._late is not None and now >= self._late:
                self._late = None
                self._spawn(self._give_up())
            if self.leases.holder or self.pushes.is_busy or not self.lifecycle.is_free:
                self._wakefulness.hold()
            else:
                self._wakefulness.let_go()
            await asyncio.sleep(self.deadlines.tick)

    # Conversations

    async def _converse(self, connection: Connection) -> None:
        client = CoordinatorConversation(connection)
        pushing: set[asyncio.Task[None]] = set()  # as long as whoever asked for it is there
        try:
            while True:
                seq, message = await connection.receive()
                if client.name:
                    self.leases.hear(client.name, self._clock.tick())
                if isinstance(message, Heartbeat):
                    continue
                if client.repeats(seq):
                    continue
                if isinstance(message, messages.ProbeLink):  # takes long; the rest goes on
                    self._spawn(self._answer(client, seq, message))
                elif isinstance(message, Pushing):  # takes very long
                    push = self._spawn(self._answer(client, seq, message))
                    pushing.add(push)
                    push.add_done_callback(pushing.discard)
                else:
                    client.waits = True
                    await self._answer(client, seq, message)
                    client.waits = False
        except ConnectionClosed as error:
            log.debug("%s", error)  # the transport has told it
        finally:
            if self._clients.get(client.name) is client:
                del self._clients[client.name]
                self.leases.gone(client.name, self._clock.tick())
            await end(*pushing)
            await client.close()
            await connection.close()

    async def _answer(self, client: CoordinatorConversation, seq: int, message: Message) -> None:
        try:
            answer = await self._do(client, message)
        except Refusal as error:
            answer = Refused(error.code, str(error))
        except UsageError as error:
            answer = Refused("usage", str(error))
        except LocalNetworkError as error:
            answer = Refused("network", str(error))
        except ConnectionClosed:
            raise
        except FluxmeshError as error:
            answer = Refused("internal", str(error))
        except Exception as error:
            log.exception("%s could not be done", type(message).__name__)
            text = f"The agent failed at {type(message).__name__}: {type(error).__name__}."
            answer = Refused("internal", f"{text} See `fluxmesh logs`.")
        if isinstance(answer, Refused):
            name = type(message).__name__
            log.warning("%s: refused %s: %s", client.label, name, answer.text)
            answer = Refused(answer.code, sendable(answer.text))
        client.answer(seq, answer)

    async def _do(self, client: CoordinatorConversation, message: Message) -> Message:
        now = self._clock.tick()
        if isinstance(message, Hello):
            return await self._welcome(client, message)
        if not client.name:
            return Refused("usage", "Say Hello first.")
        if isinstance(message, messages.Changing):
            if not self.leases.is_valid(client.name, message.fence):
                return Refused("fence", "The lease of this host is not, or no longer, yours.")
            return await self._change(message)
        if isinstance(message, messages.AskStatus):
            return self.status()
        if isinstance(message, messages.AskLogs):
            lines = last_lines(self.home.log, message.lines)
            return messages.Logs(fitting([line[:LINE] for line in lines]))
        if isinstance(message, messages.AskLease):
            user = client.label.partition(" at ")[0]
            asked = (client.name, message.job, message.seconds, now)
            self._notify(self.leases.ask(*asked, user=user, title=message.title))
            asyncio.get_running_loop().call_soon(self._tick)
            return Done()
        if isinstance(message, messages.LeaveQueue):
            if self.leases.leave(client.name):
                self._abandon()
            asyncio.get_running_loop().call_soon(self._tick)
            return Done()
        if isinstance(message, messages.ListenForLink):
            return messages.Ports((links.listen(message.ip, message.token, self.deadlines),))
        if isinstance(message, messages.ProbeLink):
            link = (message.ip, message.port, message.token, message.nbytes)
            return await links.probe(*link, self.deadlines)
        if isinstance(message, Pushing):
            return await self.pushes.do(message, client.tell)
        if isinstance(message, messages.StopModel):
            self.pushes.stop(message.token)
            return Done()
        if isinstance(message, messages.Keep):
            self.upkeep.want(message)
            write_private(self.home.keep, upkeep.to_json(message))
            return Done()
        if isinstance(message, messages.LeaveRing):
            self.upkeep.leave(self.lifecycle.ring.name)
            return Done()
        if isinstance(message, messages.NoteSize):
            self.upkeep.note(message)
            return Done()
        if isinstance(message, messages.ShutDown):
            log.info("%s shuts the agent down", client.label)
            asyncio.get_running_loop().call_later(0.1, self.stopping.set)
            return Done()
        return Refused("usage", f"{type(message).__name__} is no request to an agent.")

    async def _change(self, message: messages.Changing) -> Message:
        """What only the holder of the lease may ask for."""
        self.upkeep.used(self._clock.tick())
        if isinstance(message, messages.TellProgress):
            self.leases.heard_progress(message.progress, self._clock.tick())
            return Done()
        if isinstance(message, messages.HasFile):
            return messages.Found(self.adapters.has(message.sha256))
        if isinstance(message, messages.PutFile):
            piece = (message.sha256, message.offset, message.total, message.data)
            await asyncio.to_thread(self.adapters.put, *piece)
            return Done()
        if isinstance(message, messages.AskPorts):
            return messages.Ports(links.free_ports(message.ip, message.count))
        async with self._order:
            if isinstance(message, messages.Kill):
                await self._carry_out(self.lifecycle.kill(message))
            elif isinstance(message, messages.Join):
                await self._carry_out(self.lifecycle.join(message))
            elif isinstance(message, messages.Cancel):
                await self._carry_out(self.lifecycle.cancel(message))
            elif isinstance(message, messages.Work):
                await self._carry_out(self.lifecycle.work(message))
            else:
                return Refused("usage", f"{type(message).__name__} is no request to an agent.")
        return Done()

    async def _welcome(self, client: CoordinatorConversation, hello: Hello) -> Message:
        if hello.version != __version__:
            text = f"This host has fluxmesh {__version__} and you {hello.version}; update one."
            return Refused("version", text)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._engine_known.wait(), self.deadlines.first_word)
        if self._clients.get(client.name) is client:
            del self._clients[client.name]
        client.name = f"{client.user}/{hello.client}"
        self._clients[client.name] = client
        self.leases.hear(client.name, self._clock.tick())
        return messages.Welcome(self.boot, __version__, self.status())

    def status(self) -> messages.Status:
        """This host at this moment."""
        holder, now = self.leases.holder.rpartition("/")[2], self._clock.tick()
        return status_of(
            self.lifecycle,
            engine_pid=self.supervisor.pid,
            measured=tuple(self.measured.values()),
            memory=self.supervisor.options.memory,
            holder=holder,
            job=self.lifecycle.job or self.leases.job,
            waiting=self.leases.waiting,
            busy_seconds=self.leases.seconds_until_free(now),
            lease=self.leases.held_for(now),
            line=self.leases.waiting_jobs(now),
        )

    # Leases

    def _tick(self, now: float | None = None) -> None:
        now = self._clock.tick() if now is None else now
        self._notify(self.leases.tick(now, self.lifecycle.is_free))

    def _notify(self, notices: Sequence[Notice]) -> None:
        for notice in notices:
            client = self._clients.get(notice.client)
            if isinstance(notice, Holds):
                if client is not None:  # who only asks how it goes leaves no line
                    log.info("%s has the lease", client.label)
                self.lifecycle.lease()
                self.upkeep.used(self._clock.tick())
                report: Message = messages.Granted(
                    notice.fence, self.lifecycle.ring_generation, self.status()
                )
            elif isinstance(notice, InLine):
                report = messages.LeaseQueued(notice.place, notice.seconds)
            else:
                report = messages.Lost(f"This host took the lease back: {notice.reason}.")
            if isinstance(notice, Loses):
                who = client.label if client else notice.client.rpartition("/")[2]
                log.warning("%s lost its lease, or its place in line: %s", who, notice.reason)
                if not self.leases.holder:
                    self._abandon()
            if client is not None:
                client.tell(report)

    def _abandon(self) -> None:
        """The lease was given up: what is left of the work stops, by force if need be."""
        self.upkeep.used(self._clock.tick())
        if self.lifecycle.is_free:
            return
        # As long as loading its weights again would take: to wait longer costs more than to end it.
        patience = max(self.deadlines.letting_go, self.lifecycle.seconds_to_load)
        self._late = self._clock.tick() + patience
        self._send_all(self.lifecycle.abandon())

    def _due(self, now: float) -> messages.Load | messages.Warm | None:
        """What the engine shall do although nobody asks for it."""
        leased = bool(self.leases.holder or self.leases.waiting)
        return self.upkeep.due(self.lifecycle, leased=leased, now=now)

    async def _look_after(self) -> None:
        """Gives the engine what is due, if that is still so."""
        async with self._order:
            work = self._due(self._clock.tick())
            if work is None:
                return
            what = "compiles" if isinstance(work, messages.Warm) else "loads"
            log.info("nobody asks for the engine: it %s for %s", what, work.weights.model)
            try:
                if isinstance(work, messages.Load) and self.upkeep.is_leaving(self.lifecycle):
                    await self._carry_out(self.lifecycle.renew(work))
                else:
                    await self._carry_out(self.lifecycle.upkeep(work))
            except FluxmeshError as error:  # the engine does not start
                log.warning("%s", error)

    def _own_ended(self, message: Message) -> None:
        """The agent's own work is done, or failed; in silence, where something went before it."""
        now = self._clock.tick()
        if isinstance(message, messages.Failed):
            log.warning("what the engine did by itself failed: %s", message.text)
            self.upkeep.failed(now)
        elif isinstance(message, messages.Loaded | messages.Warmed):
            self.upkeep.worked()

    # The engine

    async def _carry_out(self, instructions: Sequence[Instruction]) -> None:
        for instruction in instructions:
            if isinstance(instruction, KillEngine | StartEngine):
                try:
                    await self.supervisor.kill()  # one that told its end may still be about it
                    if isinstance(instruction, StartEngine):
                        self.supervisor.start(instruction.envs)
                except FluxmeshError as error:
                    self._engine_ended(str(error))
                    self.lifecycle.stuck(str(error))
                    if isinstance(error, EngineStays):
                        self._spawn(self._until_gone(str(error)))
                    raise
            else:
                self._send_all([instruction])

    def _send_all(self, instructions: Sequence[Instruction]) -> None:
        for instruction in instructions:
            if isinstance(instruction, Send):
                self.supervisor.send(instruction.message)
            elif isinstance(instruction, Tell):
                holder = self._clients.get(self.leases.holder)
                if holder is not None:
                    holder.tell(instruction.report)

    def _engine_said(self, message: Message) -> None:
        if isinstance(message, messages.Timed):
            m, ring = message.measured, self.lifecycle.ring
            if m.placement != "data":
                m = replace(m, backend=ring.backend)
            what = (m.model, m.height, m.width, m.dtype, m.bits, m.placement, m.hosts)
            self.measured[what] = m.with_firsts_of(self.measured.get(what, m))
        instructions = self.lifecycle.engine_said(message)
        if isinstance(message, messages.WorkReport) and message.job == OWN:
            self._own_ended(message)
        self._engine_known.set()
        self._send_all(instructions)
        if any(isinstance(instruction, KillEngine) for instruction in instructions):
            self.upkeep.used(self._clock.tick())
            self._spawn(self._end_engine())
        if self.lifecycle.is_free:
            self._late = None  # what runs from now on is the next holder's
        if isinstance(message, messages.Account) and message.is_over:
            self._tick()

    async def _until_gone(self, reason: str) -> None:
        """Once an engine that did not end is gone after all, another can be started."""
        await self.supervisor.gone()
        self.lifecycle.unstuck(reason)

    async def _give_up(self) -> None:
        """The engine did not let go of what a lost coordinator left behind."""
        async with self._order:
            with contextlib.suppress(EngineStays):
                await self._carry_out(self.lifecycle.give_up())

    async def _end_engine(self) -> None:
        """After it has told that it is of no more use."""
        async with self._order:
            if self.lifecycle.state == "failed":  # not, where the next was started meanwhile
                with contextlib.suppress(EngineStays):
                    await self._carry_out([KillEngine()])

    def _engine_ended(self, text: str, *, is_killed: bool = False) -> None:
        self._engine_known.set()
        self.upkeep.used(self._clock.tick())
        if self.lifecycle.own is not None:
            self.upkeep.failed(self._clock.tick())
        self._send_all(self.lifecycle.engine_ended(text, is_killed=is_killed))
        self._late = None
        self._tick()


def _kept(home: AgentHome) -> messages.Keep | None:
    """What the agent before this one, which was killed, was to hold."""
    try:
        return upkeep.from_json(read_private(home.keep))
    except FileNotFoundError:
        return None
    except FluxmeshError as error:
        log.warning("%s: %s", home.keep, error)
        return None
