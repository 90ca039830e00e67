"""The life of one engine, as its agent sees it: a state machine that does nothing itself. Pure.

Requests of the lease's holder and what the engine says go in; out come instructions, which
`service.py` carries out in their order. It knows what the engine has been given and not yet ended,
which epoch it is, which ring the engine is in, and what it holds:

    idle ──► loading ──► ready ◄──► busy        failed: the engine died; the next work starts one

An epoch begins with `Kill`, or with a `Join` or work of a higher number; what the engine still
tells of an older one is dropped here.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import Literal

from fluxmesh.cluster.snapshot import Holding
from fluxmesh.errors import FluxmeshError
from fluxmesh.wire import training_messages as training
from fluxmesh.wire.messages import (
    Account,
    Beat,
    Cancel,
    Cancelled,
    Counters,
    Device,
    Encoded,
    Failed,
    Join,
    Joined,
    Kill,
    Load,
    Loaded,
    Message,
    Pictured,
    Progress,
    Report,
    SourceEncoded,
    State,
    Stepped,
    Timed,
    Work,
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

_OF_EPOCH = (
    *(Joined, Failed, Progress, Beat, Loaded, Encoded, SourceEncoded, Stepped, Pictured),
    *(Timed, Cancelled, training.Opened, training.Computed, training.Moved),
    *(training.VectorPart, training.HeldOut, training.Painted, training.Closed),
)


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

    def __init__(self, code: Literal["fence", "usage", "busy"], text: str) -> None:
        super().__init__(text)
        self.code: Literal["fence", "usage", "busy"] = code


class Lifecycle:
    """One engine after another on one host."""

    def __init__(self, envs: tuple[tuple[str, str], ...] = ()) -> None:
        """`envs` are those that every engine of this host is started with."""
        self.epoch = 0
        self.reason = ""  # of the last failure
        self.holds: Holding | None = None
        self.counters = Counters()
        self.load_rate = 0.0
        self.device: Device | None = None
        self._runs = False
        self._own_envs = _of_start(envs)
        self._start_envs = self._own_envs
        self._ring: Join | None = None
        self._pending: deque[Work | Join] = deque()

    @property
    def state(self) -> State:
        if not self._runs and self.reason:
            return "failed"
        if self._pending:
            return "loading" if isinstance(self._pending[0], Load) else "busy"
        return "ready" if self.holds else "idle"

    @property
    def job(self) -> str:
        """The job that the engine works for, or ""."""
        return next((work.job for work in self._pending if isinstance(work, Work)), "")

    @property
    def is_free(self) -> bool:
        """Whether the engine has ended all that it was given."""
        return not self._pending

    @property
    def seconds_to_load(self) -> float:
        """What it would take to load again what the engine holds, as far as is known."""
        if self.holds is None or not self.load_rate:
            return 0.0
        return self.holds.nbytes / self.load_rate

    @property
    def ring(self) -> tuple[str, int, int]:
        """(name, rank, size) of the ring that the engine is in."""
        if self._ring is None:
            return "", 0, 1
        return ring_name(self._ring.nonce), self._ring.rank, self._ring.size

    # Requests

    def start(self) -> list[Instruction]:
        """An engine, before anybody asks for one: it tells what it computes on."""
        return [] if self._runs else self._start(())

    def kill(self, kill: Kill) -> list[Instruction]:
        self._enter(kill.epoch)
        return self._end()

    def join(self, join: Join) -> list[Instruction]:
        """Raises `Refusal` for an old epoch, or what a ring doesn't need."""
        unknown = {key for key, _ in join.envs} - RING_ENVS
        unknown |= {key for key, _ in join.files} - RING_FILES
        if unknown:
            raise Refusal("usage", f"A ring may not set {', '.join(sorted(unknown))}.")
        if not join.rank < join.size:
            raise Refusal("usage", f"A ring of {join.size} has no rank {join.rank}.")
        self._enter(join.epoch)
        old = self._ring
        if old is not None and join.size > 1:
            known = replace(join, fence=old.fence, epoch=old.epoch)
            if known == old and self._runs:
                return [Tell(Joined(join.epoch, join.rank))]
        if join.size == 1 and old is None:
            return [*self.start(), Tell(Joined(join.epoch, join.rank))]
        envs = _of_start(join.envs) or self._own_envs
        done: list[Instruction] = []
        if self._runs and (old is not None or (join.size > 1 and envs != self._start_envs)):
            done += self._end()
        if not self._runs:
            done += self._start(envs)
        if join.size == 1:
            return [*done, Tell(Joined(join.epoch, join.rank))]
        self._ring = join
        self._pending.append(join)
        return [*done, Send(join)]

    def work(self, work: Work) -> list[Instruction]:
        """Raises `Refusal` for an old epoch."""
        self._enter(work.epoch)
        done = self.start()
        self._pending.append(work)
        return [*done, Send(work)]

    def cancel(self, cancel: Cancel) -> list[Instruction]:
        if self._runs and self._pending:
            return [Send(cancel)]
        return [Tell(Cancelled(cancel.job, self.epoch))]

    def abandon(self) -> list[Instruction]:
        """The holder has lost its lease: what it left in line is cancelled."""
        jobs = dict.fromkeys(work.job for work in self._pending if isinstance(work, Work))
        return [Send(Cancel(0, job)) for job in jobs]

    def give_up(self) -> list[Instruction]:
        """What was abandoned does not end by itself."""
        if self.is_free:
            return []
        self.epoch += 1
        return self._end()

    # The engine

    def engine_said(self, message: Message) -> list[Instruction]:
        if isinstance(message, Device):
            self.device = message
            return []
        if isinstance(message, Account):
            self.holds, self.load_rate = message.holds, message.load_rate or self.load_rate
            self.counters = message.counters
            if message.is_over and self._pending:
                self._pending.popleft()
            return []
        if isinstance(message, Loaded):
            self.holds = message.holding
        if isinstance(message, Cancelled):
            return [Tell(replace(message, epoch=self.epoch))]
        if isinstance(message, Failed) and message.fatal:
            # The process may take a while to end, or hang while it does.
            return [*self._died(message.text), *self._told(message)]
        return self._told(message)

    def engine_ended(self, text: str) -> list[Instruction]:
        """The engine's process is gone, and nobody here ended it."""
        if not self._runs:
            return []
        failed = Failed(self.epoch, self.job, "Died", text, fatal=True)
        return [*self._died(text), Tell(failed)]

    def _told(self, message: Message) -> list[Instruction]:
        if isinstance(message, _OF_EPOCH) and message.epoch >= self.epoch:
            return [Tell(message)]
        return []

    def _died(self, text: str) -> list[Instruction]:
        done = self._end()
        self.reason = text
        return done

    def _enter(self, epoch: int) -> None:
        if epoch < self.epoch:
            raise Refusal("fence", f"This is of epoch {epoch}, and the host is at {self.epoch}.")
        self.epoch = epoch

    def _start(self, envs: tuple[tuple[str, str], ...]) -> list[Instruction]:
        self._runs, self._start_envs, self.reason = True, envs or self._own_envs, ""
        return [StartEngine(envs)]

    def _end(self) -> list[Instruction]:
        was, self._runs = self._runs, False
        self._ring, self.holds, self.reason = None, None, ""
        self.counters = Counters()
        self._pending.clear()
        return [KillEngine()] if was else []


def _of_start(envs: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """Those that a process reads when it starts, and never again."""
    return tuple(pair for pair in envs if pair[0] in START_ENVS)
