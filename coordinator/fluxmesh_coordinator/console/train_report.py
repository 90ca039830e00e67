"""Tells how a training goes: to people as a bar with the loss, to programs as JSON lines.

People read notes and the bar on stderr and the names of files on stdout; programs (`--json`) read
one JSON object a line on stdout.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from rich.console import Console
from rich.progress import TaskID

from fluxmesh.events import BackendChanged, HostLost, HostUnfit, Loading, Queued
from fluxmesh.training.events import (
    CheckpointSaved,
    Dealt,
    Encoding,
    Finished,
    Note,
    Prepared,
    TrainEvent,
    Updated,
    Validated,
)
from fluxmesh.training.request import TrainRequest
from fluxmesh_coordinator.console.generate_report import of_bytes, progress_bar
from fluxmesh_coordinator.console.json_lines import Paced, emit
from fluxmesh_coordinator.console.terminal import say

NAMES: dict[type, str] = {
    CheckpointSaved: "checkpoint"
}  # events that are not called as their class is
# Of a training, alone or on hosts.
RunEvent = TrainEvent | Loading | HostLost | HostUnfit | BackendChanged | Queued


class TrainReporter(Protocol):
    """What a run is told to; a context manager, so that the terminal is put right again."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def started(self, request: TrainRequest) -> None:
        """The request is sound; the data set comes next."""

    def event(self, event: RunEvent) -> None:
        """The run's next event."""

    def saved(self, path: Path) -> None:
        """A file that the user asked for is in its place."""


def as_json(event: RunEvent) -> dict[str, Any]:
    """An event as JSON: its name and its fields, pictures left out."""
    values: dict[str, Any] = {"event": NAMES.get(type(event), type(event).__name__.lower())}
    for field in fields(event):
        value = getattr(event, field.name)
        if isinstance(value, Path):
            value = str(value)
        elif isinstance(value, dict):
            value = {_key(key): count for key, count in value.items()}
        if not isinstance(value, np.ndarray) and field.name != "examples":
            values[field.name] = value
    return values


def _key(key: Any) -> str:
    """A size as 512x768, a host's rank as it is."""
    return "x".join(map(str, key)) if isinstance(key, tuple) else str(key)


class TrainJsonReporter:
    """One JSON object a line on stdout, in the words that `generate --json` has too."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self._paced = Paced()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        sys.stdout.flush()

    def started(self, request: TrainRequest) -> None:
        values = {"dataset": request.dataset, "model": request.model, **request.identity()}
        emit("start", **values)

    def event(self, event: RunEvent) -> None:
        match event:
            case Loading():
                is_told = self._paced.passes("loading", event.done_bytes, event.total_bytes)
            case Encoding():
                is_told = self._paced.passes("encoding", event.done, event.total)
            case _:
                is_told = True
        if isinstance(event, Finished):
            emit("done", files=self.files)
        elif is_told:
            emit(**as_json(event))

    def saved(self, path: Path) -> None:
        self.files.append(str(path))
        emit("saved", path=str(path))


class TrainTerminalReporter:
    """What will be done, then a bar with loss, memory and the time left; files on stdout."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self.bar = progress_bar(self.console)
        self.request: TrainRequest | None = None
        self.iterations = 0
        self.task: TaskID | None = None
        self.doing = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.bar.stop()

    def started(self, request: TrainRequest) -> None:
        self.request, self.iterations = request, request.iterations
        self._note(f"Training {request.model} on {request.dataset} (seed {request.seed}).")

    def saved(self, path: Path) -> None:
        self.bar.stop()
        sys.stdout.write(f"Saved {path}\n")
        sys.stdout.flush()

    def event(self, event: RunEvent) -> None:
        match event:
            case Loading():
                unit = of_bytes(event.done_bytes, event.total_bytes)
                self._show(f"Loading {event.component}", event.done_bytes, event.total_bytes, unit)
            case Encoding():
                unit = f"{event.done}/{event.total}"
                self._show(f"Encoding {event.what}", event.done, event.total, unit)
            case Queued():
                self._note(f"Host {event.host} is busy: number {event.place} in line.")
            case HostLost() | HostUnfit():
                self._note(f"Host {event.host} ({event.name}): {event.reason} The rest goes on.")
            case BackendChanged():
                self._note(f"{event}")
            case Note():
                self._note(event.text)
            case Dealt():
                self._note(f"{event}.")
            case Prepared():
                self._prepared(event)
            case Updated():
                unit = (
                    f"{event.iteration}/{self.iterations} loss {event.loss:.4f} "
                    f"{event.seconds:.2f} s {event.peak_bytes / 1e9:.1f} GB"
                )
                self._show("Training", event.iteration, self.iterations, unit)
            case Validated():
                best = ", the best so far" if event.best else ""
                self._note(f"Iteration {event.iteration}: loss {event.loss:.4f} held out{best}.")
            case CheckpointSaved():
                self._note(f"Iteration {event.iteration}: saved {event.path.name}.")

    def _prepared(self, event: Prepared) -> None:
        sizes = ", ".join(f"{n} at {size[0]}x{size[1]}" for size, n in event.sizes.items())
        images = event.micro_batches * event.batch_size
        beside = f", {event.priors} to keep the prior" if event.priors else ""
        self._note(f"{event.images} pictures ({sizes}), {event.held_out} held out{beside}.")
        self._note(
            f"{self.iterations} iterations: {event.updates} updates of {images} images, rate "
            f"{event.rate:g} after {event.warmup} of them, {event.numbers / 1e6:.2f} M numbers to "
            "train."
        )
        if event.begins_at:
            iteration = min(event.begins_at * event.micro_batches, self.iterations)
            self._note(f"Going on after iteration {iteration}.")

    def _note(self, text: str) -> None:
        say(self.console, text)

    def _show(self, doing: str, done: int, total: int, unit: str) -> None:
        if doing != self.doing or self.task is None:
            if self.task is not None:
                self.bar.remove_task(self.task)
            self.doing = doing
            self.task = self.bar.add_task(doing, total=total, unit=unit)
        self.bar.start()
        self.bar.update(self.task, completed=done, unit=unit)
