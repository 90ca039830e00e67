"""Adapters on a model: beside its linears, or fused into their weights.

Stands on `reading.py`, which reads every format. Plain LoRAs stack: their ranks lie
side by side in one pair of matrices, so that two cost no more calls than one. Other kinds
(`changes.py`) lie beside a linear in the factors that their file has, one after another in the
order that they are given. Works on quantized linears too: unfused, the adapter stays exact beside
the rounded weight; fused, the sum is rounded again.

Linears are changed one by one, so that never more than one linear's change is multiplied out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from fluxmesh.adapters.changes import Change, LowRank, stack
from fluxmesh.adapters.find import find_adapter
from fluxmesh.adapters.lora_on_linear import LinearToAdapt, ReadWeight, dense
from fluxmesh.adapters.reading import AdapterFile, open_adapter
from fluxmesh.adapters.targets import AdapterTargets
from fluxmesh.errors import AdapterError
from fluxmesh.models.module_tree import module_at
from fluxmesh.models.partition import Cut

Paths = Sequence[tuple[str | Path, float]]  # adapters with their strengths; 1.0 is as trained
Opened = Sequence[tuple[AdapterFile, float]]  # the same, their headers read


def open_adapters(adapters: Paths, targets: AdapterTargets) -> Opened:
    """Reads the files' headers. Raises `ModelNotFoundError`, `AdapterError`."""
    return [(open_adapter(find_adapter(path), targets), scale) for path, scale in adapters]


def apply_to(
    model: Any,
    component: str,
    opened: Opened,
    dtype: mx.Dtype,
    fuse: bool = False,
    *,
    wanted: Callable[[str], bool] = lambda name: True,
    shard_cuts: dict[str, Cut] | None = None,
    weight_of: ReadWeight | None = None,
) -> None:
    """Applies what open files say of a component to a model of it, in place.

    Beside a linear, adapters are kept in `dtype`. `weight_of` reads a linear's weight as the
    checkpoint has it: DoRA needs rows whole, of which a shard holds parts; by default the model is
    asked. Raises `AdapterError` for numbers that are not finite, with the strength or without.
    """
    cuts_of = shard_cuts or {}
    names = dict.fromkeys(name for file, _ in opened for name in file.linears(component))
    for name in names:
        if not wanted(name):
            continue
        inputs = max(file.inputs.get((component, name), 0) for file, _ in opened)
        changes = [
            (_wide(file.change(component, name), inputs), strength)
            for file, strength in opened
            if name in file.linears(component)
        ]
        on = LinearToAdapt(model, name, dtype, cuts_of.get(name), weight_of or _held_weight(model))
        if all(change.is_low_rank for change, _ in changes):
            low = stack([_stronger(change.joined(), strength) for change, strength in changes])
            on.add_low_rank(low, fuse)
        elif fuse:
            on.fuse(changes)
        else:
            on.put_beside(changes)
        if not on.is_finite(fuse):
            files = ", ".join(f"{file.path} at strength {strength:g}" for file, strength in opened)
            raise AdapterError(
                f"With {files}, {name} of the {component} is not finite in "
                f"{str(dtype).rpartition('.')[2]}; lower the strength."
            )
    for file, strength in opened:
        for tensor, values in file.norms(component).items():
            if wanted(tensor):
                _add_to_vector(model, tensor, strength * values)
        for tensor, values in file.replacements(component).items():
            if wanted(tensor):
                _replace_vector(model, tensor, values, strength)
    mx.clear_cache()


def _wide(change: Change, inputs: int) -> Change:
    return change.with_inputs(inputs) if inputs else change


def _stronger(low: LowRank, strength: float) -> LowRank:
    return LowRank(low.a, low.b, low.scale * strength)


def _held_weight(model: Any) -> ReadWeight:
    """Reads weights from a model that is whole, with the adapters that it has already."""

    def read(name: str) -> np.ndarray:
        return np.array(dense(module_at(model, name)))

    return read


def _add_to_vector(model: Any, tensor: str, values: np.ndarray) -> None:
    path, _, leaf = tensor.rpartition(".")
    module = module_at(model, path)
    before = module[leaf]
    module[leaf] = (before.astype(mx.float32) + mx.array(values)).astype(before.dtype)
    mx.eval(module[leaf])


def _replace_vector(model: Any, tensor: str, values: np.ndarray, strength: float) -> None:
    """A strength moves the vector in a line towards its replacement, which it is at 1."""
    path, _, leaf = tensor.rpartition(".")
    module = module_at(model, path)
    before = module[leaf]
    there = mx.array(values)
    if strength != 1:
        there = (1 - strength) * before.astype(mx.float32) + strength * there
    module[leaf] = there.astype(before.dtype)
    mx.eval(module[leaf])
