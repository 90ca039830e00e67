"""A linear with a LoRA beside it, as every family's layers may hold one."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


class LoRALinear(nn.Module):
    """A linear with a low-rank correction beside it: `linear(x) + scale * (x @ a) @ b`.

    Activations keep the dtype that comes in, whatever that of `lora_a` and `lora_b`: training
    keeps those in float32 without lifting all that follows.
    """

    def __init__(self, linear: nn.Module, lora_a: mx.array, lora_b: mx.array, scale: float) -> None:
        """`lora_a` is [in, rank], `lora_b` [rank, out]; `linear` may be quantized."""
        super().__init__()
        self.linear = linear
        self.lora_a = lora_a
        self.lora_b = lora_b
        self.scale = scale

    def __call__(self, x: mx.array) -> mx.array:
        y = self.linear(x)
        low = (x @ self.lora_a.astype(x.dtype)) @ self.lora_b.astype(x.dtype)
        return y + (low if self.scale == 1 else self.scale * low).astype(y.dtype)
