"""`fluxmesh up`, without its screen: check, start, load, measure, remember.

    launch.py (ssh) ──► agents listen ──► warmup.py (weights, step times, links)

Each step asks all hosts side by side. What is done already is not done again, so that a second
`up` only looks. A host that fails is left out where the user allows it, else all of it stops. Once
all agents run they are on record, so that `up` again goes on and `down` ends it; before that, and
wherever Ctrl-C comes, those that this `up` has started are ended (`started_agents.py`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from fluxmesh.cluster.hostfile import Host, Hostfile
from fluxmesh.cluster.snapshot import LinkInfo, ModelVariant, Timings
from fluxmesh.errors import CancelledError, FluxmeshError, ModelNotFoundError
from fluxmesh.storage import interrupts
from fluxmesh.storage.homes import Home
from fluxmesh.storage.keys import Keys, load_keys, store_keys
from fluxmesh_coordinator.agents import launch, mesh_file, remote
from fluxmesh_coordinator.agents.mesh_file import (
    THIS_MACHINE,
    THIS_NAME,
    Member,
    MeshRecord,
    StartRecord,
)
from fluxmesh_coordinator.agents.status import in_use, survey, with_agents
from fluxmesh_coordinator.deploy import checks, macos_checks
from fluxmesh_coordinator.deploy.checks import Finding
from fluxmesh_coordinator.deploy.model_offer import PushOffer, push_offer
from fluxmesh_coordinator.deploy.model_push import Arrived, push_model
from fluxmesh_coordinator.deploy.started_agents import StartedAgents, end_left, place

Look = tuple[dict[str, Any], float]  # what the starter found on a host, and when


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

    def may_pull(self, model: str, nbytes: int | None, free: Mapping[int, int]) -> bool:
        """Whether hosts may fetch a model that they lack; -1 is this machine.

        `nbytes` are the model's, None where the Hub does not tell; `free` what is left on the
        disk of each of them, by rank.
        """

    def may_end(self, names: Sequence[str]) -> bool:
        """Whether these hosts, which the wish does not name, may lose their agents."""

    def may_push(self, offer: PushOffer) -> bool:
        """Whether hosts may get a model that they lack from who has it."""


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
    _started: StartedAgents | None = field(default=None, init=False)
    _copies: tuple[int, ...] = field(default=(), init=False)  # ranks that get the model of another

    @contextmanager
    def undone_if_cancelled(self) -> Iterator[None]:
        """Ctrl-C in the block ends the agents that were started; raises `CancelledError`."""
        try:
            yield
        except BaseException as error:
            try:
                # What is written to a terminal that closes may fail before the signal is heard.
                is_cancelled = isinstance(error, KeyboardInterrupt) or interrupts.happened()
            except KeyboardInterrupt:
                is_cancelled = True
            if not is_cancelled:
                raise
            raise CancelledError(f"Cancelled{self._undone()}") from None

    def _undone(self) -> str:
        """Ends what was started; how that went, as the end of a sentence and more."""
        if self._started is None:
            return "."
        with suppress(OSError):  # nobody reads it any more
            self.watcher.stage("Ending what was started")
        ended, errors = self._started.undo()
        what = "the agent" if ended == 1 else f"the {ended} agents"
        is_or_are = "is" if ended == 1 else "are"
        done = f": {what} that this `up` had started {is_or_are} ended." if ended else "."
        left = [f"{error} `fluxmesh down` ends its agent." for error in errors.values()]
        return " ".join([done, *left])

    def run(self) -> MeshRecord:
        """The agents of the mesh, running and on record; weights are `warmup.py`'s.

        Raises `FluxmeshError`: `HostUnreachableError` where no host can be reached.
        """
        wish = self.wish
        old, left = mesh_file.load(self.home), mesh_file.unfinished(self.home)
        keys = before = load_keys(self.home.folder, "client")
        for warning in wish.hostfile.warnings:
            self.watcher.note(warning)
        links = old.links if old is not None and old.text == wish.text else ()
        hosts, stay = self._check(wish.hostfile.hosts, before, links)
        if old is not None and not wish.force:
            self._must_be_free(old, stay)
            self._may_end(old, stay)
        if wish.rotate_keys:
            keys = Keys.new()
        self.watcher.stage("Starting agents")
        forget = [before.public] if wish.rotate_keys else []

        beginning = StartRecord(wish.name, wish.text)
        self._started = mine = StartedAgents(beginning, self.home)

        def start(host: Host) -> launch.Started:
            spec = self._spec(host)
            return launch.start(
                host,
                spec,
                keys,
                rotate=wish.rotate_keys,
                forget=forget,
                asker=mine.asker,
                keep_ssh=self._keeps(host),
            )

        mine.begin(hosts)
        started, errors = remote.each(hosts, start)
        if wish.rotate_keys and started:  # every agent that could be reached has the new key by now
            store_keys(self.home.folder, "client", keys)
        try:
            self._left_out(errors, bool(started))
        except FluxmeshError:
            self._undone()
            raise
        members = tuple(each.member for each in started.values())
        fresh = any(each.is_fresh for each in started.values())
        for rank, each in started.items():
            if each.kept:
                self.watcher.note(f"Host {rank} keeps the settings of {', '.join(each.kept)}.")
        if old is not None:
            self._retire(old, members)
        if left is not None:
            self._end_left(left, members)
        links = ()
        timings = Timings()
        if old is not None and old.text == wish.text:
            timings = Timings(jobs=old.timings.jobs)
            self._try_backends_again(old)
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
        mine.done()
        self._copy(up, keys)
        return up

    # Before anything runs

    def _spec(self, host: Host) -> dict[str, Any]:
        wish = self.wish
        return launch.agent_spec(wish.hostfile, host.rank, wish.envs, wish.roots)

    def _keeps(self, host: Host) -> bool:
        return self.wish.keep_ssh and not host.is_local

    def _check(
        self, hosts: Sequence[Host], keys: Keys, links: Sequence[LinkInfo]
    ) -> tuple[list[Host], list[str]]:
        """The hosts that can take part, and the addresses of agents there that can stay.

        `links` are what is known of them. Raises `FluxmeshError` naming hosts that can't.
        """

        def wanted(host: Host) -> dict[str, Any]:
            spec, rotate = self._spec(host), self.wish.rotate_keys
            return launch.wanted(spec, keys, rotate=rotate, keep_ssh=self._keeps(host))

        self.watcher.stage("Looking at the hosts")
        looks, errors = look_at(self.wish.hostfile, self.wish.weights.model, wanted)
        if -1 in errors:
            raise errors[-1]
        self._left_out(errors, bool(looks))
        here = looks.pop(-1)
        # What no download mends comes before the question whether to fetch 30 GB.
        others = [each for each in self._findings(hosts, looks, here[0]) if each.check != "model"]
        sound = self._without_failures(hosts, looks, others)
        looks = {host.rank: looks[host.rank] for host in sound}
        known = {rank: look for rank, (look, _) in looks.items()}
        offer = push_offer(self.wish.weights.model, here[0], known, links)
        if offer is not None and self.watcher.may_push(offer):
            self._copies, offer = offer.ranks, None
        seen_by = {-1: here[0], **known}
        lacking = [
            rank
            for rank, each in seen_by.items()
            if each.get("model", {}).get("is_fetchable") and rank not in self._copies
        ]
        if lacking and self._may_pull({rank: seen_by[rank] for rank in lacking}):
            self._pull([Host(-1, "127.0.0.1") if rank < 0 else hosts[rank] for rank in lacking])
            again, errors = look_at(self.wish.hostfile, self.wish.weights.model, wanted)
            self._left_out(errors, bool(again))
            here = again.pop(-1)
            looks = {rank: look for rank, look in again.items() if rank in looks}
        if "problem" in here[0].get("model", {}):  # this machine plans with it
            raise ModelNotFoundError(str(here[0]["model"]["problem"]))
        models = [
            with_offer(each, offer)
            for each in self._findings(hosts, looks, here[0])
            if each.check == "model" and each.rank not in self._copies
        ]
        good = self._without_failures(hosts, looks, models)
        seen = [looks[host.rank][0] for host in good]
        return good, [
            look["agent"]["endpoint"] for look in seen if look["agent"] and not look["ends"]
        ]

    def _may_end(self, old: MeshRecord, stay: Sequence[str]) -> None:
        """Hosts that nobody named lose their agents only where the user says so."""
        if self.wish.name != THIS_NAME or old.is_this_machine:
            return  # a hostfile that leaves them out says it
        rest = [m.rank for m in old.members if m.address not in stay]
        names = [host.name for host in old.only(rest).hosts]
        if names and not self.watcher.may_end(names):
            raise FluxmeshError(
                f"This `up` would end the agents of {', '.join(names)}, of the mesh that is up "
                f"({old.name}); `force` does, or give a hostfile."
            )

    def _findings(
        self, hosts: Sequence[Host], looks: Mapping[int, Look], here: Mapping[str, Any]
    ) -> list[Finding]:
        """All about these hosts; `here` is the look at this machine."""
        model = checks.reference(here, {rank: look for rank, (look, _) in looks.items()})
        findings: list[Finding] = []
        for rank, (look, now) in looks.items():
            findings += checks.findings(hosts[rank], look, here, now, model)
            findings += macos_checks.findings(hosts[rank], look, self.wish.hostfile.backend)
        return findings

    def _without_failures(
        self, hosts: Sequence[Host], looks: Mapping[int, Look], findings: Sequence[Finding]
    ) -> list[Host]:
        """The hosts that take part; warnings are told. Raises `FluxmeshError` naming the others."""
        bad: dict[int, FluxmeshError] = {}
        for finding in findings:
            if finding.level == "warn":
                self.watcher.note(_sentence(hosts, finding))
            elif finding.level == "fail":
                bad.setdefault(finding.rank, FluxmeshError(_sentence(hosts, finding)))
        good = [host for host in hosts if host.rank in looks and host.rank not in bad]
        self._left_out(bad, bool(good))
        return good

    def _must_be_free(self, old: MeshRecord, stay: Sequence[str]) -> None:
        """Raises `FluxmeshError` where an agent that has to end works for somebody."""
        ends = [member.rank for member in old.members if member.address not in stay]
        why_not = in_use(survey(old.only(ends), load_keys(self.home.folder, "client")))
        if why_not:
            raise FluxmeshError(f"This `up` would end agents. {why_not}")

    def _may_pull(self, looks: Mapping[int, Mapping[str, Any]]) -> bool:
        """Asks for a download once the hosts are known to answer, and to lack nothing else."""
        from fluxmesh.weights import hub

        model = self.wish.weights.model
        free = {rank: int(look["hub_free_bytes"]) for rank, look in looks.items()}
        if notice := hub.notice_of(model):
            self.watcher.note(notice)
        return self.watcher.may_pull(model, hub.download_bytes(model), free)

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

    def _copy(self, mesh: MeshRecord, keys: Keys) -> None:
        """The hosts that lack the model get it from one that has it. Raises as `_left_out`."""
        ranks = [member.rank for member in mesh.members if member.rank in self._copies]
        if not ranks:
            return
        model = self.wish.weights.model
        self.watcher.stage(f"Copying {model}")
        copying = _Copying(self.watcher, model)
        _, errors = push_model(mesh, model, copying, ranks, keys)
        self._left_out(errors, len(errors) < len(mesh.members))

    def _left_out(self, errors: Mapping[int, FluxmeshError], others: bool) -> None:
        """Tells of hosts that failed. Raises unless the rest may go on without them."""
        leave_out(errors, others, self.watcher, allowed=self.wish.allow_partial)

    # Agents of the mesh before that are not in this one

    def _try_backends_again(self, old: MeshRecord) -> None:
        """Tells of the backends that failed since the last `up`: the record that comes has none."""
        for fault in old.faults:
            if fault.is_out:
                self.watcher.note(
                    f"{fault.backend} is tried again on hosts {', '.join(map(str, fault.ranks))}, "
                    f"where it had failed: {fault.reason}"
                )

    def _end_left(self, left: StartRecord, members: Sequence[Member]) -> None:
        """What an `up` that was killed has left, unless it belongs to this mesh."""
        hosts = self.wish.hostfile.hosts
        ours = {place(hosts[m.rank], int(m.address.rpartition(":")[2])) for m in members}
        errors = end_left(left, ours)[1]
        for error in errors.values():
            self.watcher.note(str(error))

    def _retire(self, old: MeshRecord, members: Sequence[Member]) -> None:
        kept = {member.address for member in members}
        gone = tuple(member for member in old.members if member.address not in kept)
        if not gone:
            return
        self.watcher.stage("Ending agents that the hostfile names no more")
        for error in take_down(replace(old, members=gone)).values():
            self.watcher.note(str(error))


def _sentence(hosts: Sequence[Host], finding: Finding) -> str:
    return f"{remote.title(hosts[finding.rank])}, {finding.check}: {finding.text}"


def with_offer(finding: Finding, offer: PushOffer | None) -> Finding:
    """What is told of a model that a host lacks, where another host could give it."""
    if offer is None or finding.level == "ok" or finding.rank not in offer.ranks:
        return finding
    return replace(finding, text=f"{finding.text} It is {offer.where}: `push` copies it.")


@dataclass(frozen=True)
class _Copying:
    """A push, as who watches an `up` hears of it."""

    watcher: Watcher
    model: str

    def progress(self, rank: int, _what: str, done: int, total: int) -> None:
        self.watcher.progress(rank, f"copying {self.model}", done, total)

    def note(self, text: str) -> None:
        self.watcher.note(text)

    def failed(self, rank: int, text: str) -> None:
        """`leave_out` tells it."""

    def arrived(self, push: Arrived) -> None:
        rate = push.nbytes / max(push.seconds, 1e-3) / 1e9
        self.watcher.note(f"Host {push.rank} has {self.model}; it came at {rate:.2f} GB/s.")


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


def this_machine(home: Home | None = None, agents: int | None = None) -> str:
    """The text of the hostfile of this machine alone, with so many agents.

    That of the mesh that is up, where it is such a one and has as many, or nobody says how many.
    """
    up = mesh_file.load(home)
    if up is not None and up.is_this_machine and agents in (None, len(up.hostfile.hosts)):
        return up.text
    return json.dumps(json.loads(THIS_MACHINE) * (agents or 1))


def _same(old: Sequence[Member], new: Sequence[Member]) -> bool:
    return [(m.rank, m.address, m.key) for m in old] == [(m.rank, m.address, m.key) for m in new]


def look_at(
    hostfile: Hostfile,
    model: str | None,
    wanted: Callable[[Host], dict[str, Any]] = lambda host: {},
) -> tuple[dict[int, Look], dict[int, FluxmeshError]]:
    """(what the starter found on each host and when, errors), by rank; rank -1 is this machine.

    `wanted` is how an agent shall run.
    """

    def look(host: Host) -> Look:
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
