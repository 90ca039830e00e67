"""Tells how a job goes: to people as progress on a terminal, to programs as JSON lines.

People read notes and progress on stderr and the names of finished files on stdout; programs
(`--json`) read one JSON object a line on stdout, and nothing else stands there.
"""

from __future__ import annotations

import base64
import os
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
)
from rich.text import Text

from fluxmesh.events import (
    BackendChanged,
    Encoded,
    Event,
    HostLost,
    HostUnfit,
    Loading,
    Peak,
    Picture,
    Planned,
    Preview,
    Queued,
    Step,
)
from fluxmesh.request import GenerateRequest
from fluxmesh_coordinator.artifacts.pictures import encode_png
from fluxmesh_coordinator.console.daily_hints import is_due
from fluxmesh_coordinator.console.json_lines import Paced, emit
from fluxmesh_coordinator.console.tables import ordinal
from fluxmesh_coordinator.console.terminal import say
from fluxmesh_coordinator.console.terminal_pictures import (
    KNOWN,
    TerminalPreview,
    drawing,
    open_in_viewer,
    protocol_of,
)

PROMPT_WIDTH = 48  # characters, where a prompt stands behind a file's name
PHASES = {"text": "text", "denoise": "generation", "decode": "decoding"}


class Reporter(Protocol):
    """What a job is told to; a context manager, so that the terminal is put right again."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_error: object) -> None: ...

    @property
    def shows_previews(self) -> bool:
        """Whether what is not finished is to be shown: else nobody need make it."""
        ...

    def note(self, text: str) -> None:
        """One sentence for people."""

    def hint(self, name: str, text: str) -> None:
        """What a user may not know yet, once a day at most; a program is not told."""

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


class TimeLeftColumn(ProgressColumn):
    """The one time that a bar tells: what is left of it, as far as its pace says."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        left = task.time_remaining
        if left is None or task.finished:
            return Text("")
        minutes, seconds = divmod(round(left), 60)
        hours, minutes = divmod(minutes, 60)
        clock = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
        return Text(f"{clock} left", style="progress.remaining")


def shortened(prompt: str, width: int = PROMPT_WIDTH) -> str:
    """A prompt on part of a line: its first words, as many as `width` characters hold."""
    line = " ".join(prompt.split())
    if len(line) <= width:
        return line
    return f"{line[: width - 1].rsplit(' ', 1)[0]}…"


def progress_bar(console: Console) -> Progress:
    """Nothing into a file; each task has a `unit`, what stands behind its bar."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        TextColumn("{task.fields[unit]}"),
        TimeLeftColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


@dataclass(frozen=True)
class Display:
    """What becomes of a picture on the screen, once it is saved."""

    opens: bool = False  # in the machine's own viewer
    shows: bool = False  # in the terminal, if that can
    previews: bool = False  # and there while it is painted


class GenerateTerminalReporter:
    """A progress bar with time left, the files as they appear, peaks of memory when asked."""

    def __init__(
        self,
        *,
        verbose: bool = False,
        names_prompts: bool = False,
        display: Display | None = None,
        console: Console | None = None,
    ) -> None:
        """`names_prompts`: each file that is saved is told with its prompt, which are several."""
        self.verbose, self.names_prompts = verbose, names_prompts
        self.display = display or Display()
        self.console = console or Console(stderr=True, highlight=False)
        self.progress = progress_bar(self.console)
        self.preview = TerminalPreview(self.console, os.environ)
        self.request: GenerateRequest | None = None
        self.task: TaskID | None = None
        self.doing: str | None = None  # what the bar counts bytes of, None when it counts steps
        self.peaks: dict[str, int] = {}
        self.began = 0.0  # when the request was planned
        self.predicted = 0.0  # seconds from then on
        self.place = 0  # in line
        self.bytes: dict[int | None, tuple[int, int]] = {}  # read by each host, and in all
        self.steps: dict[int, int] = {}  # done of each image
        self.decoding: Step | None = None  # the last step of an image that is not there yet

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.rest()

    def rest(self) -> None:
        """Takes the bar off the screen, until there is something to show again."""
        self._clear()
        self.progress.stop()
        self.preview.erase()

    @property
    def shows_previews(self) -> bool:
        return self.display.previews and self.preview.can_show

    def note(self, text: str) -> None:
        self._erase_preview()
        say(self.console, text)

    def hint(self, name: str, text: str) -> None:
        if is_due(name):
            self.note(text)

    def downloading(self, model: str, done_bytes: int, total_bytes: int) -> None:
        self._bytes(f"Downloading {model}", done_bytes, total_bytes)

    def started(self, request: GenerateRequest, model: dict[str, Any]) -> None:
        self.request = request
        self.began = self.predicted = 0.0
        self.place = 0
        self.steps = {}
        self.decoding = None
        self._clear()

    def event(self, event: Event) -> None:
        match event:
            case Loading():
                self._loading(event)
            case Step():
                self._step(event)
            case Preview():
                self._preview(event)
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
            case HostUnfit():
                self.note(f"Host {event.host} ({event.name}) takes no part: {event.reason}")
            case BackendChanged():
                self.note(f"{event}")
            case Encoded():
                self._encoded(event)
            case Picture():
                self.decoding = None
                self._erase_preview()
                if self.verbose:
                    self._pictured(event)

    def saved(self, path: Path, seeds: list[int]) -> None:
        first, last = seeds[0], seeds[-1]
        which_seeds = f"seed {first}" if first == last else f"seeds {first} to {last}"
        prompt = self.request.prompt if self.request and self.names_prompts else ""
        line = f"Saved {path} ({which_seeds}){prompt and f': {shortened(prompt)}'}"
        # Through the console that draws the bar, so that the two don't mix on one screen;
        # to stdout itself when that goes elsewhere.
        if sys.stdout.isatty() and self.console.is_terminal:
            self.note(line)
        else:
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()
        self._display(path)

    def _display(self, path: Path) -> None:
        """Shows a file where the user asked for it; in a pipe there is nobody to see it."""
        if self.display.opens and (problem := open_in_viewer(path)):
            self.note(problem)
        if not (self.display.shows and sys.stdout.isatty()):
            return
        protocol = protocol_of(os.environ)
        if protocol is None:
            self.hint("show", f"This terminal shows no pictures; {KNOWN} do.")
            return
        self.rest()  # a bar that is drawn again would run over the picture
        sys.stdout.write(drawing(path.read_bytes(), protocol, path.name))
        sys.stdout.flush()

    def finished(self) -> None:
        self.rest()
        if self.verbose and self.peaks:
            for phase, name in PHASES.items():
                if phase in self.peaks:
                    self._peak(f"for the {name}", self.peaks[phase])
            self._peak("overall", max(self.peaks.values()))

    def _encoded(self, event: Encoded) -> None:
        for what, cut, end in event.cuts:
            self.note(cut.sentence(end, what))
        if self.verbose:
            again = " (seen before)" if event.cached else ""
            self.note(f"Read the prompt in {event.seconds:.2f} s{again}.")

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
        self.note(f"Host {event.host} is in use: {ordinal(event.place)} in line{about}.")

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
        if self.decoding is None:
            self._bytes(doing, done, total)
            return
        self._step(self.decoding)  # what is loaded now is a part of it
        if self.task is not None and 0 < done < total:
            unit = f"decoding, {event.component} {of_bytes(done, total)}"
            self.progress.update(self.task, unit=unit)

    def _peak(self, what: str, nbytes: int) -> None:
        label = f"Peak memory used {what}:"
        self.note(f"{label:<37}{nbytes / 1024**3:.3f}GB")

    def _bytes(self, doing: str, done: int, total: int) -> None:
        if doing != self.doing:
            self._clear()
            self.doing = doing
            self.task = self._bar(doing)
        assert self.task is not None
        unit = of_bytes(done, total)
        self.progress.update(self.task, total=total, completed=done, unit=unit)

    def _step(self, event: Step) -> None:
        images = self.request.n_images if self.request else 1
        self.steps[event.image] = event.step
        self.decoding = event if event.step == event.steps else None
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

    def _preview(self, event: Preview) -> None:
        if self.shows_previews:
            self.progress.stop()  # a bar that is drawn again would run over the picture
            self.preview.show(encode_png(event.pixels, None))
            self.progress.start()

    def _erase_preview(self) -> None:
        if self.preview.is_shown:
            self.progress.stop()
            self.preview.erase()
            self.progress.start()

    def _bar(self, doing: str) -> TaskID:
        self.progress.start()
        return self.progress.add_task(doing, unit="")

    def _clear(self) -> None:
        if self.task is not None:
            self.progress.remove_task(self.task)
        self.task = self.doing = None


def of_bytes(done: int, total: int) -> str:
    """So many of so many, in the unit that suits all of them."""
    if total >= 1e9:
        return f"{done / 1e9:.2f}/{total / 1e9:.2f} GB"
    return f"{done / 1e6:.1f}/{total / 1e6:.1f} MB"


class GenerateJsonReporter:
    """One JSON object a line: each event by its name, with its fields (pixels left out)."""

    def __init__(self, *, previews: bool = False) -> None:
        """`previews`: pictures that are not finished are told too, as PNG in base64."""
        self.shows_previews = previews
        self.files: list[str] = []
        self._paced = Paced()
        self.prompt = ""  # that is painted now

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        sys.stdout.flush()

    def note(self, text: str) -> None:
        self._line("note", {"text": text})

    def hint(self, name: str, text: str) -> None:
        pass

    def downloading(self, model: str, done_bytes: int, total_bytes: int) -> None:
        values = {"model": model, "done_bytes": done_bytes, "total_bytes": total_bytes}
        if self._paced.passes("download", done_bytes, total_bytes):
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
        self.prompt = request.prompt
        self._line("start", {name: getattr(request, name) for name in shown} | {"model": model})

    def event(self, event: Event) -> None:
        if isinstance(event, Loading) and not self._paced.passes(
            "loading", event.done_bytes, event.total_bytes
        ):
            return
        values = {field.name: getattr(event, field.name) for field in fields(event)}
        shown = {
            name: value
            for name, value in values.items()
            if value is not None and not isinstance(value, np.ndarray)
        }
        if isinstance(event, Preview):
            shown["png"] = base64.b64encode(encode_png(event.pixels, None)).decode()
        self._line(type(event).__name__.lower(), shown)

    def saved(self, path: Path, seeds: list[int]) -> None:
        self.files.append(str(path))
        self._line("saved", {"path": str(path), "seeds": seeds, "prompt": self.prompt})

    def finished(self) -> None:
        self._line("done", {"files": self.files})

    def _line(self, event: str, values: dict[str, Any]) -> None:
        emit(event, **values)
