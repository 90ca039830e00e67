"""Adapters of a FLUX.1's transformer in tests, by its sizes alone."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fluxmesh.adapters.changes import LowRank
from fluxmesh.adapters.find import find_adapter
from fluxmesh.adapters.formats import FORMATS, Adapter, low_ranks, write_low_ranks
from fluxmesh.adapters.lora import Opened, Paths, apply_to, open_adapters
from fluxmesh.adapters.lora_on_linear import beside, fused
from fluxmesh.adapters.reading import open_adapter
from fluxmesh.adapters.targets import AdapterTargets
from fluxmesh.models.base import Part
from fluxmesh.models.flux1.adapter_names import components
from fluxmesh.models.flux1.config import FluxConfig
from fluxmesh.models.flux1.partition import cuts
from fluxmesh.models.flux1.transformer import is_part
from fluxmesh.models.lora_linear import LoRALinear

__all__ = [
    "FORMATS",
    "Adapter",
    "LoRALinear",
    "LowRank",
    "apply_adapters",
    "apply_to",
    "apply_to_transformer",
    "beside",
    "check_adapters",
    "find_adapter",
    "fused",
    "open_adapters",
    "read_adapter",
    "transformer_targets",
    "write_adapter",
]


@functools.lru_cache(maxsize=8)
def transformer_targets(config: FluxConfig) -> AdapterTargets:
    """What adapters of a FLUX.1 may change, its text encoders being the published ones."""
    return AdapterTargets(components(config), "FLUX.1")


def read_adapter(path: str | Path, config: FluxConfig) -> Adapter:
    """The transformer's part of a LoRA of any format."""
    return low_ranks(open_adapter(find_adapter(path), transformer_targets(config)), "transformer")


def write_adapter(
    path: Path,
    adapter: Mapping[str, LowRank],
    config: FluxConfig,
    file_format: str = "diffusers",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a LoRA of a transformer of these sizes."""
    names = components(config)
    write_low_ranks(path, {"transformer": dict(adapter)}, names, file_format, metadata)


def check_adapters(adapters: Paths, config: FluxConfig) -> None:
    """Raises what applying them would of the files' headers."""
    open_adapters(adapters, transformer_targets(config))


def apply_adapters(flux: Any, adapters: Paths, fuse: bool = False, part: Part = "all") -> None:
    """Applies adapter files to a transformer, or to a shard or a part of one, in place."""
    apply_to_transformer(
        flux, open_adapters(adapters, transformer_targets(flux.config)), fuse, part
    )


def apply_to_transformer(
    flux: Any, opened: Opened, fuse: bool = False, part: Part = "all", **how: Any
) -> None:
    """The same for files that are open; `how` as of `apply_to`."""
    apply_to(
        flux,
        "transformer",
        opened,
        flux.dtype,
        fuse,
        wanted=functools.partial(is_part, part),
        shard_cuts=cuts(flux.config, flux.shard),
        **how,
    )
