"""`fluxmesh models list|show|check|pull|push|rm|quantize`: what is here, comes, and goes."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from fluxmesh_coordinator.cli import SuggestingGroup
from fluxmesh_coordinator.cli.completion import complete_hosts, complete_models
from fluxmesh_coordinator.cli.parameters.types import UserPath
from fluxmesh_coordinator.console.bytes_bar import bar_of_bytes, size_text

ASKED_SO = {  # how an embedded checkpoint is asked, as `models show` heads the examples
    "prompts": "prompts name one thing or two, a background, and what stands where:",
    "edits": "edits, one at a time, of a picture that it painted (--reference PICTURE); what is "
    "added needs room, so begin with a thing on the left, on the right, at the top or the bottom:",
    "edits_of_two": "edits with a second picture (--reference FIRST --reference SECOND):",
}
as_json = click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")


def is_asked() -> bool:
    """Whether there is somebody who can answer a question."""
    return sys.stdin.isatty()


@click.group(cls=SuggestingGroup)
def models() -> None:
    """List, show, check, fetch, copy, quantize and remove models."""


@models.command("list", short_help="List the models that `--model` takes.")
@as_json
def list_command(as_json: bool) -> None:
    """List the models that `--model` takes: those inside fluxmesh, those with a short name, and
    FLUX models in the Hub's cache.

    Each has its size (here, or of the download), its licence (gated: you must accept it on the Hub
    first), its usual number of steps, and its inputs beside a prompt. `--model` also takes a Hub id
    (owner/repo), a folder or a .safetensors file.
    """
    from fluxmesh_coordinator.console.json_lines import emit
    from fluxmesh_coordinator.runtime.model_list import listed

    models = list(listed())
    if as_json:
        for model in models:
            emit("model", **model.to_json())
        return
    from fluxmesh_coordinator.console import models_table

    models_table.show(models)
    click.echo("Fetch one with `fluxmesh models pull MODEL`. A Hub id (owner/repo), a folder or a")
    click.echo(".safetensors file is a model too.")


@models.command(short_help="Fetch MODEL from the Hugging Face Hub.")
@click.argument("model")
@as_json
def pull(model: str, as_json: bool) -> None:
    """Fetch MODEL (a name of `fluxmesh models list`, or owner/repo) from the Hugging Face Hub.

    Its licence, its size and the room that is left are told first. Only the files that fluxmesh
    reads are fetched, once it is known that they make a model. An interrupted download goes on
    where it stopped. Where MODEL is a file on this machine, what it lacks is fetched: text
    encoders, tokenizers, the autoencoder.
    """
    from fluxmesh.storage.own_words import in_own_words
    from fluxmesh.weights import hub
    from fluxmesh.weights.reader import verify
    from fluxmesh_coordinator.console.json_lines import emit

    _tell_before(model, as_json)
    with bar_of_bytes(f"Fetching {model}", as_json) as progress:
        checkpoint = hub.pull(model, progress)
    with in_own_words(model):
        verify(checkpoint)
    total = sum(part.nbytes for part in checkpoint.components.values())
    if as_json:
        emit("pulled", name=checkpoint.name, revision=checkpoint.revision, bytes=total)
    else:
        click.echo(f"{model} is here: {size_text(total)}, revision {checkpoint.revision}.")


def _tell_before(model: str, as_json: bool) -> None:
    """What is to be known of a model of the Hub before its files come."""
    from fluxmesh.weights import hub
    from fluxmesh_coordinator.console.json_lines import emit

    notice, nbytes = hub.notice_of(model), hub.download_bytes(model)
    free, cache = hub.free_bytes(), hub.cache_folder()
    if as_json:
        emit("pulling", name=model, notice=notice, bytes=nbytes, free_bytes=free, folder=str(cache))
        return
    if notice:
        click.echo(notice, err=True)
    if nbytes is not None:
        size, room = size_text(nbytes), size_text(free)
        click.echo(f"{model} is {size}; {cache} has {room} free.", err=True)


@models.command(short_help="Copy MODEL to the hosts of the mesh that lack it.")
@click.argument("model", shell_complete=complete_models)
@click.argument("hosts", nargs=-1, metavar="[HOST]...", shell_complete=complete_hosts)
@as_json
def push(model: str, hosts: tuple[str, ...], as_json: bool) -> None:
    """Copy MODEL to hosts that lack it.

    HOST is a rank or a name; without one, all that lack it. Over the cables of the mesh that is up,
    each host passing on what it gets. This machine counts as a host that has it. An interrupted
    push goes on where it stopped.
    """
    from fluxmesh.errors import FluxmeshError, UsageError
    from fluxmesh.machine.awake import kept_awake
    from fluxmesh.weights import hub
    from fluxmesh_coordinator.agents import mesh_file
    from fluxmesh_coordinator.cli.status import NO_MESH
    from fluxmesh_coordinator.console.push_report import push_watcher
    from fluxmesh_coordinator.deploy.model_push import push_model

    mesh = mesh_file.load()
    if mesh is None:
        raise UsageError(NO_MESH)
    ranks = mesh.ranks_of(hosts) if hosts else None
    with kept_awake(), push_watcher(model, mesh, as_json=as_json) as watcher:
        arrived, errors = push_model(mesh, hub.full_name(model), watcher, ranks)
        watcher.ready(arrived, errors)
    if errors:
        count = f"{len(errors)} host{'' if len(errors) == 1 else 's'}"
        raise FluxmeshError(f"{model} did not get to {count}; push again, it goes on.")


@models.command()
@click.argument("model", shell_complete=complete_models)
@as_json
def show(model: str, as_json: bool) -> None:
    """Tell what MODEL is: files, sizes, what it does by itself.

    Of tiny and tiny-klein also what they paint, and how to ask for it.
    """
    from fluxmesh_coordinator.commands.models import description
    from fluxmesh_coordinator.console.json_lines import emit

    about = description(model)
    if as_json:
        emit("model", **about)
        return
    components = about["components"].items()
    parts = ", ".join(f"{part} {size_text(nbytes)}" for part, nbytes in components)
    guidance = "" if about["guidance"] is None else f", guidance {about['guidance']:g}"
    bits = f", {about['bits']} bits" if about["bits"] else ""
    if about["text_bits"] != about["bits"]:
        bits += f", text encoders {about['text_bits']} bits"
    click.echo(f"{about['name']}: {size_text(about['bytes'])} ({parts})")
    click.echo(f"  in {about['folder']}, revision {about['revision']}, {about['kind']}{bits}")
    click.echo(
        f"  by itself {about['height']}x{about['width']}, {about['steps']} steps{guidance}; it "
        f"reads {about['prompt_tokens']} tokens of a prompt"
    )
    for what in ("things", "backgrounds"):
        if what in about:
            click.echo(f"  {len(about[what])} {what}:")
            words = ", ".join(about[what])
            click.echo(click.wrap_text(words, 78, "    ", "    "))
    for what, head in ASKED_SO.items():
        if what in about:
            click.echo(click.wrap_text(head, 78, "  ", "    "))
            click.echo("".join(f"    {phrase}\n" for phrase in about[what]), nl=False)


@models.command(short_help="Read every number of MODEL, and look for damage.")
@click.argument("model", shell_complete=complete_models)
@as_json
def check(model: str, as_json: bool) -> None:
    """Read every number of MODEL, and look for damage.

    All of its files are read. The first tensor that is cut off, or that holds NaN or infinity, is
    named with its file, and the command fails. Nothing is fetched.
    """
    from fluxmesh_coordinator.commands.models import check
    from fluxmesh_coordinator.console.json_lines import emit

    with bar_of_bytes(f"Reading {model}", as_json) as progress:
        checkpoint = check(model, progress)
    size = sum(part.nbytes for part in checkpoint.components.values())
    if as_json:
        emit("sound", name=checkpoint.name, revision=checkpoint.revision, bytes=size)
    else:
        click.echo(f"{model} is sound: every number of {size_text(size)} was read.")


@models.command()
@click.argument("model", shell_complete=complete_models)
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@as_json
def rm(model: str, yes: bool, as_json: bool) -> None:
    """Remove MODEL from the Hub's cache, after asking.

    Nothing outside of the cache is removed. Other programs that use the cache lose it too.
    """
    from fluxmesh.errors import UsageError
    from fluxmesh_coordinator.commands.models import removable, remove
    from fluxmesh_coordinator.console.json_lines import emit

    cached = removable(model)
    if not yes:
        if as_json or not is_asked():
            raise UsageError(f"Give --yes to remove {cached.folder} without being asked.")
        size = size_text(cached.nbytes)
        click.confirm(f"Remove {model}, {size} in {cached.folder}?", abort=True, err=True)
    remove(cached)
    if as_json:
        emit("removed", name=model, folder=str(cached.folder), bytes=cached.nbytes)
    else:
        click.echo(f"{model} is removed: {size_text(cached.nbytes)} are free.")


@models.command(short_help="Write a model with its matrices in few bits.")
@click.argument("source", shell_complete=complete_models)
@click.argument("folder", type=UserPath(path_type=Path))
@click.option(
    "--bits", type=click.Choice(["3", "4", "5", "6", "8"]), default="4", show_default=True,
    help="Bits a weight.",
)  # fmt: skip
@click.option(
    "--text-bits", type=click.Choice(["3", "4", "5", "6", "8"]),
    help="Bits a weight of the text encoders.  [as --bits]",
)  # fmt: skip
@as_json
def quantize(source: str, folder: Path, bits: str, text_bits: str | None, as_json: bool) -> None:
    """Write model SOURCE into the new FOLDER with its large matrices in few bits.

    FOLDER can be given as --model from then on; its text encoders are quantized too.
    """
    from fluxmesh.storage.own_words import in_own_words
    from fluxmesh.storage.writable import check_new
    from fluxmesh.weights import hub
    from fluxmesh.weights.quantize import quantize_checkpoint
    from fluxmesh_coordinator.console.json_lines import emit

    check_new(folder)  # before anything is fetched
    with bar_of_bytes(f"Fetching {source}", as_json) as progress:
        checkpoint = hub.resolve(source, progress=progress)
    with bar_of_bytes(f"Quantizing to {bits} bits", as_json) as progress, in_own_words(source):
        of_text = int(text_bits) if text_bits else None
        quantize_checkpoint(checkpoint, folder, int(bits), progress, of_text)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if as_json:
        emit("quantized", folder=str(folder), bits=int(bits), bytes=size)
    else:
        click.echo(f"Wrote {folder}: {size_text(size)}, {bits} bits.")
