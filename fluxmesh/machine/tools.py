"""What the system's own tools print, the same on every machine of that system.

They speak the language of whoever asks, and lie where a login's PATH may not lead. The other
modules of this folder ask them.
"""

from __future__ import annotations

import os
import platform
import subprocess

from fluxmesh.deadlines import DEADLINES


def is_mac() -> bool:
    return platform.system() == "Darwin"


def output_of(*command: str, seconds: float = DEADLINES.tool) -> str:
    """What a tool, named by its whole path, prints in English and UTC; "" where it fails."""
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env={**os.environ, "LC_ALL": "C", "TZ": "UTC0"},
            timeout=seconds,
            check=True,
            encoding="utf-8",
            errors="replace",
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
