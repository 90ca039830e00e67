"""`fluxmesh plan`: what `generate` would run where, what each other way would take, and why."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluxmesh_coordinator.cli.options import chosen, settings_options

if TYPE_CHECKING:
    from fluxmesh.cluster.snapshot import MeshView
    from fluxmesh.planning.plan import Option, Plan
    from fluxmesh_coordinator.agents.mesh_file import MeshRecord

_FILE = click.Path(path_type=Path)


@click.command()
@click.argument("prompt", required=False)
@click.option(
    "--placement",
    type=click.Choice(["data", "sequence", "tensor"]),
    help="Allow this one alone.",
)
@click.option("--force-shard", is_flag=True, help="All hosts of a ring work on each image.")
@click.option(
    "--hostfile", type=_FILE, metavar="FILE", help="Of a mesh that isn't up; needs --assume."
)
@click.option(
    "--assume", type=_FILE, metavar="FILE", help="What its hosts and links would measure."
)
@settings_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.pass_context
def plan(
    context: click.Context,
    prompt: str | None,
    placement: Any,
    force_shard: bool,
    hostfile: Path | None,
    assume: Path | None,
    as_json: bool,
    **_settings: Any,
) -> None:
    """Tell how the mesh that is up would do `generate` with these options, and why.

    The mesh is the one of `fluxmesh up`, else this machine alone. With --assume it is one that
    isn't there: hostfiles/README.md shows how.
    """
    from fluxmesh.errors import UsageError
    from fluxmesh.planning import plan as planner
    from fluxmesh.weights import hub
    from fluxmesh_coordinator.agents import mesh_file
    from fluxmesh_coordinator.commands.settings import Settings
    from fluxmesh_coordinator.deploy import what_if
    from fluxmesh_coordinator.jobs import remedies
    from fluxmesh_coordinator.runtime.adapter_upload import by_hash

    if (hostfile is None) != (assume is None):
        raise UsageError("--hostfile and --assume describe a mesh together; give both.")
    settings = Settings().with_chosen(chosen(context))
    if settings.image is not None:
        raise UsageError("plan looks at no picture; give --image-size instead of --image.")
    up = mesh_file.load() if hostfile is None else None
    loaded = up.weights if up else None
    default = loaded.model if loaded else None
    name, sizes, here = what_if.sizes_of(settings.model or default or hub.default_model())
    name = hub.full_name(name)  # as agents know it
    request = settings.as_loaded(loaded).request(
        prompt or "", 0, model=name, defaults=sizes.defaults
    )
    request = replace(request, adapters=by_hash(request.adapters)[0])
    if hostfile is not None and assume is not None:
        view = _assumed(hostfile, assume, request, sizes)
    else:
        view = _measured(up)
    found = planner.plan(request, view, sizes, placement=placement, force_shard=force_shard)
    if as_json:
        said = {**_as_json(found, view), "remedies": remedies.told(found.remedies)}
        click.echo(json.dumps(said, ensure_ascii=False))
    else:
        if not here:
            click.echo(f"{name} is not on this machine: planned with its published sizes.")
        _show(found, view)
        if found.remedies:
            click.echo(remedies.told(found.remedies))
    if found.winner is None:
        context.exit(4)


def _assumed(hostfile: Path, assume: Path, request: Any, sizes: Any) -> MeshView:
    from fluxmesh.cluster import hostfile as hostfiles
    from fluxmesh.planning.workload import Work
    from fluxmesh_coordinator.deploy import what_if

    work = Work.of(request, sizes)
    told = what_if.load_assumption(assume)
    return what_if.assumed_view(hostfiles.load(hostfile), told, work, work.weights)


def _measured(up: MeshRecord | None) -> MeshView:
    """The mesh that is up as it measured itself, or an agent that is started to be asked."""
    from fluxmesh_coordinator.agents.launch import start_ephemeral
    from fluxmesh_coordinator.agents.status import answering, survey

    if up is not None:
        return answering(survey(up)).view
    with start_ephemeral() as one:
        return answering(survey(one.record, one.keys)).view


def _show(found: Plan, view: MeshView) -> None:
    from rich.console import Console
    from rich.table import Table

    work = found.work
    kinds = sorted({host.kind for host in view.hosts})
    images = f"{work.images} image{'' if work.images == 1 else 's'}"
    table = Table(
        box=None,
        pad_edge=False,
        title_justify="left",
        title=f"{images} of {work.height}x{work.width}, {work.steps} steps with "
        f"{work.weights.model}, on {len(view.hosts)} x {', '.join(kinds)}",
    )
    headings = ("", "placement", "hosts", "time", "loading", "a step", "memory a host", "sends")
    for heading in headings:
        right = heading in ("time", "loading", "a step", "memory a host", "sends")
        table.add_column(heading, justify="right" if right else "left", no_wrap=True)
    table.add_column("", overflow="fold")
    for option in found.options:
        table.add_row(*_row(option, option is found.winner))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 140
    console.print(table)
    click.echo(found.reason)


def _row(option: Option, wins: bool) -> list[str]:
    hosts = ",".join(map(str, option.ranks))
    need = max(option.memory, key=lambda need: need.needed, default=None)
    memory = "" if need is None else f"{need.needed / 1e9:.1f} of {need.available / 1e9:.1f} GB"
    if option.problem:
        return ["", option.name, hosts, "", "", "", memory, "", option.problem]
    phases = option.phases
    steps = " + ".join(_seconds(phase.step_seconds) for phase in phases)
    sent = max(phase.sent_a_step for phase in phases)
    shares = " + ".join(f"{len(phase.images)} by {phase.placement}" for phase in phases)
    notes = [shares] if option.name == "mixed" else []
    notes += ["sharded"] if phases[0].layout == "sharded" else []
    notes += [] if option.measured else ["not measured at this size"]
    return [
        "*" if wins else "",
        option.name,
        hosts,
        _seconds(option.seconds),
        _seconds(option.load_seconds) if option.load_seconds else "",
        steps,
        memory,
        f"{sent / 1e9:.2f} GB/step" if sent >= 1e7 else f"{sent / 1e6:.2f} MB/step" if sent else "",
        ", ".join(notes),
    ]


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _as_json(found: Plan, view: MeshView) -> dict[str, Any]:
    work = found.work
    return {
        "event": "plan",
        "model": work.weights.model,
        "images": work.images,
        "height": work.height,
        "width": work.width,
        "steps": work.steps,
        "hosts": [{"rank": host.rank, "name": host.name, "kind": host.kind} for host in view.hosts],
        "winner": None if found.winner is None else found.options.index(found.winner),
        "reason": found.reason,
        "options": [
            {**asdict(option), "seconds": None if option.problem else option.seconds}
            for option in found.options
        ],
    }
