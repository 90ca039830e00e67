"""`fluxmesh serve`: the mesh that is up, or this machine kept warm, behind HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from fluxmesh_coordinator.cli.completion import complete_models
from fluxmesh_coordinator.cli.parameters.types import UserPath

if TYPE_CHECKING:
    from fluxmesh_coordinator.server.run import ServeOptions

_PATH = UserPath(path_type=Path)


@click.command(short_help="Serve HTTP: OpenAI's and AUTOMATIC1111's clients, and a page.")
@click.option("--host", default="127.0.0.1", metavar="ADDRESS", help="Where to listen.",
              show_default=True)  # fmt: skip
@click.option("--port", default=8420, type=click.IntRange(0, 65535), show_default=True)
@click.option(
    "-m",
    "--model",
    metavar="MODEL",
    shell_complete=complete_models,
    help="What paints where a request names nothing.  [what the mesh holds]",
)
@click.option("--key-file", type=_PATH, metavar="FILE", help="Ask every client for this key.")
@click.option("--pictures", type=_PATH, metavar="FOLDER", help="Where finished pictures go.")
@click.option("--adapters", type=_PATH, metavar="FOLDER", help="LoRA files that clients may name.")
@click.option("--name", "names", multiple=True, help="By which a proxy in front calls it.")
@click.option(
    "--proxy",
    "proxies",
    multiple=True,
    metavar="ADDRESS",
    help="Believe what this proxy in front says of its clients (X-Forwarded-For, -Proto).",
)
@click.option("--install", is_flag=True, help="Begin with these options at every login.")
@click.option("--uninstall", is_flag=True, help="Begin at a login no more.")
def serve(
    host: str,
    port: int,
    model: str | None,
    key_file: Path | None,
    pictures: Path | None,
    adapters: Path | None,
    names: tuple[str, ...],
    proxies: tuple[str, ...],
    install: bool,
    uninstall: bool,
) -> None:
    """Serve HTTP on the mesh that is up, or on this machine, kept warm.

    Programs that talk to OpenAI's Images or to AUTOMATIC1111 find it by its address alone; a
    browser finds a page. Any address but loopback needs a key, which is made at the first start.
    Ctrl-C lets what runs finish; a second one cancels it.
    """
    from fluxmesh.errors import UsageError
    from fluxmesh_coordinator.server.run import ServeOptions
    from fluxmesh_coordinator.server.run import serve as run

    if install and uninstall:
        raise UsageError("--install and --uninstall exclude each other; choose one.")
    if uninstall:
        _uninstall()
        return
    options = ServeOptions(
        host=host,
        port=port,
        model=model,
        key_file=key_file,
        pictures=pictures,
        adapters=adapters,
        names=names,
        proxies=proxies,
    )
    if install:
        _install(options)
        return
    run(options, lambda text: click.echo(text, err=True))


def _install(options: ServeOptions) -> None:
    from fluxmesh_coordinator.server.install import install
    from fluxmesh_coordinator.server.run import key_of

    _, text = key_of(options)
    if text:
        click.echo(text, err=True)
    path = install(options.arguments())
    click.echo(f"{path} starts the server at every login, and has started it now: {options.url}.")


def _uninstall() -> None:
    from fluxmesh_coordinator.server.install import uninstall

    path = uninstall()
    click.echo("There was no such service." if path is None else f"Removed {path}.")
