"""`fluxmesh adapters convert|fuse`: adapters for other tools, and models that need none."""

from __future__ import annotations

from pathlib import Path

import click

from fluxmesh_coordinator.cli.options import Adapter
from fluxmesh_coordinator.cli.progress import bar_of_bytes, size_text

FORMATS = {"diffusers": "diffusers", "kohya": "kohya", "bfl": "bfl", "mlx": "apple"}
as_json = click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")


@click.group()
def adapters() -> None:
    """Convert adapters (LoRA), and fuse them into models."""


@adapters.command()
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--to", "file_format", type=click.Choice(list(FORMATS)), required=True,
    help="Whose keys: diffusers and PEFT, kohya, BFL, or Apple's mlx-examples.",
)  # fmt: skip
@click.option("-m", "--model", metavar="MODEL", help="That it is for.  [FLUX.1, or tiny]")
@as_json
def convert(source: str, target: Path, file_format: str, model: str | None, as_json: bool) -> None:
    """Write the adapter SOURCE, of any of the formats, as the new file TARGET.

    SOURCE may be the folder that `fluxmesh train` has written.
    """
    from fluxmesh.adapters import convert as conversion
    from fluxmesh.weights import hub
    from fluxmesh_coordinator.console.json_lines import emit

    if model is None:
        configs = conversion.known_configs()
    else:
        configs = [hub.resolve(model, download=False).transformer]
    adapter = conversion.convert_adapter(Path(source), target, FORMATS[file_format], configs)
    if as_json:
        emit("converted", file=str(target), format=file_format, linears=len(adapter))
    else:
        click.echo(f"Wrote {target}: {len(adapter)} linears, {file_format}'s keys.")


@adapters.command()
@click.argument("model")
@click.argument("loras", metavar="ADAPTER[:SCALE]...", nargs=-1, required=True, type=Adapter())
@click.argument("folder", type=click.Path(path_type=Path))
@as_json
def fuse(model: str, loras: tuple[tuple[str, float], ...], folder: Path, as_json: bool) -> None:
    """Write MODEL with adapters in its weights into the new FOLDER.

    FOLDER can be given as --model from then on, and to diffusers.
    """
    from fluxmesh.adapters.fuse import fuse_checkpoint
    from fluxmesh.weights import hub
    from fluxmesh_coordinator.console.json_lines import emit

    with bar_of_bytes(f"Fetching {model}", as_json) as progress:
        checkpoint = hub.resolve(model, progress=progress)
    with bar_of_bytes("Fusing", as_json) as progress:
        fuse_checkpoint(checkpoint, folder, loras, progress)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if as_json:
        emit("fused", folder=str(folder), bytes=size)
    else:
        click.echo(f"Wrote {folder}: {size_text(size)}.")
