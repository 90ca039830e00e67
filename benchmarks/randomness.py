"""Random weights, made on the device, the same for each library that names them alike.

A tensor is drawn from a key that its name gives: two libraries with BFL's names hold the same
numbers, so that their outputs can be compared too. Biases are not zero.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten


def fill(
    model: Any, dtype: mx.Dtype, is_quantized: Callable[[str, Any], bool], bits: int | None
) -> None:
    """Gives every parameter of `model` random numbers, evaluated one by one.

    With `bits`, modules of which `is_quantized(path, module)` holds are quantized in groups of 64.
    Nothing that the model was constructed with is ever computed.
    """
    if bits is not None:
        nn.quantize(model, group_size=64, bits=bits, class_predicate=is_quantized)
    packed = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.QuantizedLinear)
    }
    drawn: list[tuple[str, mx.array]] = []
    for path, old in tree_flatten(model.parameters()):
        module, _, leaf = path.rpartition(".")
        if module in packed and leaf in ("weight", "scales", "biases"):
            if leaf == "weight":
                drawn += _quantized(module, packed[module], dtype)
            continue
        drawn.append((path, _random(path, old.shape, dtype)))
        mx.eval(drawn[-1][1])
    model.update(tree_unflatten(drawn))
    model.eval()
    mx.clear_cache()


def _quantized(
    path: str, module: nn.QuantizedLinear, dtype: mx.Dtype
) -> list[tuple[str, mx.array]]:
    rows, columns = module.weight.shape[0], module.weight.shape[1] * 32 // module.bits
    whole = _random(f"{path}.weight", (rows, columns), dtype)
    parts = mx.quantize(whole, group_size=module.group_size, bits=module.bits)
    mx.eval(parts)
    leaves = ("weight", "scales", "biases")
    return [(f"{path}.{leaf}", part) for leaf, part in zip(leaves, parts, strict=True)]


def _random(path: str, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Scaled so that activations stay of about the size that they had."""
    name = path.replace(".layers.", ".").replace("_norm.scale", "_norm.weight")
    key = mx.random.key(zlib.crc32(name.encode()))
    drawn = mx.random.normal(shape, dtype=dtype, key=key)
    if len(shape) > 1:
        return drawn * (shape[-1] ** -0.5)
    if name.endswith("bias"):
        return drawn * 0.0625
    return 1 + drawn * 0.0625  # the scale of a norm
