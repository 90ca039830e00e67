"""Keeps `report.html` up to date while a training runs: events become what the page tells.

Beside `train_report.py`. The page is written as a run begins and ends, with every checkpoint and
picture, and every few seconds between; its reader's browser asks for it again as often.
"""

from __future__ import annotations

import html
import shlex
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from fluxmesh.errors import CancelledError, FluxmeshError, OutputError
from fluxmesh.training import checkpoint
from fluxmesh.training.data.dataset import Example
from fluxmesh.training.events import (
    CheckpointSaved,
    Dealt,
    Finished,
    Prepared,
    Progress,
    Updated,
    Validated,
)
from fluxmesh.training.request import TrainRequest
from fluxmesh.version import __version__
from fluxmesh_coordinator.artifacts.training_html import (
    METRICS,
    REFRESH,
    SHOWN,
    TaughtPicture,
    TrainingReport,
    read_losses,
)
from fluxmesh_coordinator.console.option_names import in_options
from fluxmesh_coordinator.console.train_report import RunEvent

LATEST = 20  # updates that the time left is worked out from
MAX_CAPTION = 160  # letters under a picture


class TrainingPage:
    """The page of one run."""

    def __init__(self, request: TrainRequest, now: Callable[[], float] = time.time) -> None:
        self.request, self.folder = request, Path(request.output_dir)
        self._now = now
        self._began = self._written = now()
        self._seconds: deque[float] = deque(maxlen=LATEST)  # of the latest updates
        self._hosts = "this machine"
        self._report: TrainingReport | None = None  # there is none before a run is prepared
        self._updates = 0  # in all

    def event(self, event: RunEvent) -> None:
        """Hears of an event, whose files are on the disk."""
        match event:
            case Dealt():
                each = ", ".join(f"{rank}: {parts}" for rank, parts in event.shares.items())
                self._hosts = f"{len(event.shares)} (batches of an update by host: {each})"
            case Prepared():
                self._begin(event)
            case Updated():
                self._seconds.append(event.seconds)
                self._moved(event.iteration)
                if self._now() - self._written >= REFRESH:
                    self._write(self._running(), running=True)
            case Validated() | Progress() | CheckpointSaved():
                self._write(self._running(), running=True)
            case Finished():
                self._write(f"<b>Done</b> after {_span(self._now() - self._began)}.")

    def ended(self, error: BaseException) -> None:
        """The run has come to no good end, of which the page tells if it can."""
        if self._report is None:
            return
        with suppress(OutputError):
            self._write(self._ending(error, self._report))

    def _ending(self, error: BaseException, report: TrainingReport) -> str:
        if isinstance(error, KeyboardInterrupt | CancelledError | GeneratorExit):
            saved = checkpoint.iterations(self.folder)
            goes_on = "; `--resume` goes on from there" if saved else ""
            at = saved[-1] if saved else report.iteration
            return f"<b>Stopped</b> at iteration {at} of {self.request.iterations}{goes_on}."
        is_known = isinstance(error, FluxmeshError)
        text = in_options(str(error)) if is_known else type(error).__name__
        return f"<b>Failed</b>: {html.escape(text)}"

    # Within

    def _begin(self, event: Prepared) -> None:
        request = self.request
        self._updates = event.updates
        shown = event.examples[:SHOWN]
        self._report = TrainingReport(
            title=f"{Path(request.model).name} learns {_name(request)}",
            facts=self._facts(event),
            iteration=min(event.begins_at * event.micro_batches, request.iterations),
            iterations=request.iterations,
            taught=[_taught(example) for example in shown],
            untaught=len(event.examples) - len(shown),
        )
        self._write(self._running(), running=True)

    def _facts(self, event: Prepared) -> dict[str, Any]:
        request = self.request
        bits = f", {request.bits} bits" if request.bits else ""
        facts = {
            "data set": f"{_name(request)}: {event.images} pictures, {event.held_out} held out",
            "base": f"{Path(request.model).name}{bits}, {request.dtype}",
            "length": f"{request.iterations} iterations: {event.updates} updates of "
            f"{request.grad_accumulate} x {request.batch_size} images",
            "LoRA": f"rank {request.lora_rank}, scale {request.scale:g}",
            "rate": f"{event.rate:g}, {request.lr_schedule}, {event.warmup} updates of warm-up",
            "seed": request.seed,
        }
        if request.prior_folder:
            prior = Path(request.prior_folder).name
            facts["prior"] = f"{prior}: {event.priors} pictures, weight {request.prior_weight:g}"
        if request.trigger:
            facts["trigger"] = request.trigger
        if request.progress_prompt:
            facts["progress prompt"] = request.progress_prompt
        return facts

    def _moved(self, iteration: int) -> None:
        if self._report is not None:
            self._report = replace(self._report, iteration=iteration)

    def _running(self) -> str:
        assert self._report is not None
        done, whole = self._report.iteration, self.request.iterations
        left = ""
        if self._seconds:
            updates = -(-(whole - done) // self.request.grad_accumulate)
            left = f", about {_span(updates * sum(self._seconds) / len(self._seconds))} left"
        return f"<b>Running</b>: iteration {done} of {whole}{left}."

    def _write(self, state: str, *, running: bool = False) -> None:
        if self._report is None:
            return
        self._written = self._now()
        best, adapter = self._best()
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self._written))
        facts = {**self._report.facts, "hosts": self._hosts}
        replace(
            self._report,
            state=state,
            running=running,
            facts=facts,
            best=best,
            command=self._command(adapter) if adapter else "",
            written=f"fluxmesh {__version__}, {clock}",
        ).write(self.folder)

    def _best(self) -> tuple[str, Path | None]:
        """Which adapter to take, in a sentence that says how that is known, and its file."""
        final = self.folder / checkpoint.FINAL
        saved = checkpoint.iterations(self.folder)
        _, held_out = read_losses(self.folder / METRICS)
        measured = [(loss, int(at)) for at, loss in held_out if at in saved]
        if measured:
            loss, at = min(measured)
            is_final = final.exists() and at == self.request.iterations
            said = (
                f"Best of {len(held_out)} looks at what was held out: iteration {at}, with a loss "
                f"of {loss:.4f}."
            )
            return said, final if is_final else checkpoint.adapters_path(self.folder, at)
        unknown = "which is best was not measured (--validation would)"
        if final.exists():
            return f"The last; {unknown}.", final
        if saved:
            said = f"The last so far, of iteration {saved[-1]}; {unknown}."
            return said, checkpoint.adapters_path(self.folder, saved[-1])
        return "", None

    def _command(self, adapter: Path) -> str:
        assert self._report is not None
        prompt = self.request.progress_prompt
        if not prompt and self._report.taught:
            prompt = self._report.taught[0].caption
        words = ["fluxmesh", "generate", prompt, "--model", self.request.model]
        return shlex.join([*words, "--adapter", str(adapter)])


def _name(request: TrainRequest) -> str:
    """The data set, without the folders of its owner; one of the Hub is named in full."""
    path = Path(request.dataset).expanduser()
    return path.resolve().name if path.exists() else request.dataset


def _taught(example: Example) -> TaughtPicture:
    return TaughtPicture.of(example.pixels(), example.caption[:MAX_CAPTION])


def _span(seconds: float) -> str:
    """A time for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"
