"""A training run from the command line: options become a request, events become files and words.

Beside the adapters and checkpoints that the training writes itself, the output folder gets
`metrics.jsonl` (a line for each update and each validation) and the progress pictures. Nothing is
imported that computes until the request is known to be sound.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from fluxmesh.errors import CancelledError, UsageError
from fluxmesh.events import Loading
from fluxmesh.training import checkpoint
from fluxmesh.training.events import (
    CheckpointSaved,
    Encoding,
    Finished,
    Prepared,
    Progress,
    TrainEvent,
    Updated,
    Validated,
)
from fluxmesh.training.request import TrainRequest
from fluxmesh_coordinator.output import encode_png, write_file
from fluxmesh_coordinator.recipe import Recipe, sha256_of
from fluxmesh_coordinator.settings import draw_seed

METRICS = "metrics.jsonl"
DEFAULT_BITS = 4


def request_of(dataset: str, chosen: Mapping[str, Any]) -> TrainRequest:
    """The request for what the user chose; a resumed run keeps the seed that it began with."""
    names = {field.name for field in fields(TrainRequest)}
    values = {name: chosen[name] for name in names & chosen.keys()}
    if "bits" in values:
        values["bits"] = int(values["bits"])
    elif chosen.get("quantize"):
        values["bits"] = DEFAULT_BITS
    if "seed" not in values:
        values["seed"] = draw_seed()
        if values.get("resume"):
            begun = checkpoint.latest(Path(values.get("output_dir", TrainRequest.output_dir)))
            values["seed"] = begun.request["seed"] if begun else values["seed"]
    if "model" not in values:
        from fluxmesh.flux import hub

        values["model"] = hub.default_model()
    return TrainRequest(**(values | {"dataset": dataset}))


class TrainReporter(Protocol):
    """What a run is told to; a context manager, so that the terminal is put right again."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def started(self, request: TrainRequest) -> None:
        """The request is sound; the data set comes next."""

    def event(self, event: TrainEvent | Loading) -> None:
        """The run's next event."""

    def saved(self, path: Path) -> None:
        """A file that the user asked for is in its place."""


def conduct(request: TrainRequest, reporter: TrainReporter) -> None:
    """Runs a training to its end; raises what `fluxmesh.training.trainer.train` raises."""
    from fluxmesh.flux import precision

    precision.prepare(request.dtype)
    from fluxmesh.training.trainer import train

    reporter.started(request)
    follow(train(request, reporter.event), request, reporter)


def follow(
    events: Generator[TrainEvent, None, None], request: TrainRequest, reporter: TrainReporter
) -> None:
    """Reports `events`, and writes the metrics and the progress pictures.

    Ctrl-C becomes `CancelledError` once the run has left its checkpoint.
    """
    revision = ""
    try:
        with closing(events):
            for event in events:
                if isinstance(event, Prepared):
                    revision = event.revision
                keep(event, request, revision, reporter)
                reporter.event(event)
    except KeyboardInterrupt:
        raise CancelledError("Stopped; go on with --resume.") from None


def keep(event: TrainEvent, request: TrainRequest, revision: str, reporter: TrainReporter) -> None:
    """Writes what stays of an event."""
    folder = Path(request.output_dir)
    match event:
        case Prepared():
            folder.mkdir(parents=True, exist_ok=True)
            rewind(folder / METRICS, request.micro_batches(event.begins_at).start)
        case Updated() | Validated():
            with open(folder / METRICS, "a", encoding="utf-8") as file:
                file.write(json.dumps(told(event)) + "\n")
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


def told(event: TrainEvent | Loading) -> dict[str, Any]:
    """An event as JSON: its name and its fields, pixels left out."""
    values: dict[str, Any] = {"event": type(event).__name__.lower()}
    for field in fields(event):
        value = getattr(event, field.name)
        if isinstance(value, Path):
            value = str(value)
        elif isinstance(value, dict):
            value = {"x".join(map(str, size)): count for size, count in value.items()}
        if not isinstance(value, np.ndarray):
            values[field.name] = value
    return values


class JsonReporter:
    """One JSON object a line on stdout."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        sys.stdout.flush()

    def started(self, request: TrainRequest) -> None:
        values = {"dataset": request.dataset, "model": request.model, **request.identity()}
        self._line({"event": "start", **values})

    def event(self, event: TrainEvent | Loading) -> None:
        self._line(told(event))

    def saved(self, path: Path) -> None:
        self._line({"event": "saved", "path": str(path)})

    def _line(self, values: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(values, ensure_ascii=False) + "\n")
        sys.stdout.flush()


class TerminalReporter:
    """What will be done, then a bar with loss, memory and the time left; files on stdout."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[told]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.request: TrainRequest | None = None
        self.updates = 0
        self.task: TaskID | None = None
        self.doing = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.bar.stop()

    def started(self, request: TrainRequest) -> None:
        self.request = request
        self._note(f"Training {request.model} on {request.dataset} (seed {request.seed}).")

    def saved(self, path: Path) -> None:
        self.bar.stop()
        sys.stdout.write(f"Saved {path}\n")
        sys.stdout.flush()

    def event(self, event: TrainEvent | Loading) -> None:
        match event:
            case Loading():
                unit = f"{event.done_bytes / 1e9:.2f}/{event.total_bytes / 1e9:.2f} GB"
                self._show(f"Loading {event.component}", event.done_bytes, event.total_bytes, unit)
            case Encoding():
                unit = f"{event.done}/{event.total}"
                self._show(f"Encoding {event.what}", event.done, event.total, unit)
            case Prepared():
                self._prepared(event)
            case Updated():
                unit = (
                    f"{event.update}/{self.updates} loss {event.loss:.4f} "
                    f"{event.seconds:.2f} s {event.peak_bytes / 1e9:.1f} GB"
                )
                self._show("Training", event.update, self.updates, unit)
            case Validated():
                best = ", the best so far" if event.best else ""
                self._note(f"Iteration {event.iteration}: loss {event.loss:.4f} held out{best}.")
            case CheckpointSaved():
                self._note(f"Iteration {event.iteration}: saved {event.path.name}.")

    def _prepared(self, event: Prepared) -> None:
        self.updates = event.updates
        sizes = ", ".join(f"{n} at {size[0]}x{size[1]}" for size, n in event.sizes.items())
        images = event.micro_batches * event.batch_size
        self._note(f"{event.images} pictures ({sizes}), {event.held_out} held out.")
        self._note(
            f"{event.updates} updates of {images} images, {event.numbers / 1e6:.2f} M numbers to "
            f"train, warm-up {event.warmup}."
        )
        if event.begins_at:
            self._note(f"Going on after update {event.begins_at}.")

    def _note(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False)

    def _show(self, doing: str, done: int, total: int, unit: str) -> None:
        if doing != self.doing or self.task is None:
            if self.task is not None:
                self.bar.remove_task(self.task)
            self.doing = doing
            self.task = self.bar.add_task(doing, total=total, told=unit)
        self.bar.start()
        self.bar.update(self.task, completed=done, told=unit)
