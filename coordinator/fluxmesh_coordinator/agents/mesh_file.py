"""The mesh that is up, as this user's `mesh.json` keeps it between two commands.

`fluxmesh up` writes it once the agents run; `generate`, `status`, `logs`, `plan` and `down` read it
to know whom to talk to. It holds the hostfile's own text, so that a changed hostfile is noticed,
and of each agent its address and public key. No secret is in it.

Whatever writes waits for other processes that do, and so blocks: an event loop has threads for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fluxmesh.cluster import hostfile as hostfiles
from fluxmesh.cluster.backends import BackendFault, Fallback, below, with_addresses
from fluxmesh.cluster.hostfile import Host, Hostfile
from fluxmesh.cluster.shares import Shares
from fluxmesh.cluster.snapshot import (
    CollectiveTime,
    JobTiming,
    LinkInfo,
    ModelVariant,
    Recent,
    RingTiming,
    StepTiming,
    TextTiming,
    Timings,
)
from fluxmesh.deadlines import DEADLINES
from fluxmesh.errors import FluxmeshError, UsageError
from fluxmesh.planning.learning import learned
from fluxmesh.request import AdapterRef
from fluxmesh.storage.homes import Home, HomeError, home_folder, read_private, write_private
from fluxmesh.storage.keys import is_key

VERSION = 1
THIS_MACHINE = '[{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}]'
THIS_NAME = "this machine"


class RecordInUseError(FluxmeshError):
    """Another process keeps the mesh's record to itself, and does not let go of it."""


@dataclass(frozen=True)
class Member:
    """One agent that was started."""

    rank: int  # of its host in the hostfile
    address: str  # "host:port" at which it listens
    key: str  # its public key
    boot: str  # of the start that was seen last
    state: str  # its state folder, on its own machine
    python: str  # the interpreter that runs it


@dataclass(frozen=True)
class MeshRecord:
    """A mesh that was brought up; `members` are fewer than the hosts after --allow-partial."""

    name: str  # the hostfile's path, or `THIS_NAME`
    text: str  # the hostfile's text
    members: tuple[Member, ...]
    envs: tuple[tuple[str, str], ...] = ()  # of the engines: the hostfile's, and those of --env
    roots: tuple[str, ...] = ()  # folders beside each host's own in which models may lie
    links: tuple[LinkInfo, ...] = ()  # as plain sockets measured them
    weights: ModelVariant | None = None  # that were loaded
    timings: Timings = Timings()  # of its rings and jobs
    faults: tuple[BackendFault, ...] = ()  # of backends, since it was brought up

    @property
    def hostfile(self) -> Hostfile:
        """With the ports that its agents have taken, and their addresses, where it names none.

        Raises `HostfileError`, where this version reads hostfiles more strictly.
        """
        taken = {each.rank: each.address.rpartition(":")[2] for each in self.members}
        ports = {rank: int(port) for rank, port in taken.items() if port.isdecimal()}
        hostfile = hostfiles.parse(self.text, self.name).at_ports(ports)
        agents = {m.rank: m.address.rpartition(":")[0].strip("[]") for m in self.members}
        return replace(hostfile, hosts=with_addresses(hostfile.hosts, agents))

    @property
    def fallback(self) -> Fallback:
        """What its rings form over where the hostfile's backend does not work."""
        # Of hosts without an agent (`up --allow-partial`) no ring is formed: they need no address.
        return Fallback(below(replace(self.hostfile, hosts=self.hosts)), self.faults)

    @property
    def backend_notes(self) -> list[str]:
        """A sentence for each ring whose backend failed."""
        first, fallback = self.hostfile.backend, self.fallback
        last = {fault.ranks: fault for fault in self.faults if fault.is_out}
        return [
            f"Hosts {', '.join(map(str, ranks))} go on over {fallback.backend(first, ranks)} until "
            f"the next `fluxmesh up`, since {fault.backend} failed: {fault.reason}"
            for ranks, fault in last.items()
        ]

    @property
    def hosts(self) -> tuple[Host, ...]:
        """The hosts that have an agent, in the order of `members`."""
        every = self.hostfile.hosts
        return tuple(every[member.rank] for member in self.members)

    @property
    def is_this_machine(self) -> bool:
        """Whether it is the mesh of one that needs no hostfile."""
        return self.name == THIS_NAME

    def member(self, rank: int) -> Member | None:
        return next((member for member in self.members if member.rank == rank), None)

    def ranks_of(self, names: Iterable[str]) -> list[int]:
        """The hosts that a user means by ranks or names. Raises `UsageError` for what is none."""
        ranks: list[int] = []
        for name in names:
            meant = [host.rank for host in self.hosts if name in (str(host.rank), host.name)]
            if not meant:
                every = ", ".join(f"{host.rank} ({host.name})" for host in self.hosts)
                raise UsageError(f"The mesh has no host {name!r}; it has {every}.")
            ranks += meant
        return ranks

    def with_member(self, member: Member) -> MeshRecord:
        """The same with that agent in the place of the one of its rank."""
        members = tuple(member if old.rank == member.rank else old for old in self.members)
        return replace(self, members=members)

    def only(self, ranks: Iterable[int]) -> MeshRecord:
        """Some of its agents."""
        kept = set(ranks)
        return replace(self, members=tuple(each for each in self.members if each.rank in kept))

    def to_json(self) -> str:
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> MeshRecord:
        """Raises `ValueError`, `TypeError` or `KeyError` for what `to_json` did not write."""
        data: dict[str, Any] = json.loads(text)
        if data.pop("version") != VERSION:
            raise ValueError("written by another version")
        weights = data.pop("weights")
        members = tuple(Member(**member) for member in data.pop("members"))
        if not members or not all(is_key(member.key) for member in members):
            raise ValueError("an agent without a key")
        return cls(
            members=members,
            envs=tuple((str(key), str(value)) for key, value in data.pop("envs")),
            roots=tuple(map(str, data.pop("roots"))),
            links=tuple(LinkInfo(**link) for link in data.pop("links")),
            weights=None if weights is None else _weights(weights),
            timings=_timings(data.pop("timings", {})),
            faults=tuple(map(_fault, data.pop("faults", ()))),
            **data,
        )


@dataclass(frozen=True)
class StartRecord:
    """An `up` that starts agents, until they are on the record of a mesh."""

    name: str  # of the hostfile, as a `MeshRecord` has it
    text: str

    @property
    def hostfile(self) -> Hostfile:
        """Raises `HostfileError`, where this version reads hostfiles more strictly."""
        return hostfiles.parse(self.text, self.name)


def _weights(data: dict[str, Any]) -> ModelVariant:
    adapters = tuple(AdapterRef(**adapter) for adapter in data.pop("adapters"))
    return ModelVariant(adapters=adapters, **data)


def _timings(data: dict[str, Any]) -> Timings:
    """None in what an older version wrote."""
    if not isinstance(data, dict):
        raise TypeError("timings that are no object")
    return Timings(
        tuple(_ring(ring) for ring in data.get("rings", ())),
        tuple(_job(job) for job in data.get("jobs", ())),
        tuple(_text(text) for text in data.get("texts", ())),
    )


def _fault(data: dict[str, Any]) -> BackendFault:
    return BackendFault(ranks=tuple(data.pop("ranks")), **data)


def _ring(data: dict[str, Any]) -> RingTiming:
    ranks, gathers, sums = (data.pop(name) for name in ("ranks", "gathers", "sums"))
    tables = [tuple(CollectiveTime(**row) for row in table) for table in (gathers, sums)]
    return RingTiming(ranks=tuple(ranks), gathers=tables[0], sums=tables[1], **data)


def _job(data: dict[str, Any]) -> JobTiming:
    ranks, measured, recent = data.pop("ranks"), data.pop("measured"), _recent(data)
    shares = Shares.from_plain(measured.pop("shares", {}))
    timing = StepTiming(shares=shares, **measured)
    return JobTiming(ranks=tuple(ranks), measured=timing, recent=recent, **data)


def _text(data: dict[str, Any]) -> TextTiming:
    return TextTiming(recent=_recent(data), **data)


def _recent(data: dict[str, Any]) -> Recent:
    """None where only averages were kept."""
    return tuple((str(name), tuple(map(float, each))) for name, each in data.pop("recent", ()))


def load(home: Home | None = None) -> MeshRecord | None:
    """The mesh that is up; None where there is none.

    Raises `FluxmeshError` where the file is damaged, `HomeError` where it is not the user's own.
    """
    path = _to_read(home).mesh
    try:
        text = read_private(path)
    except FileNotFoundError:
        return None
    try:
        return MeshRecord.from_json(text)
    except (ValueError, TypeError, KeyError, FluxmeshError) as error:
        raise FluxmeshError(
            f"{path} is not what fluxmesh wrote ({error}); run `fluxmesh up` with your hostfile "
            "again."
        ) from None


def stamp(home: Home | None = None) -> Hashable:
    """Another one than before where the file may tell something else than before; None: no file.

    Taken before a `load`, it says later whether another one is needed.
    """
    try:
        status = os.lstat(_to_read(home).mesh)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_ctime_ns, status.st_size


def _to_read(home: Home | None) -> Home:
    """A user whose home can't be written has no mesh, and can do what needs none."""
    return home or Home(home_folder())


def save(record: MeshRecord, home: Home | None = None) -> Path:
    """Writes the mesh that is up, in one piece. Raises `HomeError`, `RecordInUseError`."""
    home = home or Home.default()
    with _changing(home):
        return _write(record, home)


def remember_members(record: MeshRecord, home: Home | None = None) -> None:
    """Writes down which agents of a mesh run now, and leaves what others measured meanwhile.

    Does nothing where another mesh is up by now, or none. Raises as `load` and `save`.
    """
    home = home or Home.default()
    with _changing(home):
        known = load(home)
        if known is not None and known.text == record.text:
            _write(replace(record, timings=known.timings, faults=known.faults), home)


def learn(text: str, news: Iterable[Timings | BackendFault], home: Home | None = None) -> None:
    """Adds what was found out on the mesh of this hostfile, in this order, to what is known of it.

    Does nothing where another mesh is up by now, or none. Raises as `load` and `save`.
    """
    home = home or Home.default()
    with _changing(home):
        known = load(home)
        if known is None or known.text != text:
            return
        for each in news:
            if isinstance(each, BackendFault):
                known = replace(known, faults=known.fallback.noted(each).faults)
            else:
                known = replace(known, timings=learned(known.timings, each))
        _write(known, home)


def remove(home: Home | None = None) -> None:
    """Forgets the mesh; twice is harmless. Raises as `save`."""
    home = home or Home.default()
    with _changing(home):
        home.mesh.unlink(missing_ok=True)


def _write(record: MeshRecord, home: Home) -> Path:
    write_private(home.mesh, record.to_json())
    return home.mesh


@contextlib.contextmanager
def _changing(home: Home) -> Iterator[None]:
    """No other process changes the record as long as the block lasts.

    Else a server that adds what it measured would put back the mesh that `down` has ended, or the
    agents that `up` has replaced. Each needs it for milliseconds, but one that is stopped, or whose
    disk does not answer, keeps it.
    """
    path = home.folder / "mesh.lock"
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HomeError(f"{path} can't be used: {error.strerror or error}.") from None
    try:
        _wait_for(lock, path)
        yield
    finally:
        os.close(lock)


def _wait_for(lock: int, path: Path) -> None:
    pause, limit = DEADLINES.record
    deadline = time.monotonic() + limit
    with contextlib.suppress(OSError):  # a file system without locks
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RecordInUseError(
                        f"Another process holds {path}, perhaps a fluxmesh that was stopped with "
                        f"Ctrl-Z, and has not let go of it in {limit:.0f} s; end it, and try again."
                    ) from None
            time.sleep(pause)


def begin_start(record: StartRecord, home: Home | None = None) -> None:
    """Writes down whose agents are about to start. Raises `HomeError`."""
    write_private(_starting(home), json.dumps({"version": VERSION, **asdict(record)}) + "\n")


def unfinished(home: Home | None = None) -> StartRecord | None:
    """What an `up` that was killed began to start; None where there is none. Raises `HomeError`."""
    try:
        data = json.loads(read_private(_starting(_to_read(home))))
        record = StartRecord(name=str(data["name"]), text=str(data["text"]))
        return record if record.hostfile.hosts else None
    except (FileNotFoundError, ValueError, TypeError, KeyError, hostfiles.HostfileError):
        return None  # it was not even written


def end_start(home: Home | None = None) -> None:
    """The agents are on record, or ended; twice is harmless."""
    _starting(home).unlink(missing_ok=True)


def _starting(home: Home | None) -> Path:
    return (home or Home.default()).folder / "starting.json"
