"""`fluxmesh logs`: what the agents and engines of the mesh wrote last."""

from __future__ import annotations

import click

from fluxmesh_coordinator.cli.completion import complete_hosts


@click.command(short_help="Show the end of each agent's log.")
@click.argument("host", required=False, shell_complete=complete_hosts)
@click.option(
    "-n", "--lines", type=click.IntRange(1, 10_000), default=50, show_default=True, help="Of each."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def logs(host: str | None, lines: int, as_json: bool) -> None:
    """Show the end of each agent's log; of HOST, a rank or a name, alone.

    An agent that is gone has its log read from its machine, over ssh where it is another.
    """
    from fluxmesh.errors import FluxmeshError, UsageError
    from fluxmesh.wire import messages
    from fluxmesh_coordinator.agents import mesh_file, remote
    from fluxmesh_coordinator.agents.client import AgentClient
    from fluxmesh_coordinator.agents.status import with_agents
    from fluxmesh_coordinator.cli.status import NO_MESH
    from fluxmesh_coordinator.console.json_lines import emit

    mesh = mesh_file.load()
    if mesh is None:
        raise UsageError(NO_MESH)
    if host is not None:
        mesh = mesh.only(mesh.ranks_of([host]))

    async def ask(client: AgentClient) -> tuple[str, ...]:
        return (await client.ask(messages.AskLogs(lines), messages.Logs)).lines

    tails, _ = with_agents(mesh, ask)
    hostfile = mesh.hostfile
    for each in mesh.hosts:
        if each.rank not in tails:
            port = hostfile.control(each.rank).port
            try:
                tail = remote.ask(each, "logs", port=port, lines=lines)["lines"]
            except FluxmeshError as error:
                tail = [str(error)]
            tails[each.rank] = tuple(tail)
        for line in tails[each.rank]:
            if as_json:
                emit("log", host=each.rank, line=line)
            else:
                click.echo(f"{each.rank} | {line}" if len(mesh.hosts) > 1 else line)
