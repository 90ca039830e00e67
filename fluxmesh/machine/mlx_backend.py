"""Whether MLX loads here: on Linux its wheel brings no backend, and importing it tells too late.

Asked in a process of its own: neither the command line nor an agent loads MLX, and what it does
when it can't is not always an exception.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from typing import Self

from fluxmesh.deadlines import DEADLINES

CODE = "import mlx.core"


def remedy(python: str = sys.executable, system: str = "") -> str:
    """What to do on a machine where MLX does not load, as part of a sentence."""
    pip = f"run {python} -m pip install"
    if (system or platform.system()).startswith("Linux"):
        return f'{pip} "fluxmesh[cpu]", or "fluxmesh[cuda]" where there is an NVIDIA GPU'
    return f"{pip} mlx, after pip uninstall mlx"


def is_missing(said: str) -> bool:
    """Whether what a process said last tells that MLX has no backend."""
    return "libmlx" in said or ("mlx" in said and ("ImportError" in said or "NotFound" in said))


class BackendCheck:
    """Imports `mlx.core` beside whatever else is done; a context manager."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-c", CODE],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        return self

    def __exit__(self, *_error: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()

    def problem(self) -> str:
        """Why it does not load; "" where it does."""
        try:
            _, said = self._process.communicate(timeout=DEADLINES.mlx_loads)
        except subprocess.TimeoutExpired:
            return f"importing it takes more than {DEADLINES.mlx_loads:.0f} s"
        if self._process.returncode == 0:
            return ""
        lines = [line for line in said.decode("utf-8", "replace").splitlines() if line.strip()]
        return lines[-1].strip() if lines else f"exit code {self._process.returncode}"
