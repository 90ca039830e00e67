"""How much memory a micro-batch may take where `--grad-checkpoint` asks for little.

MLX hands work to the device far ahead of it, and what is queued holds its memory: at FLUX's size
that is more than the work needs. A limit makes MLX wait for the device instead. It is no ceiling:
where a micro-batch needs more, it still runs, if more slowly.
"""

from __future__ import annotations

from fluxmesh.engine.device_memory import bounded
from fluxmesh.models.transformer_shape import TransformerShape
from fluxmesh.planning import activations

__all__ = ["bounded", "needed"]

A_NUMBER = 30  # bytes for each number that is trained: its gradient, and sums of it in int64


def needed(shape: TransformerShape, size: int, tokens: int, trained: int) -> int:
    """Bytes that a checkpointed gradient takes beside what is held, with some to spare.

    `size` is the bytes of a number of the activations; `tokens` counts those of all images of the
    micro-batch, `trained` the numbers of the LoRAs.
    """
    state = tokens * shape.hidden_size * size
    return activations.gradient_bytes(state, shape.blocks) + A_NUMBER * trained
