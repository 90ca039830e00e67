"""fluxmesh: FLUX images in MLX, on one machine or on many.

Importing this package loads no mlx: `FluxPipeline` is looked up when it is first used (PEP 562),
so that the command line and the agents, which never compute, start at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fluxmesh.flux.pipeline import FluxPipeline

__version__ = "0.1.0"
__all__ = ["FluxPipeline", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "FluxPipeline":
        from fluxmesh.flux.pipeline import FluxPipeline

        return FluxPipeline
    raise AttributeError(f"module 'fluxmesh' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
