"""`fluxmesh-agent`: the command that a host of the mesh runs. `fluxmesh up` starts it.

Keys come over stdin and never stand on a command line. When it listens, it prints one line of JSON
that says where, with which key, and as which process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from fluxmesh.errors import FluxmeshError
from fluxmesh.version import __version__

MAX_KEYS = 1 << 20  # bytes of the line on stdin


@click.group()
@click.version_option(__version__, prog_name="fluxmesh-agent")
def main() -> None:
    """The fluxmesh agent of this host: listens for coordinators, and runs the engine."""


@main.command()
@click.option("--state", type=click.Path(path_type=Path), help="Folder of keys, log and adapters.")
@click.option("--address", default="127.0.0.1", help="IP address to listen at, no other.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="0 takes a free one.")
@click.option("--models", type=click.Path(path_type=Path), help="Folder of checkpoints.")
@click.option("--memory", type=click.IntRange(min=1), help="Bytes that it may use at most.")
@click.option(
    "--root",
    "roots",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A folder that models may be in, beside --models. Can be given several times.",
)
@click.option("--keys-stdin", is_flag=True, help="Read who may talk to it from stdin first.")
@click.option("--ephemeral", is_flag=True, help="End when stdin ends, and remove the state.")
def run(
    state: Path | None,
    address: str,
    port: int,
    models: Path | None,
    memory: int | None,
    roots: tuple[Path, ...],
    keys_stdin: bool,
    ephemeral: bool,
) -> None:
    """Run in the foreground."""
    from fluxmesh_agent.ending import Ending

    ending = Ending()
    from fluxmesh.machine.open_files import allow_many_files
    from fluxmesh_agent.process import AgentSettings, serve

    allow_many_files()
    try:
        handover = _read_handover() if keys_stdin else {}
        serve(
            AgentSettings(
                state=state,
                address=address,
                port=port,
                models=models,
                memory=memory,
                roots=roots,
                authorized=_texts(handover, "authorized"),
                envs=tuple(_texts(handover, "envs").items()),
                ephemeral=ephemeral,
            ),
            ending,
        )
    except FluxmeshError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)


@main.command()
@click.option("--address", required=True, help="IP address to listen at: the hostfile's control.")
@click.option("--port", type=click.IntRange(1, 65535), default=47100, show_default=True)
@click.option("--models", type=click.Path(path_type=Path), help="Folder of checkpoints.")
@click.option("--memory", type=click.IntRange(min=1), help="Bytes that it may use at most.")
def launchd(address: str, port: int, models: Path | None, memory: int | None) -> None:
    """Print the LaunchDaemon that runs this user's agent from the start of this Mac on.

    It lets in whom `fluxmesh up` has let in before, or will; docs/macos.md tells where it goes.
    """
    import getpass
    import os

    from fluxmesh_agent.launchd import daemon

    arguments = ["--address", address, "--port", str(port)]
    if models is not None:
        arguments += ["--models", str(models.expanduser().absolute())]
    if memory is not None:
        arguments += ["--memory", str(memory)]
    text = daemon(
        python=sys.executable,
        arguments=arguments,
        port=port,
        user=getpass.getuser(),
        home=Path.home(),
        environment=os.environ,
    )
    click.echo(text.decode(), nl=False)


def _read_handover() -> dict[str, Any]:
    """The JSON object on stdin. Raises `FluxmeshError` where there is none."""
    line = sys.stdin.buffer.readline(MAX_KEYS)
    try:
        handover = json.loads(line)
    except ValueError:
        handover = None
    if not isinstance(handover, dict):
        raise FluxmeshError("stdin must begin with one line of JSON: who may talk to the agent.")
    return handover


def _texts(handover: dict[str, Any], key: str) -> dict[str, str]:
    texts = handover.get(key, {})
    if not isinstance(texts, dict) or not all(type(value) is str for value in texts.values()):
        raise FluxmeshError(f"{key!r} on stdin must be an object of texts.")
    return texts
