"""The weights that are trained: a LoRA beside linears of the transformer, float32.

Hu et al. 2021 (https://arxiv.org/abs/2106.09685). A begins uniform, drawn by module name so that
every host draws the same, and B at zero: the model begins as it was. All of them together are one
flat vector wherever they are summed, averaged or saved (`parameter_vector.py`). The base may be
quantized (QLoRA): it only computes, nothing of it is trained.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from fluxmesh.models.base import Architecture
from fluxmesh.models.double_stream import DoubleStreamTransformer
from fluxmesh.models.lora_linear import LoRALinear
from fluxmesh.models.module_tree import module_at, replace_module
from fluxmesh.training.compute.custom_gradients import frozen, plus_low_rank
from fluxmesh.training.compute.parameter_vector import VectorLayout
from fluxmesh.training.request import TrainRequest
from fluxmesh.training.rng import WEIGHTS, generator, number_of

Weights = dict[str, dict[str, mx.array]]  # by module: {"a": [in, rank], "b": [rank, out]}


class Dropout:
    """A layer's mask: drops with probability `rate` while it has a key. Not a module."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.key: mx.array | None = None

    def __call__(self, x: mx.array) -> mx.array:
        if self.key is None or not self.rate:
            return x
        keep = mx.random.bernoulli(1 - self.rate, x.shape, key=self.key)
        return mx.where(keep, x * (1 / (1 - self.rate)), mx.zeros((), x.dtype))


class TrainedLinear(LoRALinear):
    """A linear with a LoRA that is trained; what enters the LoRA may be dropped at random."""

    def __init__(
        self, linear: Any, lora_a: mx.array, lora_b: mx.array, scale: float, dropout: float
    ) -> None:
        super().__init__(linear, lora_a, lora_b, scale)
        self.dropout = Dropout(dropout)
        self._frozen = frozen(linear)

    def __call__(self, x: mx.array) -> mx.array:
        a, b = self.lora_a.astype(x.dtype), self.lora_b.astype(x.dtype)
        if self.scale != 1:
            a = self.scale * a
        return plus_low_rank(self._frozen(x), self.dropout(x), a, b)


class TrainedLoras:
    """The LoRAs of one run, in place in a transformer."""

    def __init__(
        self, flow: DoubleStreamTransformer, model: Architecture, request: TrainRequest
    ) -> None:
        """Puts a `TrainedLinear` where the request asks for one; the rest of `flow` stays.

        `flow` is the transformer of `model`.
        """
        self.flow = flow
        self.layout = VectorLayout(model, request)
        self.names = self.layout.names
        self.layers: dict[str, TrainedLinear] = {}
        shapes = self.layout.shapes
        for name, (into, rank), (_, out) in zip(self.names, shapes[::2], shapes[1::2], strict=True):
            bound = into**-0.5
            drawn = generator(request.seed, WEIGHTS, number_of(name)).random((into, rank))
            a = mx.array((bound * (2 * drawn - 1)).astype(np.float32))
            b = mx.zeros((rank, out))
            layer = TrainedLinear(
                module_at(flow, name), a, b, self.layout.scale, request.lora_dropout
            )
            self.layers[name] = layer
            replace_module(flow, name, layer)

    def remove(self) -> None:
        """Leaves the transformer as it was."""
        for name, layer in self.layers.items():
            replace_module(self.flow, name, layer.linear)

    @property
    def size(self) -> int:
        """Numbers that are trained."""
        return self.layout.size

    def weights(self) -> Weights:
        """What the layers hold."""
        return {name: {"a": x.lora_a, "b": x.lora_b} for name, x in self.layers.items()}

    def install(self, weights: Weights) -> None:
        """Makes the layers compute with these."""
        for name, layer in self.layers.items():
            layer.lora_a, layer.lora_b = weights[name]["a"], weights[name]["b"]

    def set_keys(self, keys: mx.array | np.ndarray | None) -> None:
        """Dropout's random keys for one micro-batch, uint32 [layers, 2]; None drops nothing."""
        for i, layer in enumerate(self.layers.values()):
            layer.dropout.key = None if keys is None else mx.array(keys[i])

    def flatten(self, weights: Weights) -> mx.array:
        """Weights, or their gradients, as one vector [size] in the order of `names`."""
        return mx.concatenate(
            [weights[name][part].reshape(-1) for name in self.names for part in ("a", "b")]
        )

    def unflatten(self, flat: mx.array) -> Weights:
        """The inverse of `flatten`."""
        parts = mx.split(flat, self.layout.ends[:-1])
        shaped = [
            part.reshape(shape) for part, shape in zip(parts, self.layout.shapes, strict=True)
        ]
        return {
            name: {"a": a, "b": b}
            for name, a, b in zip(self.names, shaped[::2], shaped[1::2], strict=True)
        }
