"""Adam and AdamW on one flat vector, clipping, and the average of weights.

Kingma & Ba 2015 (https://arxiv.org/abs/1412.6980) with bias correction; decoupled decay from
Loshchilov & Hutter 2019 (https://arxiv.org/abs/1711.05101). All is float32, and a function of the
state and the summed gradient: hosts that hold the same state and sum move to the same bytes.

Not `mlx.optimizers`: those keep a tree of arrays that they change in place. Here the state is one
value, a few flat vectors, so that it travels, is saved and is taken back by its bytes, and an
update that is broken off has changed nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from fluxmesh.training.request import TrainRequest

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
EMA_WARMUP = 10  # the average follows fast at first: decay (1 + n) / (10 + n) until it is reached


@dataclass(frozen=True)
class State:
    """Where the weights stand after `update` updates; vectors float32 [size]."""

    update: int
    weights: mx.array
    first: mx.array  # Adam's averages of the gradient and of its square
    second: mx.array
    average: mx.array | None  # of the weights, where the request asks for one

    @property
    def result(self) -> mx.array:
        """The weights to save and to paint with."""
        return self.weights if self.average is None else self.average


def begin(weights: mx.array, request: TrainRequest) -> State:
    """The state before the first update."""
    zeros = mx.zeros_like(weights)
    return State(0, weights, zeros, zeros, None if request.ema is None else weights)


def advance(
    state: State, gradient: mx.array, rate: float, request: TrainRequest
) -> tuple[State, float]:
    """(The state after one more update, the gradient's norm before clipping); evaluates both."""
    norm = float(np.array(mx.sqrt(mx.sum(mx.square(gradient)))))
    if request.clip_norm is not None and norm > request.clip_norm:
        gradient = gradient * (request.clip_norm / norm)
    n = state.update + 1
    first = BETA1 * state.first + (1 - BETA1) * gradient
    second = BETA2 * state.second + (1 - BETA2) * mx.square(gradient)
    correction = (1 - BETA2**n) ** 0.5
    step = (rate * correction / (1 - BETA1**n)) * first
    weights = state.weights
    if request.optimizer == "adamw":
        weights = weights * (1 - rate * request.weight_decay)
    weights = weights - step / (mx.sqrt(second) + EPSILON * correction)
    average = state.average
    if average is not None and request.ema is not None:
        decay = min(request.ema, n / (EMA_WARMUP + n - 1))
        average = decay * average + (1 - decay) * weights
    after = replace(state, update=n, weights=weights, first=first, second=second, average=average)
    mx.eval(weights, first, second, *([] if average is None else [average]))
    return after, norm
