"""How much memory a micro-batch may take where `--grad-checkpoint` asks for little.

MLX hands work to the device far ahead of it, and what is queued holds its memory: at FLUX's size
that is more than the work needs. A limit makes MLX wait for the device instead. It is no ceiling:
where a micro-batch needs more, it still runs, if more slowly.
"""

from __future__ import annotations

from fluxmesh.engine.device_memory import bounded
from fluxmesh.models.flux1.transformer import Flux
from fluxmesh.training.compute.custom_gradients import SCORES

__all__ = ["bounded", "needed"]

# Of a checkpointed gradient, in activations ([B, S, D] each), measured on a CPU with nothing
# queued: what each block leaves, and what the block whose turn it is takes.
KEPT, IN_USE = 3, 90
A_NUMBER = 30  # bytes for each number that is trained: its gradient, and sums of it in int64


def needed(flux: Flux, tokens: int, trained: int) -> int:
    """Bytes that a checkpointed gradient takes beside what is held, with some to spare.

    `tokens` counts those of all images of the micro-batch, `trained` the numbers of the LoRAs.
    """
    config = flux.config
    activation = tokens * config.hidden_size * flux.dtype.size
    blocks = config.depth + config.depth_single_blocks
    return (KEPT * blocks + IN_USE) * activation + 3 * SCORES + A_NUMBER * trained
