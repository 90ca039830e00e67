"""`fluxmesh down`: ends the agents of the mesh, and with them everything that it started."""

from __future__ import annotations

import click


@click.command()
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

    mesh = mesh_file.load()
    if mesh is None:
        if as_json:
            emit("down", hosts=[])
        else:
            click.echo(NO_MESH)
        return
    if not force and (why_not := in_use(survey(mesh))):
        raise FluxmeshError(why_not)
    errors = take_down(mesh)
    if errors:
        mesh_file.save(mesh.only(errors))
        raise FluxmeshError(" ".join(str(error) for error in errors.values()))
    mesh_file.remove()
    if as_json:
        emit("down", hosts=[member.rank for member in mesh.members])
    else:
        count = len(mesh.members)
        click.echo(f"The mesh is down: {count} agent{'' if count == 1 else 's'} ended.")
