"""`fluxmesh models list|pull|quantize`: what is on this machine, and how more comes onto it."""

from __future__ import annotations

from pathlib import Path

import click

from fluxmesh_coordinator.cli.progress import bar_of_bytes, size_text

as_json = click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")


@click.group()
def models() -> None:
    """List, fetch and quantize models."""


@models.command("list")
@as_json
def list_command(as_json: bool) -> None:
    """What `--model` can be: the embedded model, the aliases, and FLUX models from the Hub."""
    from fluxmesh.weights import hub
    from fluxmesh_coordinator.console.json_lines import emit

    models = hub.list_models()
    if as_json:
        for model in models:
            line = {
                "name": model.name,
                "source": model.source,
                "revision": model.revision,
                "bytes": model.nbytes,
                "usable": model.revision is not None,
                "note": model.note,
            }
            emit("model", **line)
        return
    from fluxmesh_coordinator.console import terminal

    table = terminal.table(("model", "from", "size", "state"))
    default = hub.default_model()
    for model in models:
        name = f"{model.name} (default)" if model.name == default else model.name
        state = f"here, {model.revision[:14]}" if model.revision else model.note
        table.add_row(name, model.source, size_text(model.nbytes) if model.nbytes else "", state)
    terminal.output().print(table)
    click.echo("Fetch one with `fluxmesh models pull MODEL`. A Hub id (owner/repo), a folder or a")
    click.echo(".safetensors file is a model too.")


@models.command()
@click.argument("model")
@as_json
def pull(model: str, as_json: bool) -> None:
    """Fetch MODEL (schnell, dev, krea-dev or owner/repo) from the Hugging Face Hub.

    Only the files that fluxmesh reads are fetched. An interrupted download goes on where it
    stopped.
    """
    from fluxmesh.weights import hub
    from fluxmesh.weights.reader import verify
    from fluxmesh_coordinator.console.json_lines import emit

    with bar_of_bytes(f"Fetching {model}", as_json) as progress:
        checkpoint = hub.pull(model, progress)
    verify(checkpoint)
    total = sum(part.nbytes for part in checkpoint.components.values())
    if as_json:
        emit("pulled", name=checkpoint.name, revision=checkpoint.revision, bytes=total)
    else:
        click.echo(f"{model} is here: {size_text(total)}, revision {checkpoint.revision}.")


@models.command()
@click.argument("source")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--bits", type=click.Choice(["3", "4", "5", "6", "8"]), default="4", show_default=True,
    help="Bits a weight.",
)  # fmt: skip
@as_json
def quantize(source: str, folder: Path, bits: str, as_json: bool) -> None:
    """Write model SOURCE into the new FOLDER with its large matrices in few bits.

    FOLDER can be given as --model from then on; its text encoders are quantized too.
    """
    from fluxmesh.weights import hub
    from fluxmesh.weights.quantize import quantize_checkpoint
    from fluxmesh_coordinator.console.json_lines import emit

    with bar_of_bytes(f"Fetching {source}", as_json) as progress:
        checkpoint = hub.resolve(source, progress=progress)
    with bar_of_bytes(f"Quantizing to {bits} bits", as_json) as progress:
        quantize_checkpoint(checkpoint, folder, int(bits), progress)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if as_json:
        emit("quantized", folder=str(folder), bits=int(bits), bytes=size)
    else:
        click.echo(f"Wrote {folder}: {size_text(size)}, {bits} bits.")
