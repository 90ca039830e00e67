"""Hints that a user is given once a day at most, whichever command it is.

When each was given stands in `hints.json` of the user's folder. Where that can't be read or
written, the hint is given: nothing fails for its sake.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress

from fluxmesh.errors import FluxmeshError
from fluxmesh.storage.homes import Home, read_private, write_private

DAY = 24 * 3600.0  # seconds


def is_due(hint: str, now: float | None = None) -> bool:
    """Whether the hint of this name was given to nobody for a day; from now on it has been."""
    now = time.time() if now is None else now
    given: dict[str, float] = {}
    with suppress(FluxmeshError, OSError, ValueError):
        path = Home.default().hints
        with suppress(FileNotFoundError):
            given = _known(read_private(path))
        if 0 <= now - given.get(hint, -DAY) < DAY:  # a clock that was set back does not hide it
            return False
        write_private(path, json.dumps({**given, hint: now}) + "\n")
    return True


def _known(text: str) -> dict[str, float]:
    """What an earlier command wrote; whatever else stands there counts for nothing."""
    data = json.loads(text)
    if not isinstance(data, dict):
        return {}
    return {str(name): when for name, when in data.items() if isinstance(when, int | float)}
