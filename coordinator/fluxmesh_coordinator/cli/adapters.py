"""`fluxmesh adapters list|show|convert|fuse`: what adapters are, and other forms of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fluxmesh_coordinator.cli import SuggestingGroup
from fluxmesh_coordinator.cli.completion import complete_adapters, complete_models
from fluxmesh_coordinator.cli.parameters.types import Adapter, UserPath
from fluxmesh_coordinator.console.bytes_bar import bar_of_bytes, size_text

if TYPE_CHECKING:
    from fluxmesh.adapters.describe import Description
    from fluxmesh.models.base import Architecture

FORMATS = {
    **{name: name for name in ("diffusers", "kohya", "bfl", "ai-toolkit")},
    "mlx": "apple",
}
as_json = click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
for_model = click.option(
    "-m",
    "--model",
    metavar="MODEL",
    shell_complete=complete_models,
    help="That it is for.  [whichever it fits]",
)


@click.group(cls=SuggestingGroup, short_help="List, show, convert and fuse adapters (LoRA).")
def adapters() -> None:
    """List, show, convert and fuse adapters (LoRA)."""


@adapters.command("list", short_help="List the adapters of FOLDER and of the Hub's cache.")
@click.argument("folder", required=False, type=UserPath(path_type=Path, exists=True))
@as_json
def list_(folder: Path | None, as_json: bool) -> None:
    """List the adapters that are here.

    Those of FOLDER (or this one) and its folders, and of the Hub's cache.
    """
    from fluxmesh.adapters import describe
    from fluxmesh.adapters.convert import known_models
    from fluxmesh.errors import AdapterError
    from fluxmesh_coordinator.console.json_lines import emit

    where = folder or Path()
    models = known_models()
    count = 0
    for path in describe.adapter_files(where):
        name = describe.name_of(path, where if folder is None else Path())
        try:
            about = describe.describe(path, models)
        except AdapterError:
            continue
        count += 1
        if as_json:
            emit("adapter", name=name, **about.as_json())
        else:
            trigger = f', "{about.triggers[0]}"' if about.triggers else ""
            fits = ", for no model that is known" if about.problem else f", for {about.family}"
            click.echo(f"{name}: {_kinds(about)}, {size_text(about.nbytes)}{trigger}{fits}")
    if not count and not as_json:
        click.echo("No adapters here; `generate --adapter` also takes a Hub id, owner/repo.")


@adapters.command(short_help="Tell what ADAPTER is and what it adapts.")
@click.argument("name", metavar="ADAPTER", shell_complete=complete_adapters)
@for_model
@as_json
def show(name: str, model: str | None, as_json: bool) -> None:
    """Tell what ADAPTER is.

    Its format and rank, what it adapts, and its trigger words.
    """
    from fluxmesh.adapters.describe import describe
    from fluxmesh.adapters.find import find_adapter
    from fluxmesh_coordinator.console.json_lines import emit

    with bar_of_bytes(f"Fetching {name}", as_json) as progress:
        path = find_adapter(name, progress=progress)
    about = describe(path, _models(model))
    if as_json:
        emit("shown", name=name, **about.as_json())
        return
    for line in _lines(name, about):
        click.echo(line)


@adapters.command(short_help="Write an adapter in another format.")
@click.argument("source", shell_complete=complete_adapters)
@click.argument("target", type=UserPath(path_type=Path))
@click.option(
    "--to", "file_format", type=click.Choice(list(FORMATS)), required=True,
    help="Whose keys: diffusers and PEFT, kohya and musubi, BFL, ai-toolkit, or Apple's "
    "mlx-examples.",
)  # fmt: skip
@for_model
@as_json
def convert(source: str, target: Path, file_format: str, model: str | None, as_json: bool) -> None:
    """Write the adapter SOURCE, of any of the formats, as the new file TARGET.

    SOURCE may be the folder that `fluxmesh train` has written, or a Hub id. Numbers keep the dtype
    that they are stored in.
    """
    from fluxmesh.adapters.convert import convert_adapter
    from fluxmesh_coordinator.console.json_lines import emit

    done = convert_adapter(source, target, FORMATS[file_format], _models(model))
    for note in done.notes:
        click.echo(note, err=True)
    if as_json:
        emit("converted", file=str(target), format=file_format, linears=done.linears)
    else:
        click.echo(f"Wrote {target}: {done.linears} linears, {file_format}'s keys.")


@adapters.command()
@click.argument("model", shell_complete=complete_models)
@click.argument(
    "loras",
    metavar="ADAPTER[@SCALE]...",
    nargs=-1,
    required=True,
    type=Adapter(),
    shell_complete=complete_adapters,
)
@click.argument("folder", type=UserPath(path_type=Path))
@as_json
def fuse(model: str, loras: tuple[tuple[str, float], ...], folder: Path, as_json: bool) -> None:
    """Write MODEL with adapters in its weights into the new FOLDER.

    FOLDER can be given as --model from then on, and to diffusers.
    """
    from fluxmesh.adapters.find import find_adapter
    from fluxmesh.adapters.fuse import fuse_checkpoint
    from fluxmesh.storage.writable import check_new
    from fluxmesh.weights import hub
    from fluxmesh_coordinator.console.json_lines import emit

    check_new(folder)  # before anything is fetched
    for path, _ in loras:
        find_adapter(path)
    with bar_of_bytes(f"Fetching {model}", as_json) as progress:
        checkpoint = hub.resolve(model, progress=progress)
    with bar_of_bytes("Fusing", as_json) as progress:
        notes = fuse_checkpoint(checkpoint, folder, loras, progress)
    for note in notes:
        click.echo(note, err=True)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if as_json:
        emit("fused", folder=str(folder), bytes=size)
    else:
        click.echo(f"Wrote {folder}: {size_text(size)}.")


def _models(model: str | None) -> list[Architecture]:
    """The models that an adapter may be for."""
    from fluxmesh.adapters.convert import known_models
    from fluxmesh.weights import hub

    if model is None:
        return known_models()
    return [hub.resolve(model, download=False).architecture]


def _lines(name: str, about: Description) -> Iterator[str]:
    yield f"{name}: {_kinds(about)}, {size_text(about.nbytes)}"
    yield f"  format     {about.tool}, {', '.join(about.dtypes)}"
    counts = (
        f"{count} linear{'' if count == 1 else 's'} of {part}"
        for part, count in about.adapts.items()
    )
    of = f", as {about.family} has them" if about.family else ""
    yield f"  adapts     {', '.join(counts) or 'nothing of a model that is known'}{of}"
    if about.triggers:
        yield f"  trigger    {'; '.join(about.triggers)}"
    if about.tags:
        yield f"  tags       {', '.join(f'{tag} ({count})' for tag, count in about.tags)}"
    for what, text in about.about.items():
        yield f"  {what:<10} {text}"
    for note in about.notes:
        yield f"  note       {note}"
    if about.problem:
        yield f"  problem    {about.problem}"


def _kinds(about: Description) -> str:
    kinds = " and ".join(about.kinds) or "no adapter"
    if not about.ranks:
        return kinds
    low, high = about.ranks[0], about.ranks[-1]
    return f"{kinds} of rank {low}" + (f" to {high}" if high > low else "")
