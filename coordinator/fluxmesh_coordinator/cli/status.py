"""`fluxmesh status`: hosts, memory, models, jobs and queues of the mesh that is up."""

from __future__ import annotations

import time

import click

from fluxmesh.deadlines import DEADLINES

NO_MESH = "No mesh is up; `fluxmesh up` starts one."


@click.command()
@click.option("--watch", is_flag=True, help="Again each second, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, a line each with --watch.")
@click.pass_context
def status(context: click.Context, watch: bool, as_json: bool) -> None:
    """Tell how the mesh is: hosts, memory, model, job, queue.

    Exits 3 where no host answers.
    """
    from fluxmesh_coordinator.agents import mesh_file
    from fluxmesh_coordinator.agents.status import Survey, answering, survey
    from fluxmesh_coordinator.console import tables
    from fluxmesh_coordinator.console.json_lines import emit

    mesh = mesh_file.load()
    if mesh is None:
        if as_json:
            emit("status", mesh=None, hosts=[], links=[])
        else:
            click.echo(NO_MESH)
        return

    def tell(overview: Survey) -> None:
        if as_json:
            emit(**tables.as_json(overview))
        else:
            tables.show(overview)

    overview = survey(mesh)
    if not watch:
        tell(overview)
        answering(overview)
        return
    from rich.live import Live

    from fluxmesh_coordinator.console import terminal

    console = terminal.output()
    if as_json or not console.is_terminal:
        while True:
            tell(overview)
            time.sleep(DEADLINES.watch)
            overview = survey(mesh)
    with Live(tables.mesh_table(overview), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(DEADLINES.watch)
            live.update(tables.mesh_table(survey(mesh)), refresh=True)
