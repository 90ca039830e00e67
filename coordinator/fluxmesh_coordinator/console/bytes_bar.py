"""What commands that read or write whole models show: a bar of bytes, and sizes in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar_of_bytes(what: str, as_json: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar of bytes that appears with the first of them; nothing with --json or into a file."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    from fluxmesh_coordinator.console.generate_report import TimeLeftColumn

    console = Console(stderr=True)
    if as_json or not console.is_terminal:
        yield lambda done, total: None
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeLeftColumn(),
        console=console,
        transient=True,
    )
    task = bar.add_task(what, total=None, visible=False)
    with bar:
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)


def size_text(nbytes: int) -> str:
    """Bytes for people, in the units that the Hub's pages use."""
    if nbytes >= 1e9:
        return f"{nbytes / 1e9:.1f} GB"
    return f"{nbytes / 1e6:.1f} MB"
