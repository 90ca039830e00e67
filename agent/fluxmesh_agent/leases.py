"""Who may change this host, and who waits: first come, first served. Pure: time is an argument.

A lease carries a fencing number that rises with every grant, and begins above those of the agent's
earlier lives: a message from a coordinator that has lost its lease without noticing is told apart.
A coordinator that stays silent for too long (`Deadlines.silence`), or whose conversation ends and
does not begin again (`Deadlines.left`), loses its lease, or its place in line. `service.py` asks,
and sends the notices.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from fluxmesh.deadlines import DEADLINES, Deadlines
from fluxmesh.wire.messages import JobProgress, LeaseHolder, WaitingJob

NEARLY = 1.0  # second that a lease takes to be free which should be by now
LONGEST = 1e9  # seconds that a job may say it takes
SHOWN = 64  # of those in line, in a status


@dataclass(frozen=True)
class Holds:
    """The lease is this client's."""

    client: str
    fence: int


@dataclass(frozen=True)
class InLine:
    """This client waits; `place` 1 is next."""

    client: str
    place: int
    seconds: float  # until the lease is free, as far as is known


@dataclass(frozen=True)
class Loses:
    """The lease, or the place in line, is no longer this client's."""

    client: str
    reason: str


Notice = Holds | InLine | Loses


@dataclass
class _Asked:
    client: str
    job: str
    seconds: float
    user: str = ""  # as people know the client
    title: str = ""  # of the job
    progress: JobProgress = JobProgress()
    fence: int = 0
    since: float = 0.0  # of the lease
    notified: tuple[int, float] = field(default=(0, float("-inf")))  # place, when


class Leases:
    """The lease of one host."""

    def __init__(self, first_fence: int = 1, deadlines: Deadlines = DEADLINES) -> None:
        """`first_fence` is above every fence of this host's earlier lives."""
        self.deadlines = deadlines
        self._fence = first_fence
        self._holder: _Asked | None = None
        self._line: list[_Asked] = []
        self._heard: dict[str, float] = {}

    @property
    def holder(self) -> str:
        """The client that holds the lease, or ""."""
        return self._holder.client if self._holder else ""

    @property
    def job(self) -> str:
        """What the holder has the lease for, or ""."""
        return self._holder.job if self._holder else ""

    @property
    def waiting(self) -> int:
        return len(self._line)

    def seconds_until_free(self, now: float) -> float:
        """For whoever comes now: what the holder, and those in line, have said that they take.

        Who takes longer than that is nearly done, as far as anybody knows.
        """
        if self._holder is None and not self._line:
            return 0.0
        return max(NEARLY, self._seconds_left(now) + sum(asked.seconds for asked in self._line))

    def is_valid(self, client: str, fence: int) -> bool:
        """Whether `fence` is that of the lease, and `client` holds it."""
        holder = self._holder
        return holder is not None and (holder.client, holder.fence) == (client, fence)

    def hear(self, client: str, now: float) -> None:
        """Any sign of life."""
        self._heard[client] = now

    def gone(self, client: str, now: float) -> None:
        """Its conversation has ended: unless it comes back soon, nobody waits for it."""
        if client in self._heard:
            soon = now - self.deadlines.silence + self.deadlines.left
            self._heard[client] = min(self._heard[client], soon)

    def ask(
        self, client: str, job: str, seconds: float, now: float, *, user: str = "", title: str = ""
    ) -> list[Notice]:
        """Gets in line, once: who holds the lease already is told so again.

        `user` and `title` are for people: who asks, and for what.
        """
        self.hear(client, now)
        seconds = min(max(0.0, seconds), LONGEST)  # the sum of a line stays a number
        if self._holder and self._holder.client == client:
            self._holder.job, self._holder.seconds, self._holder.since = job, seconds, now
            self._holder.title = title
            return [Holds(client, self._holder.fence)]
        for asked in self._line:
            if asked.client == client:
                asked.job, asked.seconds, asked.notified = job, seconds, (0, float("-inf"))
                asked.title = title
                return []
        self._line.append(_Asked(client, job, seconds, user, title))
        return []

    def heard_progress(self, progress: JobProgress, now: float) -> None:
        """The holder tells how far it is; what is left of its time is known better by now."""
        if self._holder is None:
            return
        self._holder.progress = progress
        if progress.seconds > 0:
            self._holder.seconds, self._holder.since = min(progress.seconds, LONGEST), now

    def held_for(self, now: float) -> LeaseHolder | None:
        """Who holds the lease, for what, and how far that is."""
        holder = self._holder
        if holder is None:
            return None
        progress = replace(holder.progress, seconds=self._seconds_left(now))
        return LeaseHolder(user=holder.user, title=holder.title, progress=progress)

    def waiting_jobs(self, now: float) -> tuple[WaitingJob, ...]:
        """Those in line, the next one first."""
        seconds = self._seconds_left(now)
        jobs: list[WaitingJob] = []
        for asked in self._line[:SHOWN]:
            jobs.append(WaitingJob(user=asked.user, title=asked.title, seconds=seconds))
            seconds += asked.seconds
        return tuple(jobs)

    def _seconds_left(self, now: float) -> float:
        """Until the lease is free, as far as is known."""
        holder = self._holder
        return 0.0 if holder is None else max(0.0, holder.seconds - (now - holder.since))

    def leave(self, client: str) -> bool:
        """Gives up the lease or the place. Whether it was the lease."""
        self._line = [asked for asked in self._line if asked.client != client]
        if self._holder is None or self._holder.client != client:
            return False
        self._holder = None
        return True

    def tick(self, now: float, is_free: bool = True) -> list[Notice]:
        """What time has brought. `is_free`: nothing is left of the last holder's work."""
        notices: list[Notice] = []
        limit = self.deadlines.silence
        for client in [asked.client for asked in (self._holder, *self._line) if asked]:
            silence = now - self._heard.get(client, now)
            if silence > limit:
                self.leave(client)
                notices.append(Loses(client, f"nothing was heard of it for {silence:.0f} s"))
        # Every command is a client of its own: those of yesterday are forgotten.
        self._heard = {c: heard for c, heard in self._heard.items() if now - heard <= limit}
        if self._holder is None and self._line and is_free:
            self._holder = self._line.pop(0)
            self._holder.fence, self._holder.since = self._fence, now
            self._fence += 1
            notices.append(Holds(self._holder.client, self._holder.fence))
        return notices + self._tell_line(now)

    def _tell_line(self, now: float) -> list[Notice]:
        notices: list[Notice] = []
        seconds = self._seconds_left(now)
        for place, asked in enumerate(self._line, start=1):
            last_place, when = asked.notified
            if place != last_place or now - when >= self.deadlines.tell_place:
                asked.notified = (place, now)
                notices.append(InLine(asked.client, place, seconds))
            seconds += asked.seconds
        return notices
