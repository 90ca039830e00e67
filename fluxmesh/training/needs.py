"""What a training takes of a host's memory, as it is asked for and in smaller ways. No mlx.

Beside `plan.py`. A host is left out only where weights and what is trained do not fit into it; what
is advised where no host is left counts the activations of a checkpointed gradient too, so that
whoever does as told can train.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from fluxmesh.planning.activations import gradient_bytes
from fluxmesh.planning.remedies import Remedy
from fluxmesh.planning.workload import ModelSizes, Workload
from fluxmesh.request import DTYPE_BYTES, GenerateRequest
from fluxmesh.training.compute.parameter_vector import VectorLayout
from fluxmesh.training.data.bucketing import Size
from fluxmesh.training.request import TRAIN_BITS, TrainRequest

NUMBER_BYTES = 64  # that a trained number costs an engine: its state, the sums, an update of them
LOW_RANK = 4  # of an adapter that is still one
SMALL = (256, 256)  # pixels of a picture that still teaches


def transformer_bytes(request: TrainRequest, model: ModelSizes) -> int:
    """Of the frozen transformer in memory."""
    asked = GenerateRequest("", seed=0, model=request.model, dtype=request.dtype, bits=request.bits)
    return Workload.of(model.fill(asked), model).transformer.on_each_of(1)


def ways(request: TrainRequest, model: ModelSizes, size: Size) -> tuple[Remedy, ...]:
    """How it can be done with `grad_checkpoint`: as it is asked for, then with less and less.

    `size` is that of the largest picture.
    """
    return tuple(
        Remedy(
            needed=_needed(smaller, model, pixels),
            bits=smaller.bits if smaller.bits != request.bits else None,
            grad_checkpoint=not request.grad_checkpoint,
            lora_rank=smaller.lora_rank if smaller.lora_rank != request.lora_rank else 0,
            resolution=pixels[0] if pixels != size else 0,
        )
        for smaller, pixels in _smaller(request, model, size)
    )


def _smaller(
    request: TrainRequest, model: ModelSizes, size: Size
) -> Iterator[tuple[TrainRequest, Size]]:
    """The request, then that with one change after another, in the order of what they cost."""
    yield request, size
    for bits in sorted(TRAIN_BITS, reverse=True):
        # A checkpoint that is stored in some bits has no others.
        if model.bits is None and (request.bits is None or bits < request.bits):
            request = replace(request, bits=bits)
            yield request, size
    if request.lora_rank > LOW_RANK:
        request = replace(request, lora_rank=LOW_RANK)
        yield request, size
    if math.prod(size) > math.prod(SMALL):
        yield request, SMALL


def _needed(request: TrainRequest, model: ModelSizes, size: Size) -> int:
    shape = model.architecture.shape
    tokens = request.batch_size * model.architecture.tokens(*size)
    state = tokens * shape.hidden_size * DTYPE_BYTES[request.dtype]
    return (
        transformer_bytes(request, model)
        + NUMBER_BYTES * VectorLayout(model.architecture, request).size
        + gradient_bytes(state, shape.blocks)
    )
