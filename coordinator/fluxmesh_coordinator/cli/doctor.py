"""`fluxmesh doctor`: whether the hosts can make a mesh, and what to do where they can't."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from fluxmesh_coordinator.cli.completion import complete_models
from fluxmesh_coordinator.cli.parameters.types import UserPath

MARKS = {"ok": "ok", "warn": "[yellow]warning[/]", "fail": "[bold red]FAILS[/]"}


@click.command(short_help="Check whether hosts can make a mesh.")
@click.argument("hostfile", required=False, type=UserPath(path_type=Path))
@click.option(
    "-m",
    "--model",
    metavar="MODEL",
    shell_complete=complete_models,
    help="Also check that every host has this model.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.pass_context
def doctor(context: click.Context, hostfile: Path | None, model: str | None, as_json: bool) -> None:
    """Check the hosts of HOSTFILE: ssh, Python, versions, memory, clocks, addresses and keys.

    Without HOSTFILE, check the mesh that is up, with its agents and links; if none is up, this
    machine. Exits 1 if a check fails.
    """
    from fluxmesh.cluster import hostfile as hostfiles
    from fluxmesh_coordinator.agents import mesh_file
    from fluxmesh_coordinator.console.json_lines import emit
    from fluxmesh_coordinator.console.option_names import in_options
    from fluxmesh_coordinator.deploy.bringup import examine, this_machine
    from fluxmesh_coordinator.deploy.diagnosis import keys_of_this_user, of_agents

    mesh = mesh_file.load() if hostfile is None else None
    if hostfile is not None:
        hosts = hostfiles.load(hostfile)
    else:
        hosts = mesh.hostfile if mesh is not None else hostfiles.parse(this_machine())
    findings = [keys_of_this_user(), *examine(hosts, model)]
    if mesh is not None:
        findings += of_agents(mesh)
    findings.sort(key=lambda finding: finding.rank)
    if as_json:
        for finding in findings:
            emit("check", **asdict(finding))
    else:
        from rich.markup import escape

        from fluxmesh_coordinator.console import terminal

        table = terminal.table(("host", "check", "", "found"))
        for finding in findings:
            host = "here" if finding.rank < 0 else f"{finding.rank}"
            table.add_row(
                host, finding.check, MARKS[finding.level], escape(in_options(finding.text))
            )
        terminal.output().print(table)
        for warning in hosts.warnings:
            click.echo(in_options(warning))
    if any(finding.level == "fail" for finding in findings):
        context.exit(1)
