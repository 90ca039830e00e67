"""What a program reads (`--json`): one object a line on stdout, and nothing else stands there."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from fluxmesh_coordinator.console.option_names import in_options

INTERVAL = 0.5  # seconds between two lines that tell how far something is
SENTENCES = {"message", "problem", "reason", "remedies", "text"}  # keys; all else is data


def emit(event: str, **values: Any) -> None:
    """Writes one line, at once; the kind of event comes first."""
    line = {"event": event, **_with_options(values)}
    text = json.dumps(line, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # a file's name that is no text, or a terminal that has few letters
        text = json.dumps(line)
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


class Paced:
    """Lets through what tells how far something is: the first, the last, and two a second between.

    Hosts read gigabytes in pieces, and each tells of every one: hundreds of lines that say nothing
    to a program which reads them all.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._latest: dict[str, float] = {}  # by kind of event: when one was let through

    def passes(self, kind: str, done: int, total: int) -> bool:
        """Whether one of `kind` is told now, after `done` of `total`."""
        now = self._now()
        if done < total and now - self._latest.get(kind, -INTERVAL) < INTERVAL:
            return False
        self._latest[kind] = now
        return True


def _with_options(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _with_options(part, str(name)) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_with_options(part, key) for part in value]
    return in_options(value) if isinstance(value, str) and key in SENTENCES else value
