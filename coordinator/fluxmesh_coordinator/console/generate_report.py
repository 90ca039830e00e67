"""Tells how a job goes: to people as progress on a terminal, to programs as JSON lines.

People read notes and progress on stderr and the names of finished files on stdout; programs
(`--json`) read one JSON object a line on stdout, and nothing else stands there.
"""

from __future__ import annotations

import sys
import time
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fluxmesh.events import (
    Encoded,
    Event,
    HostLost,
    Loading,
    Peak,
    Picture,
    Planned,
    Queued,
    Step,
)
from fluxmesh.request import GenerateRequest
from fluxmesh_coordinator.console.json_lines import emit
from fluxmesh_coordinator.console.terminal import say

PHASES = {"text": "text", "denoise": "generation", "decode": "decoding"}


class Reporter(Protocol):
    """What a job is told to; a context manager, so that the terminal is put right again."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def note(self, text: str) -> None:
        """One sentence for people."""

    def downloading(self, model: str, done_bytes: int, total_bytes: int) -> None:
        """A checkpoint's files are on their way."""

    def started(self, request: GenerateRequest, model: dict[str, Any]) -> None:
        """A request, complete with size and steps, is about to run."""

    def event(self, event: Event) -> None:
        """The job's next event."""

    def saved(self, path: Path, seeds: list[int]) -> None:
        """A file with the images of these seeds is in its place."""

    def finished(self) -> None:
        """All requests are done."""


def progress_bar(console: Console) -> Progress:
    """Nothing into a file; each task has a `unit`, what stands behind its bar."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        TextColumn("{task.fields[unit]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


class GenerateTerminalReporter:
    """A progress bar with time left, the files as they appear, peaks of memory when asked."""

    def __init__(self, *, verbose: bool = False, console: Console | None = None) -> None:
        self.verbose = verbose
        self.console = console or Console(stderr=True, highlight=False)
        self.progress = progress_bar(self.console)
        self.request: GenerateRequest | None = None
        self.task: TaskID | None = None
        self.doing: str | None = None  # what the bar counts bytes of, None when it counts steps
        self.peaks: dict[str, int] = {}
        self.began = 0.0  # when the request was planned
        self.predicted = 0.0  # seconds from then on
        self.place = 0  # in line
        self.bytes: dict[int | None, tuple[int, int]] = {}  # read by each host, and in all
        self.steps: dict[int, int] = {}  # done of each image

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.rest()

    def rest(self) -> None:
        """Takes the bar off the screen, until there is something to show again."""
        self._clear()
        self.progress.stop()

    def note(self, text: str) -> None:
        say(self.console, text)

    def downloading(self, model: str, done_bytes: int, total_bytes: int) -> None:
        self._bytes(f"Downloading {model}", done_bytes, total_bytes)

    def started(self, request: GenerateRequest, model: dict[str, Any]) -> None:
        self.request = request
        self.began = self.predicted = 0.0
        self.place = 0
        self.steps = {}
        self._clear()

    def event(self, event: Event) -> None:
        match event:
            case Loading():
                self._loading(event)
            case Step():
                self._step(event)
            case Peak():
                self.peaks[event.phase] = max(event.bytes, self.peaks.get(event.phase, 0))
                if self.verbose and event.phase == "decode":  # the last of a job
                    took = time.monotonic() - self.began
                    self.note(f"Took {took:.2f} s; {self.predicted:.2f} s was predicted.")
            case Queued():
                self._queued(event)
            case Planned():
                self._planned(event)
            case HostLost():
                self.note(f"Host {event.host} ({event.name}) is lost: {event.reason}")
            case Encoded() if self.verbose:
                again = " (seen before)" if event.cached else ""
                self.note(f"Read the prompt in {event.seconds:.2f} s{again}.")
            case Picture() if self.verbose:
                self._pictured(event)

    def saved(self, path: Path, seeds: list[int]) -> None:
        first, last = seeds[0], seeds[-1]
        which_seeds = f"seed {first}" if first == last else f"seeds {first} to {last}"
        # Through the console that draws the bar, so that the two don't mix on one screen;
        # to stdout itself when that goes elsewhere.
        if sys.stdout.isatty() and self.console.is_terminal:
            self.note(f"Saved {path} ({which_seeds})")
        else:
            sys.stdout.write(f"Saved {path} ({which_seeds})\n")
            sys.stdout.flush()

    def finished(self) -> None:
        self.rest()
        if self.verbose and self.peaks:
            for phase, name in PHASES.items():
                if phase in self.peaks:
                    self._peak(f"for the {name}", self.peaks[phase])
            self._peak("overall", max(self.peaks.values()))

    def _pictured(self, event: Picture) -> None:
        cache = self.request.cache if self.request else 0.0
        how = ""
        if cache:
            computed = event.steps - event.reused
            how = f" Approximate (--cache {cache:g}): {computed} of {event.steps} steps computed, "
            how += f"{event.reused} reused."
        self.note(f"Image {event.image + 1} (seed {event.seed}): {event.seconds:.2f} s.{how}")

    def _queued(self, event: Queued) -> None:
        if event.place == self.place:
            return
        self.place = event.place
        about = f", about {event.seconds:.0f} s" if event.seconds >= 1 else ""
        self.note(f"Host {event.host} is in use: {_ordinal(event.place)} in line{about}.")

    def _planned(self, event: Planned) -> None:
        now = time.monotonic()
        self.began = self.began or now
        self.predicted = now - self.began + event.seconds
        if self.verbose:
            ranks = ", ".join(map(str, event.hosts))
            hosts = f"host {ranks}" if len(event.hosts) == 1 else f"hosts {ranks}"
            self.note(f"Plan: {event.placement} on {hosts}, {event.seconds:.2f} s. {event.reason}")
        if event.notice:
            self.note(event.notice)

    def _loading(self, event: Loading) -> None:
        """One bar for all hosts that read the same."""
        doing = f"Loading {event.component}"
        if doing != self.doing:
            self.bytes = {}
        self.bytes[event.host] = (event.done_bytes, event.total_bytes)
        done, total = (sum(parts) for parts in zip(*self.bytes.values(), strict=True))
        self._bytes(doing, done, total)

    def _peak(self, what: str, nbytes: int) -> None:
        label = f"Peak memory used {what}:"
        self.note(f"{label:<37}{nbytes / 1024**3:.3f}GB")

    def _bytes(self, doing: str, done: int, total: int) -> None:
        if doing != self.doing:
            self._clear()
            self.doing = doing
            self.task = self._bar(doing)
        assert self.task is not None
        unit = f"{done / 1e9:.2f}/{total / 1e9:.2f} GB"
        self.progress.update(self.task, total=total, completed=done, unit=unit)

    def _step(self, event: Step) -> None:
        images = self.request.n_images if self.request else 1
        self.steps[event.image] = event.step
        if self.task is None or self.doing is not None:
            self._clear()
            self.task = self._bar("")
        self.progress.update(
            self.task,
            description=f"Image {event.image + 1}/{images}",
            total=images * event.steps,
            completed=sum(self.steps.values()),
            unit=f"step {event.step}/{event.steps}" if event.step < event.steps else "decoding",
        )

    def _bar(self, doing: str) -> TaskID:
        self.progress.start()
        return self.progress.add_task(doing, unit="")

    def _clear(self) -> None:
        if self.task is not None:
            self.progress.remove_task(self.task)
        self.task = self.doing = None


def _ordinal(number: int) -> str:
    teen = number % 100 in (11, 12, 13)
    return f"{number}{'th' if teen else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"


class GenerateJsonReporter:
    """One JSON object a line: each event by its name, with its fields (pixels left out)."""

    def __init__(self) -> None:
        self.files: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        sys.stdout.flush()

    def note(self, text: str) -> None:
        self._line("note", {"text": text})

    def downloading(self, model: str, done_bytes: int, total_bytes: int) -> None:
        values = {"model": model, "done_bytes": done_bytes, "total_bytes": total_bytes}
        self._line("download", values)

    def started(self, request: GenerateRequest, model: dict[str, Any]) -> None:
        shown = (
            "prompt",
            "seed",
            "n_images",
            "height",
            "width",
            "steps",
            "guidance",
            "dtype",
            "cache",
        )
        self._line("start", {name: getattr(request, name) for name in shown} | {"model": model})

    def event(self, event: Event) -> None:
        values = {field.name: getattr(event, field.name) for field in fields(event)}
        shown = {
            name: value
            for name, value in values.items()
            if value is not None and not isinstance(value, np.ndarray)
        }
        self._line(type(event).__name__.lower(), shown)

    def saved(self, path: Path, seeds: list[int]) -> None:
        self.files.append(str(path))
        self._line("saved", {"path": str(path), "seeds": seeds})

    def finished(self) -> None:
        self._line("done", {"files": self.files})

    def _line(self, event: str, values: dict[str, Any]) -> None:
        emit(event, **values)
