"""An adapter's file in another tool's key format. Imports no mlx.

Stands on `formats.py`, which writes the formats. An adapter is read for the sizes of a model; the
model need not be on this machine where it is a published one, or one of its size, or the embedded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fluxmesh.adapters.find import find_adapter
from fluxmesh.adapters.formats import FORMATS, OWNERS, has_place, low_ranks, write_low_ranks
from fluxmesh.adapters.peft import METADATA
from fluxmesh.adapters.reading import open_adapter
from fluxmesh.adapters.targets import targets_of
from fluxmesh.errors import AdapterError, UsageError
from fluxmesh.models.base import Architecture
from fluxmesh.models.registry import PUBLISHED
from fluxmesh.storage.safetensors import read_header
from fluxmesh.storage.writable import check_new
from fluxmesh.weights import hub

M = TypeVar("M", bound=Architecture)
T = TypeVar("T")


@dataclass(frozen=True)
class Converted:
    """What was written."""

    linears: int
    notes: tuple[str, ...]  # sentences: what is left out


def known_models() -> list[Architecture]:
    """Models that adapters are read for without being told: the published ones, of each size the
    one with most modules; and the embedded."""
    models = [known.architecture for known in PUBLISHED.values()]
    shapes = [
        {(name, tensor.shape) for name, tensor in model.transformer_tensors.items()}
        for model in models
    ]
    kept = [
        model
        for i, model in enumerate(models)
        if not any(shapes[i] < other for other in shapes) and shapes[i] not in shapes[:i]
    ]
    return [*kept, hub.resolve("tiny").architecture]


def convert_adapter(
    source: str | Path, target: Path, file_format: str, models: Sequence[Architecture]
) -> Converted:
    """Writes the adapter `source` as the new file `target`, in one of `formats.FORMATS`.

    The first of `models` that it fits is its model. Numbers keep the dtype that they are
    stored in (`formats.stored_as`). Metadata stay, but for settings of PEFT's: the scale is folded
    into the weights. `lora_rank` and `lora_blocks` are there for the mlx-examples, which read them.
    Raises `ModelNotFoundError`, `AdapterError`, `OutputError`.
    """
    if file_format not in FORMATS:
        raise UsageError(f"Adapter format {file_format!r}; choose one of {', '.join(FORMATS)}.")
    check_new(target)
    path = find_adapter(source)
    file, model = first_that_fits(models, lambda each: (open_adapter(path, targets_of(each)), each))
    names = model.adapter_names
    adapters = {part.component: low_ranks(file, part.component) for part in names}
    homeless = [part.component for part in names[1:] if not has_place(file_format, part)]
    left_out = sum(len(adapters.pop(component)) for component in homeless)
    notes = list(file.notes)
    if left_out:
        notes.append(
            f"{left_out} linears of text encoders are left out: {OWNERS[file_format]} format has "
            "no place for them."
        )
    lows = [low for modules in adapters.values() for low in modules.values()]
    if not lows:
        raise AdapterError(f"{path} adapts nothing that this format can hold; choose another one.")
    metadata = {
        key: value
        for key, value in read_header(path).metadata.items()
        if key not in (METADATA, "format") and isinstance(value, str)
    }
    rank = max(low.rank for low in lows)
    metadata = {"lora_blocks": "-1"} | metadata | {"lora_rank": str(rank)}
    write_low_ranks(target, adapters, names, file_format, metadata)
    return Converted(len(lows), tuple(notes))


def first_that_fits(models: Sequence[M], read: Callable[[M], T]) -> T:
    """What `read` gives for the first model that fits.

    Raises the first one's error where it fits none, and says how to name another.
    """
    errors = []
    for each in models:
        try:
            return read(each)
        except AdapterError as error:
            errors.append(error)
    if len(models) == 1 or "another model" not in str(errors[0]):
        raise errors[0]
    raise AdapterError(f"{errors[0]} Name its model with `model` if that is no published one.")
