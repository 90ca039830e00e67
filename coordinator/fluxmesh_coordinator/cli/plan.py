"""`fluxmesh plan`: what `generate` would run where, what each other way would take, and why."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluxmesh_coordinator.cli.options import chosen, settings_options

if TYPE_CHECKING:
    from fluxmesh.cluster.snapshot import MeshView
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

    Each way has its predicted time, beside the step that was measured last and how long ago.

    The mesh is the one of `fluxmesh up`, else this machine alone. With --assume it is one that
    isn't there: hostfiles/README.md shows how.
    """
    from fluxmesh.errors import UsageError
    from fluxmesh.planning import plan as planner
    from fluxmesh.weights import hub
    from fluxmesh_coordinator.agents import mesh_file
    from fluxmesh_coordinator.commands.settings import GenerateSettings
    from fluxmesh_coordinator.console import plan_table
    from fluxmesh_coordinator.console.json_lines import emit
    from fluxmesh_coordinator.console.option_names import in_options
    from fluxmesh_coordinator.jobs import remedies
    from fluxmesh_coordinator.runtime.resolved import Resolved, ResolvedModel

    if (hostfile is None) != (assume is None):
        raise UsageError("--hostfile and --assume describe a mesh together; give both.")
    settings = GenerateSettings().with_chosen(chosen(context))
    if settings.image is not None:
        raise UsageError("plan looks at no picture; give --image-size instead of --image.")
    up = mesh_file.load() if hostfile is None else None
    loaded = up.weights if up else None
    default = loaded.model if loaded else None
    model = ResolvedModel.known(settings.model or default or hub.default_model())
    asked = settings.as_loaded(loaded).request(prompt or "", 0)
    request, sizes = Resolved.of(asked, model).request, model.sizes
    if hostfile is not None and assume is not None:
        view = _assumed(hostfile, assume, request, sizes)
    else:
        view = _measured(up)
    plan = planner.plan(request, view, sizes, placement=placement, force_shard=force_shard)
    now = time.time()
    if as_json:
        said = plan_table.as_json(plan, view, now)
        said["remedies"] = remedies.sentences(plan.remedies)
        emit(**said)
    else:
        if not model.is_here:
            click.echo(f"{model.name} is not on this machine: planned with its published sizes.")
        plan_table.show(plan, view, now)
        if plan.remedies:
            click.echo(in_options(remedies.sentences(plan.remedies)))
    if plan.winner is None:
        context.exit(4)


def _assumed(hostfile: Path, assume: Path, request: Any, sizes: Any) -> MeshView:
    from fluxmesh.cluster import hostfile as hostfiles
    from fluxmesh.planning.workload import Workload
    from fluxmesh_coordinator.deploy import what_if

    work = Workload.of(request, sizes)
    assumption = what_if.load_assumption(assume)
    return what_if.assumed_view(hostfiles.load(hostfile), assumption, work, work.weights)


def _measured(up: MeshRecord | None) -> MeshView:
    """The mesh that is up as it measured itself, or an agent that is started to be asked."""
    from fluxmesh_coordinator.agents.launch import start_ephemeral
    from fluxmesh_coordinator.agents.status import answering, survey

    if up is not None:
        return answering(survey(up)).view
    with start_ephemeral() as ephemeral:
        return answering(survey(ephemeral.record, ephemeral.keys)).view
