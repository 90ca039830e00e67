"""What was meant by a name that is not known: for commands, settings, models and files alike."""

from __future__ import annotations

from collections.abc import Iterable

LIKENESS = 0.6  # difflib's own: "schnel" is schnell, "dog" is not dev


def nearest(name: str, known: Iterable[str], likeness: float = LIKENESS) -> str | None:
    """The known name that is most like `name`, upper and lower case alike; None: none is near.

    `likeness` is difflib's ratio at least: 1 is the same.
    """
    from difflib import get_close_matches  # here: it is asked only where something is wrong

    by_folded = {each.casefold(): each for each in known}
    matches = get_close_matches(name.casefold(), by_folded, n=1, cutoff=likeness)
    return by_folded[matches[0]] if matches else None


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """The end of a sentence about a name: "; did you mean X?", or `otherwise`."""
    match = nearest(name, known)
    return otherwise if match is None else f"; did you mean {match}?"
