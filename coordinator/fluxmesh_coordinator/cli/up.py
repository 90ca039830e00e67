"""`fluxmesh up`: a hostfile becomes a mesh of agents with the weights in memory."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluxmesh_coordinator.cli.options import Resolutions

if TYPE_CHECKING:
    from fluxmesh.weights.checkpoint import Checkpoint
    from fluxmesh_coordinator.deploy.bringup import Watcher, Wish

THIS = -1  # what stands for this machine among the ranks


@click.command()
@click.argument("hostfile", required=False, type=click.Path(path_type=Path))
@click.option("-m", "--model", metavar="MODEL", help="What to load.  [FLUX if it is here, or tiny]")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="Of weights.",
)
@click.option("-q", "--quantize", is_flag=True, help="Quantize the weights: less memory.")
@click.option(
    "--bits",
    type=click.Choice(["3", "4", "5", "6", "8"]),
    help="Of a quantized weight; implies --quantize.  [4]",
)
@click.option(
    "--warm",
    type=Resolutions(),
    metavar="SIZE[,SIZE...]",
    help="Get ready for pictures of these sizes, HEIGHTxWIDTH.  [the model's own]",
)
@click.option("--no-warm", is_flag=True, help="Load the weights, and no more.")
@click.option("--env", "envs", multiple=True, metavar="KEY=VALUE", help="For the engines.")
@click.option("--allow-partial", is_flag=True, help="Go on without hosts that fail.")
@click.option("--pull", is_flag=True, help="Fetch the model where it is missing, without asking.")
@click.option("--force", is_flag=True, help="Also where that ends agents that a job holds.")
@click.option(
    "--keep-ssh",
    is_flag=True,
    help="Keep one ssh connection to each host while its agent lives (macOS's Local Network).",
)
@click.option("--rotate-keys", is_flag=True, help="New keys for you and for every agent.")
@click.option("--json", "as_json", is_flag=True, help="Tell it in JSON, one object a line.")
def up(
    hostfile: Path | None,
    model: str | None,
    dtype: str,
    quantize: bool,
    bits: str | None,
    warm: tuple[tuple[int, int], ...] | None,
    no_warm: bool,
    envs: tuple[str, ...],
    allow_partial: bool,
    pull: bool,
    force: bool,
    keep_ssh: bool,
    rotate_keys: bool,
    as_json: bool,
) -> None:
    """Start an agent on each host of HOSTFILE, and load weights.

    Without HOSTFILE, on this machine alone. Again, it only looks, and does what is missing; with
    another hostfile, it changes the mesh. `fluxmesh down` ends it.
    """
    from fluxmesh.errors import UsageError
    from fluxmesh.machine.awake import kept_awake
    from fluxmesh.planning.workload import ModelSizes, Workload
    from fluxmesh.request import GenerateRequest
    from fluxmesh.weights import hub
    from fluxmesh_coordinator.agents.status import survey
    from fluxmesh_coordinator.console import tables
    from fluxmesh_coordinator.console.up_report import watcher
    from fluxmesh_coordinator.deploy.bringup import Bringup
    from fluxmesh_coordinator.deploy.warmup import Warming

    if warm and no_warm:
        raise UsageError("--warm and --no-warm exclude each other; choose one.")
    with kept_awake(), watcher(as_json=as_json, pull=pull) as watch:
        name = model or hub.default_model()
        checkpoint = _checkpoint(name, watch)
        sizes = ModelSizes.of(checkpoint)
        request = GenerateRequest(
            prompt="",
            seed=0,
            model=hub.full_name(name),
            dtype=dtype,
            bits=int(bits) if bits else 4 if quantize else None,
        )
        work = Workload.of(sizes.fill(request), sizes)
        wish = replace(
            _wish(hostfile, work.weights, envs, allow_partial, rotate_keys, force),
            keep_ssh=keep_ssh,
        )
        mesh = Bringup(wish, watch).run()
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


def _checkpoint(name: str, watch: Watcher) -> Checkpoint:
    """The model on this machine, which plans with it; fetched where the user agrees."""
    from fluxmesh.errors import ModelNotFoundError
    from fluxmesh.weights import hub

    try:
        return hub.resolve(name, download=False)
    except ModelNotFoundError:
        if not watch.may_pull(name, [THIS]):
            raise
    watch.stage(f"Fetching {name}")
    return hub.resolve(
        name, progress=lambda done, total: watch.progress(THIS, f"fetching {name}", done, total)
    )


def _wish(
    hostfile: Path | None,
    weights: Any,
    envs: tuple[str, ...],
    allow_partial: bool,
    rotate_keys: bool,
    force: bool,
) -> Wish:
    from fluxmesh.cluster import hostfile as hostfiles
    from fluxmesh_coordinator.agents.mesh_file import THIS_NAME
    from fluxmesh_coordinator.deploy.bringup import Wish, this_machine

    roots: tuple[str, ...] = (weights.model,) if os.path.isabs(weights.model) else ()
    if hostfile is None:
        # This user's own machine: every model that the user can read is the user's to name.
        text, name, roots = this_machine(), THIS_NAME, ("/",)
        hosts = hostfiles.parse(text, name)
    else:
        name = str(hostfile.absolute())
        hosts = hostfiles.load(hostfile)
        text = hostfile.read_text(encoding="utf-8")
    given = tuple(_pair(item) for item in envs)
    merged = tuple({**dict(hosts.envs), **dict(given)}.items())
    return Wish(hosts, name, text, weights, merged, roots, allow_partial, rotate_keys, force)


def _pair(item: str) -> tuple[str, str]:
    from fluxmesh.errors import UsageError

    key, equals, value = item.partition("=")
    if not equals or not key.isidentifier():
        raise UsageError(f"--env {item}: expected KEY=VALUE, such as --env NCCL_DEBUG=INFO.")
    return key, value
