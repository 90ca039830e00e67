"""`fluxmesh up`, without its screen: check, start, load, measure, remember.

    launch.py (ssh) ──► agents listen ──► warmup.py (weights, step times, links)

Each step asks all hosts side by side. What is done already is not done again, so that a second
`up` only looks. A host that fails is left out where the user allows it, else all of it stops; what
runs by then is on record, so that `up` again goes on and `down` ends it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from fluxmesh.cluster.hostfile import CONTROL_PORT, Host, Hostfile
from fluxmesh.cluster.snapshot import LinkInfo, ModelVariant, Timings
from fluxmesh.errors import FluxmeshError
from fluxmesh.storage.homes import Home
from fluxmesh.storage.keys import Keys, load_keys, store_keys
from fluxmesh_coordinator.agents import bootstrap, launch, mesh_file, remote
from fluxmesh_coordinator.agents.mesh_file import Member, MeshRecord
from fluxmesh_coordinator.agents.status import in_use, survey, with_agents
from fluxmesh_coordinator.deploy import checks, macos_checks
from fluxmesh_coordinator.deploy.checks import Finding

PORTS = 100  # that are tried for an agent of this machine, which others may use too


class Watcher(Protocol):
    """Whom `up` tells how it goes."""

    def stage(self, text: str) -> None:
        """What all hosts do now."""

    def note(self, text: str) -> None:
        """One sentence for people."""

    def failed(self, rank: int, text: str) -> None:
        """A host that is left out, and why."""

    def progress(self, rank: int, what: str, done: int, total: int) -> None:
        """Bytes, on one host."""

    def warmed(
        self, placement: str, ranks: Sequence[int], size: tuple[int, int], seconds: float
    ) -> None:
        """Pictures of this height and width find these hosts ready; it took `seconds`."""

    def may_pull(self, model: str, ranks: Sequence[int]) -> bool:
        """Whether these hosts may fetch a model that they lack."""


@dataclass(frozen=True)
class Wish:
    """What the user asks `up` for."""

    hostfile: Hostfile
    name: str  # the hostfile's path, or `record.THIS_NAME`
    text: str  # of the hostfile
    weights: ModelVariant
    envs: tuple[tuple[str, str], ...] = ()  # the hostfile's, then those of --env
    roots: tuple[str, ...] = ()
    allow_partial: bool = False
    rotate_keys: bool = False
    force: bool = False  # also where agents must be ended that somebody's job holds
    keep_ssh: bool = False  # of each host that ssh reaches, a connection as long as its agent


@dataclass
class Bringup:
    """One `fluxmesh up`."""

    wish: Wish
    watcher: Watcher
    home: Home = field(default_factory=Home.default)

    def run(self) -> MeshRecord:
        """The agents of the mesh, running and on record; weights are `warmup.py`'s.

        Raises `FluxmeshError`: `HostUnreachableError` where no host can be reached.
        """
        wish = self.wish
        old = mesh_file.load(self.home)
        keys = before = load_keys(self.home.folder, "client")
        for warning in wish.hostfile.warnings:
            self.watcher.note(warning)
        hosts, stay = self._check(wish.hostfile.hosts, before)
        if old is not None and not wish.force:
            self._must_be_free(old, stay)
        if wish.rotate_keys:
            keys = Keys.new()
        self.watcher.stage("Starting agents")
        forget = [before.public] if wish.rotate_keys else []

        def start(host: Host) -> launch.Started:
            spec = self._spec(host)
            return launch.start(
                host,
                spec,
                keys,
                rotate=wish.rotate_keys,
                forget=forget,
                keep_ssh=self._keeps(host),
            )

        started, errors = remote.each(hosts, start)
        if wish.rotate_keys and started:  # every agent that could be reached has the new key by now
            store_keys(self.home.folder, "client", keys)
        self._left_out(errors, bool(started))
        members = tuple(each.member for each in started.values())
        fresh = any(each.is_fresh for each in started.values())
        for rank, each in started.items():
            if each.kept:
                self.watcher.note(f"Host {rank} keeps the settings of {', '.join(each.kept)}.")
        if old is not None:
            self._retire(old, members)
        links: tuple[LinkInfo, ...] = ()
        timings = Timings()
        if old is not None and old.text == wish.text:
            timings = Timings(jobs=old.timings.jobs)
        if old is not None and not fresh and _same(old.members, members):
            links, timings = old.links, old.timings
        up = MeshRecord(
            name=wish.name,
            text=wish.text,
            members=members,
            envs=wish.envs,
            roots=wish.roots,
            links=links,
            weights=wish.weights,
            timings=timings,
        )
        mesh_file.save(up, self.home)
        return up

    # Before anything runs

    def _spec(self, host: Host) -> dict[str, Any]:
        wish = self.wish
        return launch.agent_spec(wish.hostfile, host.rank, wish.envs, wish.roots)

    def _keeps(self, host: Host) -> bool:
        return self.wish.keep_ssh and not host.is_local

    def _check(self, hosts: Sequence[Host], keys: Keys) -> tuple[list[Host], list[str]]:
        """The hosts that can take part, and the addresses of agents there that can stay.

        Raises `FluxmeshError` naming those that can't.
        """

        def wanted(host: Host) -> dict[str, Any]:
            spec, rotate = self._spec(host), self.wish.rotate_keys
            return launch.wanted(spec, keys, rotate=rotate, keep_ssh=self._keeps(host))

        self.watcher.stage("Looking at the hosts")
        looks, errors = look_at(self.wish.hostfile, self.wish.weights.model, wanted)
        self._left_out(errors, bool(looks))
        here = looks.pop(-1)
        lacking = [rank for rank, (look, _) in looks.items() if "problem" in look.get("model", {})]
        if lacking and self.watcher.may_pull(self.wish.weights.model, lacking):
            self._pull([hosts[rank] for rank in lacking])
            again, errors = look_at(self.wish.hostfile, self.wish.weights.model, wanted)
            self._left_out(errors, bool(again))
            here, looks = again.pop(-1), again
        bad: dict[int, FluxmeshError] = {}
        model = checks.reference(here[0], {rank: look for rank, (look, _) in looks.items()})
        for rank, (look, now) in looks.items():
            for finding in [
                *checks.findings(hosts[rank], look, here[0], now, model),
                *macos_checks.findings(hosts[rank], look, self.wish.hostfile.backend),
            ]:
                text = f"{remote.title(hosts[rank])}, {finding.check}: {finding.text}"
                if finding.level == "fail":
                    bad.setdefault(rank, FluxmeshError(text))
                elif finding.level == "warn":
                    self.watcher.note(text)
        good = [host for host in hosts if host.rank in looks and host.rank not in bad]
        self._left_out(bad, bool(good))
        seen = [looks[host.rank][0] for host in good]
        return good, [
            look["agent"]["endpoint"] for look in seen if look["agent"] and not look["ends"]
        ]

    def _must_be_free(self, old: MeshRecord, stay: Sequence[str]) -> None:
        """Raises `FluxmeshError` where an agent that has to end works for somebody."""
        ends = [member.rank for member in old.members if member.address not in stay]
        why_not = in_use(survey(old.only(ends), load_keys(self.home.folder, "client")))
        if why_not:
            raise FluxmeshError(f"This `up` would end agents. {why_not}")

    def _pull(self, hosts: Sequence[Host]) -> None:
        model = self.wish.weights.model
        self.watcher.stage(f"Fetching {model}")

        def pull(host: Host) -> None:
            def tell(report: dict[str, Any]) -> None:
                done, total = int(report["done_bytes"]), int(report["total_bytes"])
                self.watcher.progress(host.rank, f"fetching {model}", done, total)

            remote.ask(host, "pull", tell, model=model)

        _, errors = remote.each(hosts, pull)
        self._left_out(errors, True)

    def _left_out(self, errors: Mapping[int, FluxmeshError], others: bool) -> None:
        """Tells of hosts that failed. Raises unless the rest may go on without them."""
        leave_out(errors, others, self.watcher, allowed=self.wish.allow_partial)

    # Agents of the mesh before that are not in this one

    def _retire(self, old: MeshRecord, members: Sequence[Member]) -> None:
        kept = {member.address for member in members}
        gone = tuple(member for member in old.members if member.address not in kept)
        if not gone:
            return
        self.watcher.stage("Ending agents that the hostfile names no more")
        for error in take_down(replace(old, members=gone)).values():
            self.watcher.note(str(error))


def leave_out(
    errors: Mapping[int, FluxmeshError], others: bool, watcher: Watcher, *, allowed: bool
) -> None:
    """Tells of hosts that failed. Raises unless it is `allowed` to go on with `others`."""
    if not errors:
        return
    if allowed and others:
        for rank, error in errors.items():
            watcher.failed(rank, str(error))
        return
    reasons = " ".join(str(error) for error in errors.values())
    kinds = {type(error) for error in errors.values()}
    go_on = " `allow_partial` goes on without." if others else ""
    # One reason is told by its own kind, which has an exit code of its own.
    raise (kinds.pop() if len(kinds) == 1 and not others else FluxmeshError)(f"{reasons}{go_on}")


def this_machine(home: Home | None = None) -> str:
    """The text of the hostfile that stands for this machine alone, with a port that can be had.

    The one of the mesh that is up, where it is such a one; else a free port, or our own agent's.
    """
    up = mesh_file.load(home)
    if up is not None and up.is_this_machine:
        return up.text
    ports = range(CONTROL_PORT, CONTROL_PORT + PORTS)
    port = next((port for port in ports if _can_have(port)), CONTROL_PORT)
    host = {"ssh": "127.0.0.1", "ips": ["127.0.0.1"], "control": f"127.0.0.1:{port}"}
    return json.dumps([host])


def _can_have(port: int) -> bool:
    return bootstrap.can_bind("127.0.0.1", port) or bootstrap.Agent(port).running() is not None


def _same(old: Sequence[Member], new: Sequence[Member]) -> bool:
    return [(m.rank, m.address, m.key) for m in old] == [(m.rank, m.address, m.key) for m in new]


def look_at(
    hostfile: Hostfile,
    model: str | None,
    wanted: Callable[[Host], dict[str, Any]] = lambda host: {},
) -> tuple[dict[int, tuple[dict[str, Any], float]], dict[int, FluxmeshError]]:
    """(what the starter found on each host and when, errors), by rank; rank -1 is this machine.

    `wanted` is how an agent shall run.
    """

    def look(host: Host) -> tuple[dict[str, Any], float]:
        fields: dict[str, Any] = {"model": model, "models": host.models}
        if host.rank >= 0:
            fields |= {**launch.place_of(hostfile, host.rank), "ips": list(host.ips)}
            fields |= wanted(host)
        begin = time.time()
        return remote.ask(host, "look", **fields), (begin + time.time()) / 2

    return remote.each([Host(-1, "127.0.0.1"), *hostfile.hosts], look)


def examine(hostfile: Hostfile, model: str | None) -> list[Finding]:
    """Everything that `up` would find, for `doctor`; hosts that can't be reached among it."""
    looks, errors = look_at(hostfile, model)
    if -1 in errors:
        raise errors[-1]
    here = looks.pop(-1)[0]
    findings = [Finding(rank, "reached", "fail", str(error)) for rank, error in errors.items()]
    reference = checks.reference(here, {rank: look for rank, (look, _) in looks.items()})
    for rank, (look, now) in looks.items():
        way = "this machine" if hostfile.hosts[rank].is_local else "over ssh"
        findings.append(Finding(rank, "reached", "ok", f"{way}, {look['system']}"))
        findings += checks.findings(hostfile.hosts[rank], look, here, now, reference)
        findings += macos_checks.findings(hostfile.hosts[rank], look, hostfile.backend)
    return sorted(findings, key=lambda finding: finding.rank)


def take_down(mesh: MeshRecord, keys: Keys | None = None) -> dict[int, FluxmeshError]:
    """Ends the agents of a mesh: by the starter, or over the network where ssh does not reach.

    Returns errors by rank, of the agents that may still run.
    """
    from fluxmesh.wire import messages
    from fluxmesh_coordinator.agents.client import AgentClient

    hostfile = mesh.hostfile

    def stop(host: Host) -> None:
        remote.ask(host, "stop", port=hostfile.control(host.rank).port)

    errors = remote.each(mesh.hosts, stop)[1]
    if not errors:
        return {}

    async def end(client: AgentClient) -> None:
        await client.ask(messages.ShutDown(), messages.Done)

    ended, _ = with_agents(mesh.only(errors), end, keys)
    return {rank: error for rank, error in errors.items() if rank not in ended}
