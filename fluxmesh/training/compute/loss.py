"""Loss and gradient of one micro-batch.

The flow is straight, x_t = (1 - t) * clean + t * noise, and the model predicts noise - clean (Liu
et al. 2022, "Flow Straight and Fast"); the loss is the mean square error of that, in float32.
The weights that are trained go in as an argument; the layers are lent them while MLX traces.

With checkpointing a block's activations are dropped and computed again in the backward pass (Chen
et al. 2016, https://arxiv.org/abs/1604.06174). The weights then enter the block as arguments, or
no gradient would reach them; dropout's keys are constants that each layer holds, so that the second
pass drops what the first one dropped (MLX's own random state would give it other masks).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from fluxmesh.kernels import ops
from fluxmesh.models.runtime import Runtime
from fluxmesh.training.compute import custom_gradients
from fluxmesh.training.compute.lora_layers import TrainedLinear, TrainedLoras, Weights


class Batch(NamedTuple):
    """B images of one size as the transformer is trained on them."""

    clean: mx.array  # latents, packed float32 [B, L, 4C]
    noise: mx.array  # float32 [B, L, 4C]
    times: mx.array  # float32 [B], in (0, 1]
    features: Mapping[str, mx.array]  # of the prompts, by the family's names, B first
    grid: tuple[int, int]  # rows and columns of tokens

    @property
    def tokens(self) -> int:
        """Of text and image, of all images together."""
        images, tokens, _ = self.clean.shape
        return images * (tokens + sum(x.shape[1] for x in self.features.values() if x.ndim == 3))


def squared_errors(runtime: Runtime, flow: Any, batch: Batch, guidance: float) -> mx.array:
    """Each image's mean square error by the transformer `flow`, float32 [B], lazily."""
    t = batch.times[:, None, None]
    noised = (1 - t) * batch.clean + t * batch.noise
    velocity = runtime.velocities(flow, noised, batch.features, batch.times, batch.grid, guidance)
    error = velocity.astype(mx.float32) - (batch.noise - batch.clean)
    return mx.mean(mx.square(error), axis=(1, 2))


def loss_and_gradient(
    runtime: Runtime,
    adapters: TrainedLoras,
    batch: Batch,
    guidance: float,
    keys: mx.array | np.ndarray | None = None,
    checkpoint: bool = False,
    weights: Weights | None = None,
) -> tuple[mx.array, mx.array]:
    """The sum over the images of their losses, and its gradient float32 [size]; lazy.

    `keys` are dropout's (uint32 [layers, 2]); None drops nothing. `weights` are what the layers
    hold where None.
    """
    held, flow = adapters.weights(), adapters.flow

    def loss(weights: Weights) -> mx.array:
        adapters.install(weights)
        return mx.sum(squared_errors(runtime, flow, batch, guidance))

    adapters.set_keys(keys)
    plain = flow.call
    if checkpoint:
        flow.call = checkpointed
    try:
        with custom_gradients.lent(flow):
            value, gradient = mx.value_and_grad(loss)(held if weights is None else weights)
    finally:
        flow.call = plain
        adapters.install(held)
        adapters.set_keys(None)
    return value, adapters.flatten(gradient)


def traced(
    runtime: Runtime, adapters: TrainedLoras, guidance: float, checkpoint: bool
) -> Callable[[Batch, np.ndarray | None], tuple[mx.array, mx.array]]:
    """`loss_and_gradient` of a batch and dropout's keys; on a GPU, traced once for each size.

    MLX then builds no graph anew, and joins what is computed element by element: a third of a step
    on a GPU that waits for its host. The gradients of `ops.py` are compiled no other way, since
    MLX compiles nothing while it traces a gradient.
    """

    def step(
        weights: Weights, arrays: Sequence[Any], keys: list[mx.array]
    ) -> tuple[mx.array, mx.array]:
        drawn = keys[0] if keys else None
        return loss_and_gradient(
            runtime, adapters, Batch(*arrays), guidance, drawn, checkpoint, weights
        )

    compiled = ops.compiled(step)

    def run(batch: Batch, keys: np.ndarray | None) -> tuple[mx.array, mx.array]:
        drawn = [] if keys is None else [mx.array(keys)]
        out: tuple[mx.array, mx.array] = compiled(adapters.weights(), list(batch), drawn)
        return out

    return run


def checkpointed(block: Callable[..., Any], *arrays: mx.array) -> Any:
    """`block(*arrays)`, keeping none of its activations for the backward pass.

    As `mx.checkpoint`, but a block computes again only when its gradient is due: MLX's may run
    while those of later blocks are still held.
    """
    layers = [
        layer
        for name, layer in block.named_modules()  # type: ignore[attr-defined]
        if isinstance(layer, TrainedLinear) and "mod" not in name.partition(".")[0]
    ]  # those of the modulation ran before the blocks
    weights = [part for layer in layers for part in (layer.lora_a, layer.lora_b)]

    def plain(*everything: mx.array) -> Any:
        _lend(layers, everything[: len(weights)])
        return block(*everything[len(weights) :])

    def back(primals: Sequence[mx.array], cotangents: Any, _outputs: Any) -> Any:
        above = _listed(cotangents)
        again = mx.depends(list(primals), above)
        return tuple(mx.vjp(lambda *x: _listed(plain(*x)), again, above)[1])

    out = custom_gradients.own_way_back(back)(plain)(*weights, *arrays)
    _lend(layers, weights)
    return out


def _listed(out: Any) -> list[mx.array]:
    return [out] if isinstance(out, mx.array) else list(out)


def _lend(layers: list[TrainedLinear], weights: Sequence[mx.array]) -> None:
    for layer, a, b in zip(layers, weights[::2], weights[1::2], strict=True):
        layer.lora_a, layer.lora_b = a, b
