"""A training run from the command line: options become a request, events become files and words.

Beside the adapters and checkpoints that the training writes itself, the output folder gets
`metrics.jsonl` (a line for each update and each validation), the progress pictures and
`report.html`. Nothing is imported that computes until the request is known to be sound.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any

from fluxmesh.errors import CancelledError, UsageError
from fluxmesh.storage.atomic import write_file
from fluxmesh.storage.hashing import sha256_of
from fluxmesh.training import checkpoint
from fluxmesh.training.events import (
    Finished,
    Prepared,
    Progress,
    TrainEvent,
    Updated,
    Validated,
)
from fluxmesh.training.request import TrainRequest
from fluxmesh_coordinator.agents import mesh_file
from fluxmesh_coordinator.artifacts.pictures import encode_png
from fluxmesh_coordinator.artifacts.recipe import Recipe
from fluxmesh_coordinator.artifacts.training_html import METRICS
from fluxmesh_coordinator.commands.settings import draw_seed
from fluxmesh_coordinator.console.train_report import RunEvent, TrainReporter, as_json
from fluxmesh_coordinator.console.training_page import TrainingPage

DEFAULT_BITS = 4
NEEDS = {  # settings, each with the one that it is about
    "prior_weight": "prior_folder",
    "progress_every": "progress_prompt",
    "progress_steps": "progress_prompt",
}
FOUND_OUT = ("seed", "learning_rate", "warmup_steps")  # where the user gave none


def request_of(dataset: str, chosen: Mapping[str, Any]) -> TrainRequest:
    """The request for what the user chose; a resumed run keeps what it found out as it began.

    Raises `UsageError` for an option that would do nothing.
    """
    names = {field.name for field in fields(TrainRequest)}
    values = {name: chosen[name] for name in names & chosen.keys()}
    if "bits" in values:
        values["bits"] = int(values["bits"])
    elif chosen.get("quantize"):
        values["bits"] = DEFAULT_BITS
    if values.get("resume"):
        begun = checkpoint.latest(Path(values.get("output_dir", TrainRequest.output_dir)))
        kept = {name: begun.request[name] for name in FOUND_OUT} if begun else {}
        values = kept | values
    values.setdefault("seed", draw_seed())
    _check_effects(chosen)
    if "model" not in values:
        from fluxmesh_coordinator.runtime.default_model import default_to_train

        values["model"] = default_to_train()
    return TrainRequest(**(values | {"dataset": dataset}))


def _check_effects(values: Mapping[str, Any]) -> None:
    """Raises `UsageError` for what was chosen and would change nothing."""
    for setting, needed in NEEDS.items():
        if setting in values and not values.get(needed):
            raise UsageError.about(setting, f"has no effect without `{needed}`", "give both")
    if "weight_decay" in values and values.get("optimizer") != "adamw":
        raise UsageError.about("weight_decay", "is of adamw", "choose it with `optimizer`")


def conduct(request: TrainRequest, reporter: TrainReporter) -> None:
    """Runs a training on the mesh that is up, or in this process; raises as both of them do.

    `fluxmesh/training/local_executor.py` says why alone is not a mesh of one here.
    """
    from fluxmesh.engine import gpu_errors, tf32

    tf32.prepare(request.dtype)
    reporter.started(request)
    page = TrainingPage(request)

    def tell(event: RunEvent) -> None:
        page.event(event)
        reporter.event(event)

    record = mesh_file.load()
    if record is None:
        gpu_errors.relax()
        from fluxmesh.training.local_executor import train

        follow(train(request, tell), request, reporter, page)
        return
    from fluxmesh_coordinator.runtime.mesh import Mesh

    with Mesh.of_user(record) as mesh:
        follow(mesh.train(request, tell), request, reporter, page)


def follow(
    events: Generator[TrainEvent, None, None],
    request: TrainRequest,
    reporter: TrainReporter,
    page: TrainingPage,
) -> None:
    """Reports `events`, and writes the metrics, the progress pictures and the page.

    Ctrl-C becomes `CancelledError` once the run has left its checkpoint.
    """
    revision = ""
    try:
        with closing(events):
            for event in events:
                if isinstance(event, Prepared):
                    revision = event.revision
                keep(event, request, revision, reporter)
                page.event(event)
                reporter.event(event)
    except BaseException as error:
        page.ended(error)
        if isinstance(error, KeyboardInterrupt):
            raise CancelledError("Stopped; go on with `resume`.") from None
        raise


def keep(event: TrainEvent, request: TrainRequest, revision: str, reporter: TrainReporter) -> None:
    """Writes what stays of an event."""
    folder = Path(request.output_dir)
    match event:
        case Prepared():
            folder.mkdir(parents=True, exist_ok=True)
            rewind(folder / METRICS, request.micro_batches(event.begins_at).start)
        case Updated() | Validated():
            with open(folder / METRICS, "a", encoding="utf-8") as file:
                file.write(json.dumps(as_json(event)) + "\n")
        case Progress():
            path = folder / f"{event.iteration:07d}_progress.png"
            text = progress_recipe(request, event, revision).to_json()
            write_file(path, encode_png(event.pixels, text), replace=True)
            reporter.saved(path)
        case Finished():
            reporter.saved(event.path)


def rewind(metrics: Path, iteration: int) -> None:
    """Takes away what a run had told of iterations that its resume goes through again."""
    if not metrics.exists():
        return
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and _iteration(line) <= iteration]
    write_file(metrics, "".join(kept).encode(), replace=True)


def _iteration(line: str) -> int:
    try:
        return int(json.loads(line)["iteration"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{METRICS} has a line that is not fluxmesh's; move it away.") from error


def progress_recipe(request: TrainRequest, event: Progress, revision: str) -> Recipe:
    """How a progress picture came about; its adapter is there where a checkpoint was saved too."""
    adapters = []
    if event.iteration:
        path = checkpoint.adapters_path(Path(request.output_dir), event.iteration)
        adapters = [(str(path), 1.0, sha256_of(str(path)) if path.exists() else "")]
    height, width = event.pixels.shape[:2]
    return Recipe(
        prompt=request.progress_prompt,
        model=request.model,
        seed=request.seed,
        height=height,
        width=width,
        steps=event.steps,
        guidance=request.guidance,
        revision=revision,
        dtype=request.dtype,
        bits=request.bits,
        adapters=tuple(adapters),
    )
