"""`fluxmesh-agent`: the command that a host of the mesh runs.

On one machine no agent is needed: `fluxmesh generate` computes in its own process. The command
tells the installed version, which is how a host is checked before it joins a mesh.
"""

from __future__ import annotations

import click

from fluxmesh import __version__


@click.command()
@click.version_option(__version__, prog_name="fluxmesh-agent")
@click.pass_context
def main(context: click.Context) -> None:
    """The fluxmesh agent of this host.

    This version generates on one machine, where no agent takes part: run `fluxmesh generate`.
    """
    click.echo(context.get_help())
