"""What people read: sentences and tables, the same way in every command. Loads rich."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fluxmesh_coordinator.console.option_names import in_options

ERROR = "Error:"
PLAIN_WIDTH = 160  # characters, where the output is no terminal


def output() -> Console:
    """Stdout, for what a command is asked for."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    return console


def say(console: Console, sentence: str) -> None:
    """A sentence, with options for settings; nothing in it is markup, and no line is broken."""
    text = Text(in_options(sentence))
    if sentence.startswith(ERROR):
        text.stylize("bold red", 0, len(ERROR))
    console.print(text, soft_wrap=True)


def table(headings: Sequence[str], *, right: Collection[str] = ()) -> Table:
    """Columns with headings and no lines; those named in `right` hold numbers."""
    made = Table(box=None, pad_edge=False)
    for heading in headings:
        made.add_column(heading, justify="right" if heading in right else "left", overflow="fold")
    return made
