"""Where the code is, for Pythons that tests start in other folders."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def python_path() -> str:
    """PYTHONPATH with this checkout's packages in front of what it was."""
    before = os.environ.get("PYTHONPATH", "")
    paths = (ROOT, ROOT / "agent", ROOT / "coordinator", *filter(None, before.split(os.pathsep)))
    return os.pathsep.join(dict.fromkeys(map(str, paths)))
