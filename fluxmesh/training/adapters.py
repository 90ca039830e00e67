"""The weights that are trained: a LoRA beside linears of the transformer, float32.

Hu et al. 2021 (https://arxiv.org/abs/2106.09685). A begins uniform, drawn by module name so that
every host draws the same, and B at zero: the model begins as it was. All of them together are one
flat vector wherever they are summed, averaged or saved; its order is that of the module names in
`names`. The base may be quantized (QLoRA): it only computes, nothing of it is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import mlx.core as mx
import numpy as np

from fluxmesh.errors import UsageError
from fluxmesh.flux.config import FluxConfig
from fluxmesh.flux.layouts import transformer_tensors
from fluxmesh.flux.lora import Adapter, LoRALinear, LowRank
from fluxmesh.flux.model import Flux
from fluxmesh.flux.weights import module_at, replace_module
from fluxmesh.training.request import TrainRequest
from fluxmesh.training.streams import WEIGHTS, generator, number_of

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

    def __call__(self, x: mx.array) -> mx.array:
        y = self.linear(x)
        low = (self.dropout(x) @ self.lora_a.astype(x.dtype)) @ self.lora_b.astype(x.dtype)
        return y + (low if self.scale == 1 else self.scale * low).astype(y.dtype)


def select(config: FluxConfig, blocks: int, targets: Sequence[str]) -> list[str]:
    """Linears of the last `blocks` blocks (-1: all) that match one of the patterns `targets`.

    A pattern is a shell's, against BFL's name of the linear: `*attn.qkv`, `single_blocks.*`.
    Raises `UsageError` where nothing matches.
    """
    every = config.depth + config.depth_single_blocks
    first = 0 if blocks == -1 else max(0, every - blocks)
    found = []
    for name, target in transformer_tensors(config).items():
        kind, _, rest = name.partition(".")
        if kind not in ("double_blocks", "single_blocks") or len(target.shape) != 2:
            continue
        block = int(rest.partition(".")[0]) + (config.depth if kind == "single_blocks" else 0)
        module = name.removesuffix(".weight")
        if block >= first and any(fnmatchcase(module, pattern) for pattern in targets):
            found.append(module)
    if not found:
        raise UsageError(
            f"--lora-targets {', '.join(targets)} matches no linear of the last "
            f"{every - first} blocks; name some, such as '*attn.qkv' or 'single_blocks.*'."
        )
    return sorted(found)


class Adapters:
    """The LoRAs of one run, in place in a transformer."""

    def __init__(self, flux: Flux, request: TrainRequest) -> None:
        """Puts a `TrainedLinear` where the request asks for one; the rest of `flux` stays."""
        self.config = flux.config
        self.scale = request.scale
        self.rate = request.lora_dropout
        self.names = select(flux.config, request.lora_blocks, request.lora_targets)
        tensors = transformer_tensors(flux.config)
        self.shapes: list[tuple[int, int]] = []  # a, b, a, b, ... in the order of `names`
        self.layers: dict[str, TrainedLinear] = {}
        rank = request.lora_rank
        for name in self.names:
            out, into = tensors[f"{name}.weight"].shape
            self.shapes += [(into, rank), (rank, out)]
            bound = into**-0.5
            drawn = generator(request.seed, WEIGHTS, number_of(name)).random((into, rank))
            a = mx.array((bound * (2 * drawn - 1)).astype(np.float32))
            b = mx.zeros((rank, out))
            layer = TrainedLinear(module_at(flux, name), a, b, self.scale, self.rate)
            self.layers[name] = layer
            replace_module(flux, name, layer)
        self._ends = np.cumsum([a * b for a, b in self.shapes]).tolist()

    @property
    def size(self) -> int:
        """Numbers that are trained."""
        return int(self._ends[-1])

    def weights(self) -> Weights:
        """What the layers hold."""
        return {name: {"a": x.lora_a, "b": x.lora_b} for name, x in self.layers.items()}

    def install(self, weights: Weights) -> None:
        """Makes the layers compute with these."""
        for name, layer in self.layers.items():
            layer.lora_a, layer.lora_b = weights[name]["a"], weights[name]["b"]

    def set_keys(self, keys: np.ndarray | None) -> None:
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
        parts = mx.split(flat, self._ends[:-1])
        shaped = [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]
        return {
            name: {"a": a, "b": b}
            for name, a, b in zip(self.names, shaped[::2], shaped[1::2], strict=True)
        }

    def adapter(self, flat: mx.array) -> Adapter:
        """A vector of weights as `lora_files.write_adapter` takes it."""
        return {
            name: LowRank(
                np.ascontiguousarray(np.array(pair["a"]).T),
                np.ascontiguousarray(np.array(pair["b"]).T),
                self.scale,
            )
            for name, pair in self.unflatten(flat).items()
        }
