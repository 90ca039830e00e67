"""`fluxmesh plan`: what `generate` would run where, what each other way would take, and why."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluxmesh_coordinator.cli.parameters.options import (
    ConfigurableCommand,
    painting_settings,
    settings_options,
)
from fluxmesh_coordinator.cli.parameters.types import UserPath

if TYPE_CHECKING:
    from fluxmesh.cluster.snapshot import MeshView
    from fluxmesh.planning.workload import ModelSizes
    from fluxmesh.request import FilledRequest
    from fluxmesh_coordinator.agents.mesh_file import MeshRecord

_FILE = UserPath(path_type=Path)


@click.command(cls=ConfigurableCommand, short_help="Show how `generate` would run, and why.")
@click.argument("words", metavar="[PROMPT]", nargs=-1)
@click.option(
    "--placement",
    type=click.Choice(["data", "sequence", "tensor"]),
    help="Consider only this placement.",
)
@click.option("--force-shard", is_flag=True, help="All hosts of a ring work on each image.")
@click.option(
    "--hostfile",
    type=_FILE,
    metavar="FILE",
    help="Plan for these hosts, which need not be up; needs --assume.",
)
@click.option(
    "--assume", type=_FILE, metavar="FILE", help="How fast these hosts and their links would be."
)
@settings_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.pass_context
def plan(
    context: click.Context,
    words: tuple[str, ...],
    placement: Any,
    force_shard: bool,
    hostfile: Path | None,
    assume: Path | None,
    as_json: bool,
    **_settings: Any,
) -> None:
    """Show how `generate` would run with these options, and why. Nothing is painted.

    Each placement is listed with its predicted time, its last measured step and how old that is.

    It is planned for the mesh that `fluxmesh up` started, else for this machine. With --hostfile
    and --assume, for a mesh that does not exist: hostfiles/README.md shows how.
    """
    from fluxmesh.errors import UsageError
    from fluxmesh.planning import plan as planner
    from fluxmesh_coordinator.agents import mesh_file
    from fluxmesh_coordinator.cli.parameters.prompts import only_prompt
    from fluxmesh_coordinator.commands.generate import read_conditions
    from fluxmesh_coordinator.console import plan_table
    from fluxmesh_coordinator.console.json_lines import emit
    from fluxmesh_coordinator.console.option_names import in_options
    from fluxmesh_coordinator.jobs import remedies
    from fluxmesh_coordinator.runtime.default_model import as_measured, default_model
    from fluxmesh_coordinator.runtime.resolved import Resolved, ResolvedModel

    if (hostfile is None) != (assume is None):
        raise UsageError("--hostfile and --assume describe a mesh together; give both.")
    planner.check_asked(placement, force_shard=force_shard)
    prompt = only_prompt(words, "plan")
    settings = painting_settings(context)
    if settings.image is not None:
        raise UsageError("plan looks at no picture; give --image-size instead of --image.")
    up = mesh_file.load() if hostfile is None else None
    loaded = up.weights if up else None
    default = loaded.model if loaded else None
    name = default if settings.model is None else settings.model
    references, control, _ = read_conditions(settings)
    asked = settings.as_loaded(loaded).request(
        prompt or "", 0, references=references, control=control
    )
    view_of: Callable[[FilledRequest, ModelSizes], MeshView] | None = None
    if hostfile is not None and assume is not None:
        view_of = partial(_assumed, hostfile, assume)
    if up is not None and not up.is_this_machine:
        view_of = as_measured(_measured(up))
    if name is None:
        standing_in = default_model(asked, view_of)
        model = ResolvedModel.of(standing_in.checkpoint)
    else:
        standing_in, model = None, ResolvedModel.known(name)
    resolved = Resolved.of(asked, model)
    request, sizes = resolved.request, resolved.model.sizes
    view = _measured(up) if view_of is None else view_of(request, sizes)
    plan = planner.plan(request, view, sizes, placement=placement, force_shard=force_shard)
    now = time.time()
    if as_json:
        said = plan_table.as_json(plan, view, now)
        said["remedies"] = remedies.sentences(plan.remedies)
        emit(**said)
    else:
        if standing_in is not None:
            click.echo(in_options(standing_in.sentence))
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
