"""`fluxmesh up`: a hostfile becomes a mesh of agents with the weights in memory. `fluxmesh
hostfile` has examples of one."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fluxmesh_coordinator.cli.completion import complete_models
from fluxmesh_coordinator.cli.parameters.options import ConfigurableCommand
from fluxmesh_coordinator.cli.parameters.types import Resolutions, UserPath

if TYPE_CHECKING:
    from fluxmesh.cluster.snapshot import ModelVariant
    from fluxmesh.request import GenerateRequest
    from fluxmesh_coordinator.agents.mesh_file import MeshRecord
    from fluxmesh_coordinator.deploy.bringup import Wish
    from fluxmesh_coordinator.runtime.default_model import DefaultModel

COMMANDLINE = click.core.ParameterSource.COMMANDLINE


@click.command(cls=ConfigurableCommand)
@click.argument("hostfile", required=False, type=UserPath(path_type=Path))
@click.option(
    "-m",
    "--model",
    metavar="MODEL",
    shell_complete=complete_models,
    help="What to load.  [the best that is here and fits]",
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Of weights.  [bfloat16]",
)
@click.option(
    "-q", "--quantize/--no-quantize", default=None, help="Quantize the weights: less memory."
)
@click.option(
    "--bits",
    type=click.Choice(["3", "4", "5", "6", "8"]),
    help="Of a quantized weight; implies --quantize.  [4]",
)
@click.option(
    "--text-bits",
    type=click.Choice(["3", "4", "5", "6", "8"]),
    help="Of a text encoder's weight.  [as --bits]",
)
@click.option(
    "--warm",
    type=Resolutions(),
    metavar="SIZE[,SIZE...]",
    help="Get ready for pictures of these sizes, HEIGHTxWIDTH.  [the model's own]",
)
@click.option(
    "--local",
    type=click.IntRange(1, 16),
    metavar="N",
    help="This machine, with N engines.",
)
@click.option("--no-warm", is_flag=True, help="Load the weights, and no more.")
@click.option("--env", "envs", multiple=True, metavar="KEY=VALUE", help="For the engines.")
@click.option("--allow-partial", is_flag=True, help="Go on without hosts that fail.")
@click.option("--pull", is_flag=True, help="Fetch the model where it is missing, without asking.")
@click.option("--push", is_flag=True, help="Copy the model to hosts that lack it, without asking.")
@click.option("--force", is_flag=True, help="Also where that ends agents that a job holds.")
@click.option(
    "--keep-ssh",
    is_flag=True,
    help="Keep one ssh connection to each host while its agent lives (macOS's Local Network).",
)
@click.option("--rotate-keys", is_flag=True, help="New keys for you and for every agent.")
@click.option("--json", "as_json", is_flag=True, help="Tell it in JSON, one object a line.")
@click.pass_context
def up(
    context: click.Context,
    hostfile: Path | None,
    model: str | None,
    local: int | None,
    dtype: str | None,
    quantize: bool | None,
    bits: str | None,
    text_bits: str | None,
    warm: tuple[tuple[int, int], ...] | None,
    no_warm: bool,
    envs: tuple[str, ...],
    allow_partial: bool,
    pull: bool,
    push: bool,
    force: bool,
    keep_ssh: bool,
    rotate_keys: bool,
    as_json: bool,
) -> None:
    """Start an agent on each host of HOSTFILE, and load weights.

    Without HOSTFILE, look after the mesh that is up, or start one on this machine alone. Again, it
    only looks, and does what is missing; with another hostfile, it changes the mesh. `fluxmesh
    down` ends it.
    """
    from fluxmesh.cluster.snapshot import ModelVariant
    from fluxmesh.errors import ModelNotFoundError, UsageError
    from fluxmesh.machine.awake import kept_awake
    from fluxmesh.planning.workload import ModelSizes, Workload
    from fluxmesh.storage.own_words import in_own_words
    from fluxmesh.weights import hub
    from fluxmesh_coordinator.agents import mesh_file
    from fluxmesh_coordinator.agents.status import survey
    from fluxmesh_coordinator.console import tables
    from fluxmesh_coordinator.console.up_report import watcher
    from fluxmesh_coordinator.deploy.bringup import Bringup
    from fluxmesh_coordinator.deploy.warmup import Warming

    if quantize is False:  # what config.toml says is put aside
        source = context.get_parameter_source
        bits = bits if source("bits") is COMMANDLINE else None
        text_bits = text_bits if source("text_bits") is COMMANDLINE else None
    if warm and no_warm:
        raise UsageError("--warm and --no-warm exclude each other; choose one.")
    if local is not None and hostfile is not None:
        raise UsageError("--local is a mesh without a hostfile; give one of them.")
    watching = watcher(as_json=as_json, pull=pull, push=push)
    with kept_awake(), in_own_words(model or ""), watching as watch:
        kept = mesh_file.load() if hostfile is None and local is None else None
        held = kept.weights if kept else None
        asked = (model, dtype, bits, text_bits)
        if held is not None and not any(asked) and not quantize:
            weights = replace(held, adapters=(), fuse_adapters=False)
        else:
            if model is not None:
                hub.check_name(model)  # before any host is asked
            how_many = int(bits) if bits else 4 if quantize else None
            of_text = int(text_bits) if text_bits else None
            weights = ModelVariant("", dtype or "bfloat16", how_many, text_bits=of_text)
            usual = held.model if held else None
            if model is None and usual is None:
                standing_in = _default(hostfile, local, weights)
                watch.note(standing_in.sentence)
                usual = standing_in.name
            named = usual if model is None else model
            assert named is not None
            weights = replace(weights, model=hub.full_name(named))
        with contextlib.suppress(ModelNotFoundError):  # that its files are wrong, before all else
            ModelSizes.of(hub.resolve(weights.model, download=False)).fill(_no_prompt(weights))
        wish = replace(
            _wish(hostfile, local, kept, weights, envs),
            allow_partial=allow_partial,
            rotate_keys=rotate_keys,
            force=force,
            keep_ssh=keep_ssh,
        )
        if kept is not None and not kept.is_this_machine:
            watch.note(f"Looking after the mesh of {kept.name}.")
        bringup = Bringup(wish, watch)
        with bringup.undone_if_cancelled():
            mesh = bringup.run()
            checkpoint = hub.resolve(weights.model, download=False)
            sizes = ModelSizes.of(checkpoint)
            work = Workload.of(sizes.fill(_no_prompt(weights)), sizes)
            if mesh.weights != work.weights:  # the checkpoint's own bits are part of it
                mesh = replace(mesh, weights=work.weights)
                mesh_file.save(mesh)
            own = (work.height, work.width)
            warming = Warming(
                mesh,
                work,
                watch,
                allow_partial=allow_partial,
                content=checkpoint.content,
                sizes=() if no_warm else warm or (own,),
            )
            mesh = warming.run()
            overview = survey(mesh)
        watch.ready(tables.as_json(overview) if as_json else None)
    if not as_json:
        tables.show(overview)


def _default(hostfile: Path | None, local: int | None, weights: ModelVariant) -> DefaultModel:
    """What these hosts get where nobody has said it."""
    from fluxmesh.cluster import hostfile as hostfiles
    from fluxmesh_coordinator.deploy.bringup import this_machine
    from fluxmesh_coordinator.runtime.default_model import default_model, expected_view

    hosts = hostfiles.load(hostfile) if hostfile else hostfiles.parse(this_machine(agents=local))
    return default_model(_no_prompt(weights), expected_view(hosts))


def _no_prompt(weights: ModelVariant) -> GenerateRequest:
    """What stands for all requests to a model in these weights."""
    from fluxmesh.request import GenerateRequest

    return GenerateRequest(
        prompt="",
        seed=0,
        model=weights.model,
        dtype=weights.dtype,
        bits=weights.bits,
        text_bits=weights.text_bits,
    )


def _wish(
    hostfile: Path | None,
    local: int | None,
    kept: MeshRecord | None,
    weights: ModelVariant,
    envs: tuple[str, ...],
) -> Wish:
    """Which mesh is to be: the one that is up already (`kept`), or another."""
    from fluxmesh.cluster import hostfile as hostfiles
    from fluxmesh_coordinator.agents.mesh_file import THIS_NAME
    from fluxmesh_coordinator.deploy.bringup import Wish, this_machine

    roots: tuple[str, ...] = (weights.model,) if os.path.isabs(weights.model) else ()
    before: tuple[tuple[str, str], ...] = ()
    if kept is not None and not kept.is_this_machine:
        text, name, before = kept.text, kept.name, kept.envs
        roots = tuple(dict.fromkeys((*kept.roots, *roots)))
    elif hostfile is None:
        # This user's own machine: every model that the user can read is the user's to name.
        text, name, roots = this_machine(agents=local), THIS_NAME, ("/",)
    else:
        name = str(hostfile.absolute())
        hostfiles.load(hostfile)  # raises what reading may
        text = hostfile.read_text(encoding="utf-8-sig", errors="replace")
    hosts = hostfiles.parse(text, name)
    given = tuple(_pair(item) for item in envs)
    merged = tuple({**dict(hosts.envs), **dict(before), **dict(given)}.items())
    return Wish(hosts, name, text, weights, merged, roots)


def _pair(item: str) -> tuple[str, str]:
    from fluxmesh.cluster.hostfile import may_be_set
    from fluxmesh.errors import UsageError

    key, equals, value = item.partition("=")
    if not equals or not key.isidentifier():
        raise UsageError(f"--env {item}: expected KEY=VALUE, such as --env NCCL_DEBUG=INFO.")
    if not may_be_set(key):
        raise UsageError(
            f"--env {key}: engines take no such variable from here; hostfiles/README.md names "
            "those that they take."
        )
    return key, value


@click.command(short_help="Print example NAME of a hostfile, or list them all.")
@click.argument("name", required=False)
def hostfile(name: str | None) -> None:
    """Print an example of a hostfile.

    NAME's, to be written into a file and changed; without NAME, all their names.

    \b
    fluxmesh hostfile thunderbolt-2 > mesh.json

    For Macs that are cabled already, MLX's own mlx.distributed_config writes the real one.
    """
    from fluxmesh_coordinator.deploy.hostfile_examples import ABOUT, example

    if name is not None:
        click.echo(example(name), nl=False)
        return
    width = max(map(len, ABOUT))
    for known, about in ABOUT.items():
        click.echo(f"{known:<{width}}  {about}")
