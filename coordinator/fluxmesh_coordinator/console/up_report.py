"""What `fluxmesh up` shows while it works: a bar a host on a terminal, or JSON lines.

Twins of `generate_report.py` for a job. Both are `bringup.Watcher`s.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Self

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn

from fluxmesh_coordinator.console.json_lines import emit
from fluxmesh_coordinator.console.terminal import say
from fluxmesh_coordinator.deploy.model_offer import PushOffer


def watcher(*, as_json: bool, pull: bool, push: bool = False) -> TerminalWatcher | JsonWatcher:
    """For people, or with `as_json` for programs.

    `pull` lets hosts fetch what they lack, `push` copies it to them from who has it.
    """
    return JsonWatcher(pull, push) if as_json else TerminalWatcher(pull, push=push)


def _title(rank: int, what: str) -> str:
    return f"{'this machine' if rank < 0 else f'host {rank}'}, {what}"


def gigabytes(nbytes: int) -> str:
    """As the Hub's pages and disks are labelled."""
    return f"{nbytes / 1e9:.1f} GB" if nbytes < 100e9 else f"{nbytes / 1e9:.0f} GB"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


class TerminalWatcher:
    """Stages and notes on stderr, and a bar for each host that loads."""

    def __init__(self, pull: bool, console: Console | None = None, *, push: bool = False) -> None:
        self.pull, self.push = pull, push
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

    def __exit__(self, *_error: object) -> None:
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

    def may_pull(self, model: str, nbytes: int | None, free: Mapping[int, int]) -> bool:
        size = "of a size that the Hub does not tell" if nbytes is None else gigabytes(nbytes)
        hosts = ", ".join(
            f"{'this machine' if rank < 0 else f'host {rank}'} ({gigabytes(free[rank])} free)"
            for rank in free
        )
        sentence = f"{model}, {size}, is not on {hosts}."
        if self.pull or not self._can_ask:
            self.note(sentence)
            return self.pull
        return self._ask(f"{sentence} Fetch it?")

    def may_end(self, names: Sequence[str]) -> bool:
        if not self._can_ask:
            return False
        return self._ask(
            f"This ends the agents of {', '.join(names)}, of the mesh that is up. Go on?"
        )

    @property
    def _can_ask(self) -> bool:
        return sys.stdin.isatty() and self.console.is_terminal

    def _ask(self, question: str) -> bool:
        self.bars.stop()
        try:
            return click.confirm(question, err=True)
        finally:
            self.bars.start()

    def may_push(self, offer: PushOffer) -> bool:
        hosts = ", ".join(f"host {rank}" for rank in offer.ranks)
        there = f"{offer.model} ({offer.nbytes / 1e9:.1f} GB) is {offer.where} and not on {hosts}."
        if self.push or self.pull or not (sys.stdin.isatty() and self.console.is_terminal):
            self.note(there)
            return self.push
        self.bars.stop()
        took = "" if offer.seconds is None else f", in about {_duration(offer.seconds)}"
        answer = click.confirm(f"{there} Copy it over the mesh{took}?", default=True, err=True)
        self.bars.start()
        return answer

    def ready(self, _overview: dict[str, Any] | None) -> None:
        """The mesh is warm; its table follows."""


class JsonWatcher:
    """One JSON object a line on stdout."""

    def __init__(self, pull: bool, push: bool = False) -> None:
        self.pull, self.push = pull, push

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
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

    def may_pull(self, model: str, nbytes: int | None, free: Mapping[int, int]) -> bool:
        return self.pull

    def may_end(self, names: Sequence[str]) -> bool:
        return False

    def may_push(self, offer: PushOffer) -> bool:
        values = {"model": offer.model, "where": offer.where, "hosts": list(offer.ranks)}
        emit("lacking", **values, bytes=offer.nbytes, seconds=offer.seconds, push=self.push)
        return self.push

    def ready(self, overview: dict[str, Any] | None) -> None:
        emit("up", **{key: value for key, value in (overview or {}).items() if key != "event"})
