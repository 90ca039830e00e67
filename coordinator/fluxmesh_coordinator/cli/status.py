"""`fluxmesh status`: hosts, memory, models, jobs and queues of the mesh that is up."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from fluxmesh.deadlines import DEADLINES
from fluxmesh.errors import CancelledError

if TYPE_CHECKING:
    from fluxmesh_coordinator.agents.status import Survey

NO_MESH = "No mesh is up; `fluxmesh up` starts one."


@click.command()
@click.option("--watch", is_flag=True, help="Again each second, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, a line each with --watch.")
def status(watch: bool, as_json: bool) -> None:
    """Tell how the mesh is: hosts, memory, model, job, queue.

    One row a host: who works there, at what, how far it is and how long it still takes; free
    memory; the weights it holds, and what a step of these took last. A terminal that is too narrow
    leaves out, in this order, link, the step's size, device, job, the user's machine, how much
    memory there is in all, step, user, time left, free memory, the weights.

    Exits 3 where no host answers.
    """
    from fluxmesh_coordinator.agents.status import answering
    from fluxmesh_coordinator.console import terminal

    if watch and not as_json and terminal.output().is_terminal:
        _watch()
        return
    while True:
        overview = _look()
        _tell(overview, as_json)
        if not watch:
            if overview is not None:
                answering(overview)
            return
        time.sleep(DEADLINES.watch)


def _look() -> Survey | None:
    """The mesh that is up now; None: there is none."""
    from fluxmesh_coordinator.agents import mesh_file
    from fluxmesh_coordinator.agents.status import survey

    mesh = mesh_file.load()
    return None if mesh is None else survey(mesh)


def _tell(overview: Survey | None, as_json: bool) -> None:
    from fluxmesh_coordinator.console import tables
    from fluxmesh_coordinator.console.json_lines import emit

    if overview is None:
        if as_json:
            nothing: dict[str, object] = {"mesh": None, "backend": None, "backend_faults": []}
            emit("status", **nothing, hosts=[], links=[], server=_server())
        else:
            click.echo(NO_MESH)
    elif as_json:
        emit(**tables.as_json(overview), server=_server())
    else:
        tables.show(overview)
    if not as_json:
        for row in server_rows():
            click.echo(row)


def _server() -> dict[str, object] | None:
    """The same for programs."""
    from fluxmesh_coordinator.server import running_server

    server = running_server.line()
    return None if server is None else {"url": server[0], "queue": server[1]}


def server_rows() -> list[str]:
    """The line of this user's server, a row a job; nothing where no server runs."""
    from fluxmesh.planning.plan import spoken
    from fluxmesh_coordinator.server import running_server

    server = running_server.line()
    if server is None:
        return []
    url, jobs = server
    rows = [f"Server {url}: {len(jobs) or 'no'} job{'' if len(jobs) == 1 else 's'}."]
    for job in jobs:
        place = f"place {job['place']}" if job["place"] else f"{job['progress']:.0%} done"
        left = f", {spoken(job['seconds_left'])} left" if job["seconds_left"] else ""
        images = f"{job['n_images']} image{'' if job['n_images'] == 1 else 's'}"
        rows.append(f"  {job['model']}, {images}: {place}{left}")
    return rows


def _watch() -> None:
    """On a screen of its own, drawn over in place; what was seen last stays when it ends."""
    from rich.console import Group, RenderableType
    from rich.live import Live
    from rich.text import Text

    from fluxmesh_coordinator.console import tables, terminal

    console = terminal.output()

    def drawn(overview: Survey | None) -> RenderableType:
        mesh = Text(NO_MESH) if overview is None else tables.drawn(overview, console.width)
        rows = server_rows()
        return Group(mesh, Text("\n".join(rows))) if rows else mesh

    overview = _look()
    try:
        with Live(drawn(overview), console=console, screen=True, auto_refresh=False) as live:
            while True:
                title = "" if overview is None else overview.record.name
                head = Text(f"{title}  {time.strftime('%H:%M:%S')}  Ctrl-C ends\n", style="dim")
                live.update(Group(head, drawn(overview)), refresh=True)
                time.sleep(DEADLINES.watch)
                overview = _look()
    except KeyboardInterrupt:
        console.print(drawn(overview))
        click.get_current_context().exit(CancelledError.exit_code)
