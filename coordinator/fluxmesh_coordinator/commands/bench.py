"""`fluxmesh bench`: what a step takes, by model, size and placement, and what was predicted.

Pictures are painted as `generate` paints them, by the mesh that is up or by an agent of this
machine that is started for it; nobody keeps them. Each way is gone twice: the first run loads,
forms its ring and compiles, the second one is measured; once more, where that had a host that the
first one had not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, get_args

from fluxmesh.cluster.hostfile import Host
from fluxmesh.cluster.snapshot import MeshView, Placement
from fluxmesh.errors import CancelledError, FluxmeshError, HostUnreachableError, UsageError
from fluxmesh.events import BackendChanged, Planned, Step
from fluxmesh.planning.plan import Option
from fluxmesh.planning.plan import plan as find_plan
from fluxmesh.request import GenerateRequest
from fluxmesh.wire.messages import Status
from fluxmesh_coordinator.agents import remote
from fluxmesh_coordinator.commands.generate import EMBEDDED, Painter, Spread
from fluxmesh_coordinator.commands.settings import GenerateSettings
from fluxmesh_coordinator.console.bench_table import BenchHost, BenchReport, BenchRow
from fluxmesh_coordinator.deploy import macos_checks
from fluxmesh_coordinator.runtime.resolved import Resolved

PROMPT = "a red apple on a yellow background"
STEPS = 4  # of each picture
SUSTAINED = 5.0  # seconds of steps from which on their growing slower says something of the chip
SLOWS_DOWN = ("power", "heat")  # findings of `doctor` that a table of times should tell

Size = tuple[int, int]  # height, width


class Bench:
    """Measures on the mesh of one painter."""

    def __init__(self, painter: Painter, steps: int = STEPS) -> None:
        self.painter, self.steps = painter, steps
        self._rows: list[BenchRow] = []

    def models(self) -> list[str]:
        """The embedded one, and what `generate` would take, if that is another.

        That may be a model which the mesh has loaded, or the best that is here.
        """
        best = self.painter.model(None, GenerateRequest(PROMPT, seed=0)).name
        return list(dict.fromkeys((EMBEDDED, best)))

    def rows(self, models: Sequence[str], sizes: Sequence[Size]) -> Iterator[BenchRow]:
        """A row as soon as it is measured; without `sizes` at each model's own size.

        Raises what `generate` does. What does not fit, or cannot be spread, is a row that says so.
        """
        for name in models:
            for size in sizes or (None,):
                for placement in get_args(Placement):
                    for row in self._measured(name, size, placement):
                        self._rows.append(row)
                        yield row

    def report(self) -> BenchReport:
        """Of the rows so far, with the machines that made them."""
        mesh = self.painter.mesh
        record, view = mesh.latest, mesh.view
        looks, _ = remote.each(record.hosts, _look)
        hosts = []
        for rank, status in mesh.status().items():
            if isinstance(status, Status):
                host = record.hostfile.hosts[rank]
                look = looks.get(rank, {})
                hosts.append(host_of(host, status, look, record.hostfile.backend))
        used = {row.hosts for row in self._rows if row.step is not None}
        rings = [ring for ring in view.timings.rings if ring.ranks in used]
        current = [ring for ring in rings if ring.backend == view.backend_of(ring.ranks)]
        return BenchReport(
            hosts=tuple(hosts),
            rows=tuple(self._rows),
            links=record.links,
            rings=tuple(current),
            notes=tuple(record.backend_notes),
        )

    # One way

    def _resolved(self, name: str, size: Size | None, images: int) -> Resolved:
        """The request as `generate` would make it of these options."""
        loaded = self.painter.record.weights if self.painter.record else None
        settings = GenerateSettings(n_images=images, image_size=size, steps=self.steps)
        if loaded is not None and loaded.model == name:
            settings = settings.as_loaded(loaded)
        request = settings.request(PROMPT, 0, model=name)
        return Resolved.of(request, self.painter.model(name, request)).complete()

    def _measured(self, name: str, size: Size | None, placement: Placement) -> list[BenchRow]:
        view = self._view()
        if placement != "data" and len(view.hosts) < 2:
            return []
        images = len(view.hosts) if placement == "data" else 1
        resolved = self._resolved(name, size, images)
        request, sizes = resolved.request, resolved.model.sizes
        row = BenchRow(
            model=name,
            weights=f"{request.bits} bits" if request.bits else request.dtype,
            height=request.height,
            width=request.width,
            placement=placement,
            hosts=view.ranks,
        )
        before = find_plan(request, view, sizes, placement=placement)
        if before.winner is None:
            ways = [each for each in before.options if each.name == placement and each.problem]
            problems = dict.fromkeys(each.problem for each in ways)
            # Not `reason`, which says to a user what he has asked for.
            return [replace(row, problem="; ".join(problems) or before.reason)]
        self.painter.reporter.note(
            f"{name} at {request.height}x{request.width} by {placement}: a first picture, then "
            "one that is measured."
        )
        first = self._run(resolved, placement)
        warm = set(first.steps)
        while True:
            again = find_plan(request, self._view(), sizes, placement=placement).winner
            run = self._run(resolved, placement)
            if warm.issuperset(run.steps):
                break
            warm |= set(run.steps)  # who came free for the first time has loaded and compiled
        row = replace(
            row,
            predicted_picture=None if again is None else again.seconds,
            picture=run.seconds,
            first_picture=first.seconds,
        )
        if run.placement != placement:  # hosts were lost meanwhile
            return [replace(row, problem=f"it was made by {run.placement} in the end")]
        if not run.steps:  # a host was lost when all were made
            return [replace(row, problem="a host was lost meanwhile")]
        if placement != "data":
            phase = before.winner.phases[0]
            steps = max(run.steps.values(), key=len)  # one of a ring tells of them
            return [
                replace(
                    row,
                    hosts=run.hosts,
                    predicted_step=phase.step_seconds,
                    predicted_from=phase.figure,
                    step=statistics.median(steps),
                    slower=slower(steps),
                )
            ]
        rows = []
        for rank, steps in sorted(run.steps.items()):
            alone = self._alone(resolved, view, rank)
            rows.append(
                replace(
                    row,
                    hosts=(rank,),
                    predicted_step=None if alone is None else alone.phases[0].step_seconds,
                    predicted_from="" if alone is None else alone.phases[0].figure,
                    step=statistics.median(steps),
                    slower=slower(steps),
                )
            )
        return rows

    def _view(self) -> MeshView:
        """The hosts that answer. Raises `HostUnreachableError` where none does."""
        mesh = self.painter.mesh
        view = mesh.view
        if not view.hosts:
            reasons = (each for each in mesh.status().values() if isinstance(each, str))
            why = next(reasons, "ask again.")
            raise HostUnreachableError(f"No host of {mesh.record.name} answers: {why}")
        return view

    def _alone(self, resolved: Resolved, view: MeshView, rank: int) -> Option | None:
        """A host by itself, as the planner saw it before."""
        host = replace(view, hosts=(view.host(rank),))
        request = replace(resolved.request, n_images=1)
        return find_plan(request, host, resolved.model.sizes, placement="data").winner

    def _run(self, resolved: Resolved, placement: Placement) -> _Run:
        reporter, model = self.painter.reporter, resolved.model
        reporter.started(resolved.request, {"name": model.name, "revision": model.revision})
        run, begun = _Run(), time.monotonic()
        with closing(self.painter.start(resolved, Spread(placement))) as events:
            for event in events:
                reporter.event(event)
                run.hear(event)
        run.seconds = time.monotonic() - begun
        return run


class _Run:
    """What one request took."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.placement = ""
        self.hosts: tuple[int, ...] = ()
        self.steps: dict[int, list[float]] = {}  # seconds, by the host that told of them

    def hear(self, event: object) -> None:
        match event:
            case Planned():
                self.placement, self.hosts = event.placement, event.hosts
                self.steps.clear()  # what is made in another way is no part of this one
            case BackendChanged():
                self.steps.clear()
            case Step():
                self.steps.setdefault(event.host or 0, []).append(event.seconds)


def slower(steps: Sequence[float]) -> float:
    """How many times as long the last half of some steps took as the first.

    1 where all of them are over in a moment: no chip grows hot in that.
    """
    half = len(steps) // 2
    if not half or sum(steps) < SUSTAINED:
        return 1.0
    return statistics.median(steps[-half:]) / statistics.median(steps[:half])


def _look(host: Host) -> dict[str, Any]:
    """What `doctor` would see of a host; nothing where ssh does not lead there."""
    try:
        return remote.ask(host, "look", model=None, models=host.models)
    except CancelledError:
        raise
    except FluxmeshError:
        return {}


def host_of(host: Host, status: Status, look: Mapping[str, Any], backend: str) -> BenchHost:
    """A host as the table names it; `look` is what the starter found there, if it could."""
    mac = look.get("mac") or {}
    system = f"macOS {mac['version']}" if mac.get("version") else look.get("system", "")
    findings = macos_checks.findings(host, look, backend) if look else []
    return BenchHost(
        rank=host.rank,
        name=status.name,
        chip=status.kind,
        memory_bytes=status.machine_bytes,
        mlx_version=status.mlx_version,
        system=system,
        remarks=tuple(each.text for each in findings if each.check in SLOWS_DOWN),
    )


def check_steps(steps: int) -> None:
    """Raises `UsageError` for so few steps that none could be compared with another."""
    if steps < 1:
        raise UsageError.about("steps", f"is {steps}", "it must be at least 1")
