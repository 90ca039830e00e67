"""The mesh that is up, as this user's `mesh.json` keeps it between two commands.

`fluxmesh up` writes it once the agents run; `generate`, `status`, `logs`, `plan` and `down` read it
to know whom to talk to. It holds the hostfile's own text, so that a changed hostfile is noticed,
and of each agent its address and public key. No secret is in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fluxmesh.cluster import hostfile as hostfiles
from fluxmesh.cluster.hostfile import Host, Hostfile
from fluxmesh.cluster.snapshot import (
    CollectiveTime,
    JobTiming,
    LinkInfo,
    ModelVariant,
    RingTiming,
    StepTiming,
    Timings,
)
from fluxmesh.errors import FluxmeshError
from fluxmesh.planning.learning import learned
from fluxmesh.request import AdapterRef
from fluxmesh.storage.homes import Home, read_private, write_private
from fluxmesh.storage.keys import is_key

VERSION = 1
THIS_MACHINE = '[{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}]'
THIS_NAME = "this machine"


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

    @property
    def hostfile(self) -> Hostfile:
        """Raises `HostfileError`, where this version reads hostfiles more strictly."""
        return hostfiles.parse(self.text, self.name)

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
            **data,
        )


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
    )


def _ring(data: dict[str, Any]) -> RingTiming:
    ranks, gathers, sums = (data.pop(name) for name in ("ranks", "gathers", "sums"))
    tables = [tuple(CollectiveTime(**row) for row in table) for table in (gathers, sums)]
    return RingTiming(ranks=tuple(ranks), gathers=tables[0], sums=tables[1], **data)


def _job(data: dict[str, Any]) -> JobTiming:
    ranks, measured = data.pop("ranks"), StepTiming(**data.pop("measured"))
    return JobTiming(ranks=tuple(ranks), measured=measured, **data)


def load(home: Home | None = None) -> MeshRecord | None:
    """The mesh that is up; None where there is none.

    Raises `FluxmeshError` where the file is damaged, `HomeError` where it is not the user's own.
    """
    path = (home or Home.default()).mesh
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


def save(record: MeshRecord, home: Home | None = None) -> Path:
    """Writes the mesh that is up, in one piece. Raises `HomeError`."""
    path = (home or Home.default()).mesh
    write_private(path, record.to_json())
    return path


def learn(text: str, news: Timings, home: Home | None = None) -> None:
    """Adds what was measured on the mesh of this hostfile to what is known of it.

    Does nothing where another mesh is up by now. Raises as `load` and `save`.
    """
    known = load(home)
    if known is not None and known.text == text:
        save(replace(known, timings=learned(known.timings, news)), home)


def remove(home: Home | None = None) -> None:
    """Forgets the mesh; twice is harmless."""
    (home or Home.default()).mesh.unlink(missing_ok=True)
