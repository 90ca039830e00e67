"""`fluxmesh down`: ends the agents of the mesh, and with them everything that it started."""

from __future__ import annotations

import click


@click.command(short_help="End every agent of the mesh.")
@click.option("--force", is_flag=True, help="Also while somebody's job runs.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def down(force: bool, as_json: bool) -> None:
    """End every agent of the mesh; nothing of it runs on after that.

    Keys and logs stay, so that the next `fluxmesh up` knows its hosts again.
    """
    from fluxmesh.errors import FluxmeshError
    from fluxmesh_coordinator.agents import mesh_file
    from fluxmesh_coordinator.agents.status import in_use, survey
    from fluxmesh_coordinator.cli.status import NO_MESH
    from fluxmesh_coordinator.console.json_lines import emit
    from fluxmesh_coordinator.deploy.bringup import take_down
    from fluxmesh_coordinator.deploy.started_agents import end_left

    mesh, left = mesh_file.load(), mesh_file.unfinished()
    if mesh is None and left is None:
        if as_json:
            emit("down", hosts=[])
        else:
            click.echo(NO_MESH)
        return
    if mesh is not None and not force and (why_not := in_use(survey(mesh))):
        raise FluxmeshError(why_not)
    errors: dict[int, FluxmeshError] = {}
    count = 0
    if left is not None:  # by an `up` that was killed
        count, errors = end_left(left)
        if not errors:
            mesh_file.end_start()
    if mesh is not None:
        standing = take_down(mesh)
        if standing:
            mesh_file.save(mesh.only(standing))
        else:
            mesh_file.remove()
        count += len(mesh.members) - len(standing)
        errors |= standing
    if errors:
        raise FluxmeshError(" ".join(str(error) for error in errors.values()))
    if as_json:
        emit("down", hosts=[member.rank for member in mesh.members] if mesh else [])
    else:
        click.echo(f"The mesh is down: {count} agent{'' if count == 1 else 's'} ended.")
