"""The end of a log, without reading all of it."""

from __future__ import annotations

import os
from pathlib import Path

LOOKED_AT = 1 << 20  # bytes, from the end


def last_lines(path: Path, count: int, begin: int = 0) -> list[str]:
    """The last `count` lines, none from before byte `begin`; none where there is no log yet."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(min(size, max(begin, size - LOOKED_AT)))
            text = file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    lines = text.splitlines()
    return lines[max(0, len(lines) - count) :]
