"""What is said of a data set while it is read: mistakes, and what is passed over. Pure.

The forms of data sets (`list_files.py`, `picture_folder.py`, `saved_tables.py`) add to it, and
`dataset.py` makes an error or notes of it: all at once, before any weight loads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

SHOWN = 20  # names or problems in one sentence


@dataclass
class Remarks:
    """Sentences without a period at their end."""

    problems: list[str] = field(default_factory=list)  # what stops the training
    notes: list[str] = field(default_factory=list)  # what goes on without a picture or a file
    undecodable: list[str] = field(default_factory=list)  # files of text whose encoding is unknown
    applied: set[str] = field(default_factory=set)  # settings that some form of data set has read


def several(names: Sequence[str], what: str = "") -> str:
    """ "a, b and 3 more"; with `what`, "5 pictures: a, b and 3 more" ("1 picture: a")."""
    text = ", ".join(names[:SHOWN])
    if len(names) > SHOWN:
        text += f" and {len(names) - SHOWN} more"
    if not what:
        return text
    return f"{len(names)} {what if len(names) == 1 else plural(what)}: {text}"


def plural(what: str) -> str:
    """ "caption file" as "caption files"."""
    return f"{what}s"
