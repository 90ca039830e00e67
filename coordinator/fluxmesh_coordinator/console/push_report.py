"""What `fluxmesh models push` shows: a bar a host with its rate and the time left, or JSON lines.

Both are `model_push.PushWatcher`s, twins of those in `up_report.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from fluxmesh.errors import FluxmeshError
from fluxmesh_coordinator.agents.mesh_file import MeshRecord
from fluxmesh_coordinator.console.json_lines import emit
from fluxmesh_coordinator.console.terminal import output, say
from fluxmesh_coordinator.deploy.model_push import HERE, Arrived


def push_watcher(model: str, mesh: MeshRecord, *, as_json: bool) -> TerminalPush | JsonPush:
    """For people, or with `as_json` for programs."""
    return JsonPush(model) if as_json else TerminalPush(model, mesh)


class TerminalPush:
    """Bars on stderr, and what became of it on stdout."""

    def __init__(self, model: str, mesh: MeshRecord, console: Console | None = None) -> None:
        self.model = model
        self.names = {host.rank: f"host {host.rank} ({host.name})" for host in mesh.hosts}
        self.console = console or Console(stderr=True, highlight=False)
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.tasks: dict[int, TaskID] = {}

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.bars.stop()

    def progress(self, rank: int, what: str, done: int, total: int) -> None:
        if rank not in self.tasks:
            self.tasks[rank] = self.bars.add_task(f"host {rank}", total=total)
        self.bars.update(self.tasks[rank], completed=done, total=total)

    def note(self, text: str) -> None:
        say(self.console, text)

    def failed(self, rank: int, text: str) -> None:
        if rank in self.tasks:
            self.bars.remove_task(self.tasks.pop(rank))
        self.note(f"Left out: {text}")

    def arrived(self, push: Arrived) -> None:
        source = "this machine" if push.source == HERE else f"host {push.source}"
        rate = push.nbytes / max(push.seconds, 1e-3) / 1e9
        self.note(
            f"{self.names[push.rank]} has {self.model}: {push.nbytes / 1e9:.2f} GB in "
            f"{push.seconds:.1f} s, {rate:.2f} GB/s, from {source} at {push.address}."
        )

    def ready(self, arrived: Mapping[int, Arrived], errors: Mapping[int, FluxmeshError]) -> None:
        """It is over."""
        self.bars.stop()
        if not arrived and not errors:
            say(output(), f"Every host has {self.model} already.")
        elif arrived:
            count = f"{len(arrived)} host{'' if len(arrived) == 1 else 's'}"
            say(output(), f"{self.model} was copied to {count}.")


class JsonPush:
    """One JSON object a line on stdout."""

    def __init__(self, model: str) -> None:
        self.model = model

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        sys.stdout.flush()

    def progress(self, rank: int, what: str, done: int, total: int) -> None:
        emit("progress", host=rank, what=what, done_bytes=done, total_bytes=total)

    def note(self, text: str) -> None:
        emit("note", text=text)

    def failed(self, rank: int, text: str) -> None:
        emit("left_out", host=rank, reason=text)

    def arrived(self, push: Arrived) -> None:
        values = asdict(push) | {"seconds": round(push.seconds, 3)}
        values["host"], values["bytes"] = values.pop("rank"), values.pop("nbytes")
        values["source"] = None if push.source == HERE else push.source
        emit("arrived", **values)

    def ready(self, arrived: Mapping[int, Arrived], errors: Mapping[int, FluxmeshError]) -> None:
        """It is over."""
        emit("pushed", name=self.model, hosts=sorted(arrived), failed=sorted(errors))
