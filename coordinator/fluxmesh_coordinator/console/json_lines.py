"""What a program reads (`--json`): one object a line on stdout, and nothing else stands there."""

from __future__ import annotations

import json
import sys
from typing import Any

from fluxmesh_coordinator.console.option_names import in_options

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


def _with_options(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _with_options(part, str(name)) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_with_options(part, key) for part in value]
    return in_options(value) if isinstance(value, str) and key in SENTENCES else value
