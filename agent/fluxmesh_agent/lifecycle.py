"""The life of one engine, as its agent sees it: a state machine that does nothing itself. Pure.

Requests of the lease's holder and what the engine says go in; out come instructions, which
`service.py` carries out in their order. It knows what the engine has been given and not yet ended,
which ring generation it is, which ring the engine is in, and what it holds:

    idle ──► loading ──► ready ◄──► busy        failed: the engine died; the next work starts one

A ring generation begins with `Kill`, or with a `Join` or work of a higher number; what the engine
still tells of an older one is dropped here.

Between jobs the agent gives its engine work of its own (`upkeep.py` says which). Nobody waits for
it: to others the engine is free meanwhile, and what a job asks for goes before it, unless it is the
very load that the job needs too.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import Literal

from fluxmesh.cluster.snapshot import (
    Holding,
    KeptModel,
    ModelVariant,
    RingPlace,
    StepShape,
    TextHolding,
)
from fluxmesh.errors import FluxmeshError
from fluxmesh.wire.messages import (
    ENGINE_KILLED,
    Account,
    Beat,
    Cancel,
    Cancelled,
    Device,
    EngineCounters,
    EngineReport,
    EngineUnit,
    Failed,
    Join,
    Joined,
    Kill,
    Load,
    Loaded,
    LoadProgress,
    Message,
    ModelWork,
    Reading,
    Report,
    State,
    Warm,
    Work,
    WorkReport,
    ring_name,
)

# What a `Join` may set in an engine: what `backends.joining` makes, and nothing else.
RING_ENVS = frozenset(
    {
        *("MLX_RANK", "MLX_WORLD_SIZE", "NCCL_HOST_IP", "NCCL_PORT", "CUDA_VISIBLE_DEVICES"),
        *("MLX_JACCL_COORDINATOR", "MLX_JACCL_RING"),
    }
)
RING_FILES = frozenset({"MLX_HOSTFILE", "MLX_IBV_DEVICES"})
START_ENVS = frozenset({"CUDA_VISIBLE_DEVICES"})  # read when the engine's process starts
OWN = "own"  # the job of what the agent gives its engine by itself; no coordinator's


@dataclass(frozen=True)
class StartEngine:
    envs: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class KillEngine:
    """Ends the engine, and waits until it is gone; the lifecycle doesn't want to hear of it."""


@dataclass(frozen=True)
class Send:
    """Gives the engine a message."""

    message: Message


@dataclass(frozen=True)
class Tell:
    """Sends the holder of the lease a report."""

    report: Report


Instruction = StartEngine | KillEngine | Send | Tell


class Refusal(FluxmeshError):
    """A request that can't be done; nothing has changed."""

    def __init__(self, code: Literal["fence", "usage"], text: str) -> None:
        super().__init__(text)
        self.code: Literal["fence", "usage"] = code


class Lifecycle:
    """One engine after another on one host."""

    def __init__(self, envs: tuple[tuple[str, str], ...] = ()) -> None:
        """`envs` are those that every engine of this host is started with."""
        self.ring_generation = 0
        self.reason = ""  # of the last failure
        self.holds: Holding | None = None
        self.text: TextHolding | None = None
        self.kept: tuple[KeptModel, ...] = ()  # models in memory beside that one
        self.counters = EngineCounters()
        self.load_rate = 0.0
        self.device: Device | None = None
        self.components: tuple[str, ...] = ()  # that are in memory
        self.compiled: tuple[StepShape, ...] = ()  # what the engine has made steps of
        self.loading: Reading | None = None
        self.served: ModelVariant | None = None  # what the last work for others painted with
        self.is_bare = True  # an engine has ended, or never was, and nobody asked for it since
        self._runs = False
        self._own_envs = _of_start(envs)
        self._start_envs = self._own_envs
        self._ring: Join | None = None
        self._pending: deque[EngineUnit] = deque()

    @property
    def state(self) -> State:
        if not self._runs and self.reason:
            return "failed"
        if self._pending and isinstance(self._pending[0], Load):
            return "loading"
        if not self.is_free:
            return "busy"
        return "ready" if self.holds else "idle"

    @property
    def job(self) -> str:
        """The job that the engine works for, or ""."""
        return next((work.job for work in self._asked if isinstance(work, Work)), "")

    @property
    def is_free(self) -> bool:
        """Whether the engine has ended all that it was asked for."""
        return not self._asked

    @property
    def own(self) -> Work | None:
        """What the engine has of the agent's own work; it is always the first."""
        first = self._pending[0] if self._pending else None
        return first if isinstance(first, Work) and first.job == OWN else None

    @property
    def _asked(self) -> list[EngineUnit]:
        """What others have asked for, and the engine has not ended."""
        return [unit for unit in self._pending if unit is not self.own]

    @property
    def seconds_to_load(self) -> float:
        """What it would take to load again what the engine holds, as far as is known."""
        if self.holds is None or not self.load_rate:
            return 0.0
        return self.holds.nbytes / self.load_rate

    @property
    def ring(self) -> RingPlace:
        """Where the engine stands in the ring that it is in."""
        join = self._ring
        if join is None:
            return RingPlace()
        return RingPlace(ring_name(join.nonce), join.rank, join.size, join.backend)

    # Requests

    def lease(self) -> None:
        """Another coordinator holds the host, and has asked for nothing yet."""
        self.served = None

    def start(self) -> list[Instruction]:
        """An engine, before anybody asks for one: it tells what it computes on."""
        return [] if self._runs else self._start(())

    def kill(self, kill: Kill) -> list[Instruction]:
        self._enter(kill.ring_generation)
        return self._end()

    def join(self, join: Join) -> list[Instruction]:
        """Raises `Refusal` for an old ring generation, or what a ring doesn't need."""
        unknown = {key for key, _ in join.envs} - RING_ENVS
        unknown |= {key for key, _ in join.files} - RING_FILES
        if unknown:
            raise Refusal("usage", f"A ring may not set {', '.join(sorted(unknown))}.")
        if not join.rank < join.size:
            raise Refusal("usage", f"A ring of {join.size} has no rank {join.rank}.")
        self._enter(join.ring_generation)
        old = self._ring
        if old is not None and join.size > 1:
            known = replace(join, fence=old.fence, ring_generation=old.ring_generation)
            if known == old and self._runs:
                return [Tell(Joined(ring_generation=join.ring_generation, rank=join.rank))]
        if join.size == 1 and old is None:
            return [
                *self.start(),
                Tell(Joined(ring_generation=join.ring_generation, rank=join.rank)),
            ]
        # The device that the agent was given; the coordinator counts only the ring's members.
        envs = self._own_envs or _of_start(join.envs)
        done: list[Instruction] = []
        if self._runs and (old is not None or (join.size > 1 and envs != self._start_envs)):
            done += self._end()
        if not self._runs:
            done += self._start(envs)
        if join.size == 1:
            return [*done, Tell(Joined(ring_generation=join.ring_generation, rank=join.rank))]
        self._ring = join
        done += self._make_way(join)
        self._pending.append(join)
        self.is_bare = False
        return [*done, Send(join)]

    def work(self, work: Work) -> list[Instruction]:
        """Raises `Refusal` for an old ring generation."""
        self._enter(work.ring_generation)
        done = [*self.start(), *self._make_way(work)]
        self._pending.append(work)
        self.served = work.weights if isinstance(work, ModelWork) else None
        self.is_bare = False
        return [*done, Send(work)]

    def upkeep(self, work: Load | Warm) -> list[Instruction]:
        """The agent's own work, for an engine that is free."""
        assert not self._pending and work.job == OWN, "others go before it"
        done = self.start()
        self._pending.append(work)
        return [*done, Send(work)]

    def renew(self, work: Load) -> list[Instruction]:
        """The agent's own work, for an engine that takes the place of one that is in a ring."""
        return [*self._end(), *self.upkeep(work)]

    def _make_way(self, work: EngineUnit) -> list[Instruction]:
        """The agent's own work stops for `work`, unless that would have to do it again."""
        own = self.own
        if own is None or _goes_on(own, work):
            return []
        return [Send(Cancel(fence=0, job=OWN))]

    def cancel(self, cancel: Cancel) -> list[Instruction]:
        if self._runs and not self.is_free:
            own = [] if self.own is None else [Send(Cancel(fence=0, job=OWN))]
            return [*own, Send(cancel)]
        return [Tell(Cancelled(job=cancel.job, ring_generation=self.ring_generation))]

    def abandon(self) -> list[Instruction]:
        """The holder has lost its lease: what it left in line is cancelled."""
        jobs = dict.fromkeys(work.job for work in self._asked if isinstance(work, Work))
        return [Send(Cancel(fence=0, job=job)) for job in jobs]

    def give_up(self) -> list[Instruction]:
        """What was abandoned does not end by itself."""
        if self.is_free:
            return []
        self.ring_generation += 1
        return self._end()

    # The engine

    def engine_said(self, message: Message) -> list[Instruction]:
        if isinstance(message, Device):
            self.device = message
            return []
        if not self._runs:
            return []  # it has told its end, and holds nothing
        if isinstance(message, Account):
            self.holds, self.load_rate = message.holds, message.load_rate or self.load_rate
            self.counters, self.components = message.counters, message.components
            self.compiled, self.text = message.compiled, message.text
            self.kept = message.kept
            if message.is_over and self._pending:
                self._pending.popleft()
                self.loading = None
            return []
        if isinstance(message, Loaded):
            self.holds = message.holding
        if isinstance(message, LoadProgress):
            self.loading = Reading(message.component, message.done_bytes, message.total_bytes)
        if isinstance(message, Cancelled):
            return [Tell(replace(message, ring_generation=self.ring_generation))]
        if isinstance(message, WorkReport) and message.job == OWN:
            return self._own_told(message)
        if isinstance(message, Failed) and message.fatal:
            # The process may take a while to end, or hang while it does.
            return [*self._died(message.text), *self._told(message)]
        return self._told(message)

    def engine_ended(self, text: str, *, is_killed: bool = False) -> list[Instruction]:
        """The engine's process is gone, and nobody here ended it.

        `is_killed`: another program did, or the system, for want of memory.
        """
        if not self._runs:
            return []
        return self._lost(ENGINE_KILLED if is_killed else "Died", text)

    def stuck(self, reason: str) -> None:
        """There is no engine, and for that reason none could be started."""
        self.reason = reason

    def unstuck(self, reason: str) -> None:
        """That reason is gone."""
        if self.reason == reason:
            self.reason = ""

    def _lost(self, kind: str, text: str) -> list[Instruction]:
        """The engine is gone. Where nobody had asked it for anything, nobody has lost anything."""
        is_own = self.own is not None and self.is_free
        failed = Failed(
            ring_generation=self.ring_generation, job=self.job, kind=kind, text=text, fatal=True
        )
        died = self._died(text)
        return died if is_own else [*died, Tell(failed)]

    def _own_told(self, message: Message) -> list[Instruction]:
        """Of the agent's own work, who waits behind it hears that it moves, and no more."""
        if isinstance(message, Failed) and message.fatal:
            return self._lost(message.kind, message.text)
        if isinstance(message, LoadProgress | Beat) and not self.is_free:
            return [Tell(replace(message, job=self.job, ring_generation=self.ring_generation))]
        return []

    def _told(self, message: Message) -> list[Instruction]:
        if isinstance(message, EngineReport) and message.ring_generation >= self.ring_generation:
            return [Tell(message)]
        return []

    def _died(self, text: str) -> list[Instruction]:
        done = self._end()
        self.reason = text
        return done

    def _enter(self, ring_generation: int) -> None:
        if ring_generation < self.ring_generation:
            raise Refusal(
                "fence",
                f"This is of ring generation {ring_generation}, and the host is at "
                f"{self.ring_generation}.",
            )
        self.ring_generation = ring_generation

    def _start(self, envs: tuple[tuple[str, str], ...]) -> list[Instruction]:
        self._runs, self._start_envs, self.reason = True, envs or self._own_envs, ""
        return [StartEngine(envs)]

    def _end(self) -> list[Instruction]:
        was, self._runs = self._runs, False
        self._ring, self.holds, self.text, self.reason = None, None, None, ""
        self.counters, self.loading = EngineCounters(), None
        self.components, self.compiled, self.kept = (), (), ()
        self._pending.clear()
        self.is_bare = True
        return [KillEngine()] if was else []


def _goes_on(own: Work, work: EngineUnit) -> bool:
    """Whether `work` needs what the agent loads by itself, and would load it otherwise."""
    if not isinstance(own, Load) or not isinstance(work, ModelWork) or work.weights != own.weights:
        return False
    if isinstance(work, Load):
        part = (work.shards, work.shard, work.shares)
        return part == (own.shards, own.shard, own.shares) and not work.low_memory
    return True


def _of_start(envs: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """Those that a process reads when it starts, and never again."""
    return tuple(pair for pair in envs if pair[0] in START_ENVS)
