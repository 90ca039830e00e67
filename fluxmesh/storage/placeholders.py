"""What stands in a file's place while the file itself is elsewhere.

A link to a disk that is not connected, the stub that iCloud leaves, the first part of a download:
whoever looks for the file finds nothing, and should hear why. Imports no mlx.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

# What browsers, huggingface_hub, curl, wget and aria2 call a file until it is whole.
UNFINISHED = (".incomplete", ".crdownload", ".part", ".partial", ".download", ".aria2")
_ICLOUD = ".icloud"  # behind the name, and a dot before it


def instead_of(path: str) -> str | None:
    """Why nothing can be read at a path, for the end of "PATH is"; None where nothing says why."""
    place = path
    while place:
        if os.path.islink(place) and not os.path.exists(place):
            target = os.readlink(place)
            subject = "" if place == path else f"behind {place}, "
            return (
                f"{subject}a link to {target}, where nothing is; connect the disk that it was on, "
                "or mend the link"
            )
        above = os.path.dirname(place)
        place = above if above != place else ""
    folder, name = os.path.split(path)
    stub = f".{name}{_ICLOUD}"
    for other in (stub, *(f"{name}{ending}" for ending in UNFINISHED)):
        if name and os.path.isfile(os.path.join(folder, other)):
            return f"not here: beside it is {described(other)}"
    return None


def among(names: Iterable[str]) -> str | None:
    """The first of a folder's files that is there for another one, in words."""
    stands_in = (name for name in sorted(names) if is_placeholder(name))
    return next((described(name) for name in stands_in), None)


def is_placeholder(name: str) -> bool:
    return name.endswith(UNFINISHED) or (name.startswith(".") and name.endswith(_ICLOUD))


def described(name: str) -> str:
    """A placeholder with what to do about it."""
    if name.endswith(_ICLOUD):
        return f"{name}, which iCloud keeps elsewhere; download it in Finder"
    return f"{name}, a download that has not ended; let it end, or start it again"
