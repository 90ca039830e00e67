"""fluxmesh: FLUX images in MLX, on one machine or on many.

Importing this package loads no mlx and no zmq: `FluxPipeline` (in this process) and `Mesh` (on many
hosts) are looked up when they are first used (PEP 562), so that the command line and the agents
start at once. What it does do is to turn tf32 off for an MLX that is loaded later (`tf32.py`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fluxmesh.engine import tf32
from fluxmesh.version import __version__

if TYPE_CHECKING:
    from fluxmesh.engine.pipeline import FluxPipeline

__all__ = ["FluxPipeline", "Mesh", "__version__"]

tf32.prefer_float32()


def __getattr__(name: str) -> Any:
    if name == "FluxPipeline":
        from fluxmesh.engine.pipeline import FluxPipeline

        return FluxPipeline
    if name == "Mesh":
        # The one place where the library names a deployable, for whoever writes `fluxmesh.Mesh`.
        return importlib.import_module("fluxmesh_coordinator.runtime.mesh").Mesh
    raise AttributeError(f"module 'fluxmesh' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
