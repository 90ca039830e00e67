"""An adapter's file in another tool's key format. Imports no mlx.

Stands on `formats.py`, which reads and writes the formats. An adapter is read for the sizes of a
model; the model need not be on this machine where it is FLUX.1 itself, or the embedded one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fluxmesh.adapters.formats import (
    PEFT_METADATA,
    Adapter,
    find_adapter,
    read_adapter,
    write_adapter,
)
from fluxmesh.errors import AdapterError
from fluxmesh.models.flux1.config import FluxConfig
from fluxmesh.storage.safetensors import read_header
from fluxmesh.weights import hub


def known_configs() -> list[FluxConfig]:
    """Sizes that adapters are read for without being told: FLUX.1's, and the embedded model's."""
    return [FluxConfig(guidance_embed=True), hub.resolve("tiny").transformer]


def convert_adapter(
    source: Path, target: Path, file_format: str, configs: Sequence[FluxConfig]
) -> Adapter:
    """Writes the adapter `source` as the new file `target`, in one of `formats.FORMATS`.

    The first of `configs` whose model it fits is its model's. Metadata stay, but for settings of
    PEFT's: the scale is folded into the weights. `lora_rank` and `lora_blocks` are there for the
    mlx-examples, which read them. Returns the adapter. Raises `ModelNotFoundError`,
    `WeightsError`, `AdapterError`, `OutputError`.
    """
    file = find_adapter(source)
    adapter, config = _read(file, configs)
    kept = {
        key: value
        for key, value in read_header(file).metadata.items()
        if key not in (PEFT_METADATA, "format") and isinstance(value, str)
    }
    rank = max(low.rank for low in adapter.values())
    metadata = {"lora_blocks": "-1"} | kept | {"lora_rank": str(rank)}
    write_adapter(target, adapter, config, file_format, metadata)
    return adapter


def _read(file: Path, configs: Sequence[FluxConfig]) -> tuple[Adapter, FluxConfig]:
    """Raises the first config's error where it fits none, and says how to name another."""
    errors = []
    for config in configs:
        try:
            return read_adapter(file, config), config
        except AdapterError as error:
            errors.append(error)
    if len(configs) == 1:
        raise errors[0]
    raise AdapterError(f"{errors[0]} Name its model with `model` if that is not FLUX.1.")
