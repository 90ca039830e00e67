"""What `fluxmesh up` shows while it works: a bar a host on a terminal, or JSON lines.

Twins of `generate_report.py` for a job. Both are `bringup.Watcher`s.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn

from fluxmesh_coordinator.console.json_lines import emit
from fluxmesh_coordinator.console.terminal import say


def watcher(*, as_json: bool, pull: bool) -> TerminalWatcher | JsonWatcher:
    """For people, or with `as_json` for programs; `pull` lets hosts fetch what they lack."""
    return JsonWatcher(pull) if as_json else TerminalWatcher(pull)


def _title(rank: int, what: str) -> str:
    return f"{'this machine' if rank < 0 else f'host {rank}'}, {what}"


class TerminalWatcher:
    """Stages and notes on stderr, and a bar for each host that loads."""

    def __init__(self, pull: bool, console: Console | None = None) -> None:
        self.pull = pull
        self.console = console or Console(stderr=True, highlight=False)
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            DownloadColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.tasks: dict[tuple[int, str], TaskID] = {}

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bars.stop()

    def stage(self, text: str) -> None:
        for task in self.tasks.values():
            self.bars.remove_task(task)
        self.tasks.clear()
        self.note(f"{text} ...")

    def note(self, text: str) -> None:
        say(self.console, text)

    def failed(self, rank: int, text: str) -> None:
        self.note(f"Left out: {text}")

    def progress(self, rank: int, what: str, done: int, total: int) -> None:
        key = rank, what
        if key not in self.tasks:
            self.tasks[key] = self.bars.add_task(_title(rank, what), total=total)
        self.bars.update(self.tasks[key], completed=done, total=total)

    def warmed(
        self, placement: str, ranks: Sequence[int], size: tuple[int, int], seconds: float
    ) -> None:
        hosts = "1 host" if len(ranks) == 1 else f"{len(ranks)} hosts"
        self.note(f"Ready for {size[0]}x{size[1]} by {placement} on {hosts} ({seconds:.1f} s).")

    def may_pull(self, model: str, ranks: Sequence[int]) -> bool:
        if self.pull or not (sys.stdin.isatty() and self.console.is_terminal):
            return self.pull
        self.bars.stop()
        hosts = ", ".join("this machine" if rank < 0 else f"host {rank}" for rank in ranks)
        answer = click.confirm(f"{model} is not on {hosts}. Fetch it?", err=True)
        self.bars.start()
        return answer

    def ready(self, _overview: dict[str, Any] | None) -> None:
        """The mesh is warm; its table follows."""


class JsonWatcher:
    """One JSON object a line on stdout."""

    def __init__(self, pull: bool) -> None:
        self.pull = pull

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        sys.stdout.flush()

    def stage(self, text: str) -> None:
        emit("stage", text=text)

    def note(self, text: str) -> None:
        emit("note", text=text)

    def failed(self, rank: int, text: str) -> None:
        emit("left_out", host=rank, reason=text)

    def progress(self, rank: int, what: str, done: int, total: int) -> None:
        values = {"host": rank, "what": what, "done_bytes": done, "total_bytes": total}
        emit("progress", **values)

    def warmed(
        self, placement: str, ranks: Sequence[int], size: tuple[int, int], seconds: float
    ) -> None:
        values = {"placement": placement, "hosts": list(ranks), "height": size[0]}
        emit("warmed", **{**values, "width": size[1], "seconds": round(seconds, 3)})

    def may_pull(self, model: str, ranks: Sequence[int]) -> bool:
        return self.pull

    def ready(self, overview: dict[str, Any] | None) -> None:
        emit("up", **{key: value for key, value in (overview or {}).items() if key != "event"})
