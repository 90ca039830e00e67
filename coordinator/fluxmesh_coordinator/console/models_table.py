"""`fluxmesh models list` as a table, 80 characters wide where the terminal is. Loads rich."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from fluxmesh.weights import hub
from fluxmesh_coordinator.console import terminal
from fluxmesh_coordinator.console.columns import Column, fitted
from fluxmesh_coordinator.runtime.model_list import TAKES, ListedModel

# What gives way where a table is too wide, the first first.
ORDER = ("takes", "licence", "steps", "takes", "licence")
BRIEF = {what: what[0] for what in TAKES}
LEGEND = "takes: " + ", ".join(f"{letter} {what}" for what, letter in BRIEF.items())


def show(models: Sequence[ListedModel], console: Console | None = None) -> None:
    """Prints it, and what is wrong with models that are here and not usable."""
    console = console or terminal.output()
    columns = fitted(_columns(models), console.width, ORDER)
    table = terminal.table(())
    for column in columns:
        justify = "right" if column.right else "left"
        table.add_column(column.heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for row in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*map(Text, row))
    console.print(table)
    if any(column.heading == "takes" and column.brief is None for column in columns):
        console.print(LEGEND, soft_wrap=True)
    for model in models:
        if model.reads_for:
            names = ", ".join(model.reads_for)
            terminal.say(console, f"{model.name} paints nothing: it reads references for {names}.")
        if model.note not in ("", hub.NOT_HERE):
            terminal.say(console, f"{model.name} can't be used: {model.note}")


def size_of(nbytes: int) -> str:
    """In GB, and below one in MB."""
    if nbytes < 1e9:
        return f"{nbytes / 1e6:.0f} MB"
    return f"{nbytes / 1e9:.1f} GB" if nbytes < 1e10 else f"{nbytes / 1e9:.0f} GB"


def _columns(models: Sequence[ListedModel]) -> list[Column]:
    def column(
        heading: str, cells: list[str], brief: list[str] | None = None, *, right: bool = False
    ) -> Column:
        return Column(heading, tuple(cells), right, None if brief is None else tuple(brief))

    return [
        column("model", [model.name for model in models]),
        column("size", [_size(model) for model in models], right=True),
        column(
            "licence",
            [_licence(model, model.licence) for model in models],
            [_licence(model, _terms(model)) for model in models],
        ),
        column("steps", [str(model.steps or "") for model in models], right=True),
        column(
            "takes",
            [", ".join(model.takes) for model in models],
            [" ".join(BRIEF[w] if w in model.takes else "-" for w in TAKES) for model in models],
        ),
        column("state", [_state(model) for model in models]),
    ]


def _size(model: ListedModel) -> str:
    nbytes = model.nbytes or model.download_bytes
    return size_of(nbytes) if nbytes else ""


def _terms(model: ListedModel) -> str:
    return model.licence if model.is_commercial in (True, None) else "non-commercial"


def _licence(model: ListedModel, name: str) -> str:
    return f"{name}, gated" if model.is_gated else name


def _state(model: ListedModel) -> str:
    if model.is_default:
        return "here, default"
    if model.revision is not None:
        return "here"
    return "to fetch" if model.note == hub.NOT_HERE else "unusable"
