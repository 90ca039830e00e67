"""LoRA adapters on a transformer: beside its linears, or fused into their weights.

Stands on `formats.py`, which reads every key format. Several adapters stack: their ranks lie
side by side in one pair of matrices, so that two cost no more calls than one. Works on quantized
linears too: unfused, the adapter stays exact beside the rounded weight; fused, the sum is rounded
again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from fluxmesh.adapters.formats import (
    FORMATS,
    Adapter,
    LowRank,
    find_adapter,
    read_adapter,
    write_adapter,
)
from fluxmesh.models.flux1.config import FluxConfig
from fluxmesh.models.flux1.partition import cuts
from fluxmesh.models.flux1.transformer import Part, is_part
from fluxmesh.models.lora_linear import LoRALinear
from fluxmesh.models.module_tree import module_at, replace_module
from fluxmesh.models.partition import Cut

__all__ = [
    "FORMATS",
    "Adapter",
    "LoRALinear",
    "LowRank",
    "apply_adapters",
    "check_adapters",
    "find_adapter",
    "join_adapters",
    "read_adapter",
    "write_adapter",
]

Paths = Sequence[tuple[str | Path, float]]  # adapters with their strengths; 1.0 is as trained


def check_adapters(adapters: Paths, config: FluxConfig) -> None:
    """Raises what `apply_adapters` would, before any weight of the model is read."""
    for path, _ in adapters:
        read_adapter(path, config)


def apply_adapters(flux: Any, adapters: Paths, fuse: bool = False, part: Part = "all") -> None:
    """Applies LoRA files to a transformer, in place, beside those that it may have already.

    With `fuse` they are added into the weights: as fast as without, and not removable. A shard of
    a transformer takes its own part of them, and so does a `part`. Raises `ModelNotFoundError`,
    `WeightsError` or `AdapterError` (naming keys that match nothing) before anything changes.
    """
    joined = join_adapters(adapters, flux.config)
    shard_cuts = cuts(flux.config, flux.shard)
    for name, low in joined.items():
        if not is_part(part, name):
            continue
        if name in shard_cuts:
            low = part_of(low, shard_cuts[name])
        module = module_at(flux, name)
        if fuse:
            fused(module.linear if isinstance(module, LoRALinear) else module, low)
        else:
            replace_module(flux, name, beside(module, low, flux.dtype))
    mx.clear_cache()


def join_adapters(adapters: Paths, config: FluxConfig) -> Adapter:
    """Several LoRA files as one adapter of scale 1. Raises as `apply_adapters` does."""
    low_ranks: dict[str, list[LowRank]] = {}
    for path, strength in adapters:
        for name, low in read_adapter(path, config).items():
            low_ranks.setdefault(name, []).append(LowRank(low.a, low.b, low.scale * strength))
    return {name: stack(parts) for name, parts in low_ranks.items()}


def stack(parts: Sequence[LowRank]) -> LowRank:
    """Several adapters of one module as one of scale 1: ranks side by side."""
    return LowRank(
        np.concatenate([low.a for low in parts]),
        np.concatenate([low.scale * low.b for low in parts], axis=1),
    )


def part_of(low: LowRank, cut: Cut) -> LowRank:
    """What a shard that holds `cut` of a linear needs of its adapter."""
    if cut.axis == 0:
        return LowRank(low.a, low.b[cut.indices], low.scale)
    return LowRank(low.a[:, cut.indices], low.b, low.scale)


def beside(module: Any, low: LowRank, dtype: mx.Dtype) -> LoRALinear:
    """`module` with `low`, of scale 1, beside it, in `dtype`; joins an adapter that is there."""
    a, b = mx.array(low.a.T).astype(dtype), mx.array(low.b.T).astype(dtype)
    linear = module
    if isinstance(module, LoRALinear):
        linear = module.linear
        a = mx.concatenate([module.lora_a, a.astype(module.lora_a.dtype)], axis=1)
        b = mx.concatenate([module.scale * module.lora_b, b.astype(module.lora_b.dtype)], axis=0)
    mx.eval(a, b)
    return LoRALinear(linear, a, b, 1.0)


def fused(linear: Any, low: LowRank) -> None:
    """Adds `low` to the weight of `linear`, in place; the sum is taken in float32."""
    delta = low.scale * (mx.array(low.b) @ mx.array(low.a))
    if isinstance(linear, nn.QuantizedLinear):
        group, bits = linear.group_size, linear.bits
        weight = mx.dequantize(linear.weight, linear.scales, linear.biases, group, bits)
        total = (weight.astype(mx.float32) + delta).astype(linear.scales.dtype)
        linear.weight, linear.scales, linear.biases = mx.quantize(total, group, bits)
        mx.eval(linear.weight, linear.scales, linear.biases)
        return
    weight = linear.weight
    linear.weight = (weight.astype(mx.float32) + delta).astype(weight.dtype)
    mx.eval(linear.weight)
