"""What a step, a decode and a gradient hold beside the weights, in bytes. Pure.

Below `workload.py`, which counts with it what a host must have, and `engine/device_memory.py`,
which bounds with it how far MLX runs ahead of the device: planned and allowed are figures of one
place. A hidden state is S tokens by D channels; "the largest array" of a decode is what comes in at
the finest level, H x W pixels of its channels.
"""

from __future__ import annotations

from fluxmesh.cluster.snapshot import Platform
from fluxmesh.models.autoencoder.tiling import UNTILED_LATENTS
from fluxmesh.models.base import Architecture

STATES = 24  # hidden states that a step holds at once, at most
SPLIT_STATES = 16  # of these, the ones that `tensor` splits: queries to values, and the MLP
WIDE_STATES = 6  # more of them where tokens are float32 beside branches of float16
CPU_STATES = 44  # the same on a CPU, which MLX lets run some operations behind
SCORE_ARRAYS = 3  # attention weights of a block, float32; a GPU's kernel makes none
LENT_LINEARS = 3  # joined, of spans of a transformer that is whole, and there at once
DECODE_ARRAYS = 4  # of the largest size that a decode holds at once
# On a CPU, which is given all that `decoding_room` allows at once: the results of a whole decode or
# encode together, and those of one convolution, which holds its input nine times.
CPU_ARRAYS, CPU_CONVOLUTION = 48, 10.5
# On Metal a 3x3 convolution is Winograd's (https://arxiv.org/abs/1509.09308): beside its input and
# output it holds 3.7 times its input, as mlx#4102 measured.
WINOGRAD = 3.7
# Of a checkpointed gradient, in hidden states, measured on a CPU with nothing queued: what each
# block leaves, and what the block whose turn it is takes.
KEPT, IN_USE = 3, 90
SCORES = 64 * 2**20  # bytes of attention weights at a time, on the way back


def denoising_room(state: int, platform: Platform, scarce: bool, free: float) -> float:
    """Bytes that may wait for their use in a step, so that a GPU does not wait for the host.

    `state` is a hidden state's bytes, `free` what the device has beside the weights. Where four
    times as much is free, twice as much waits: what a GPU of 130 ms a step works on while the host
    reports a step and describes the next. With `scarce`, as little as costs an H100 a few
    hundredths of its speed (docs/performance.md); a Mac's GPU takes a hundred times as long for an
    operation, and has the memory in common with everything else there: it always gets that.
    """
    if scarce or platform != "cuda":
        return max(1.5e9, 70 * state)
    room = max(3e9, 106 * state)  # a step's results together are about 500
    return 2 * room if free >= 4 * room else room


def largest_of_decode(model: Architecture, height: int, width: int, size: int) -> int:
    """Bytes of the largest array when so many pixels are decoded in numbers of `size` bytes.

    A picture that is cut into tiles has none that is larger than the largest that isn't.
    """
    pixels = min(height * width, UNTILED_LATENTS * model.downsampling**2)
    return pixels * model.finest_width * size


def largest_of_encode(model: Architecture, pixels: int, size: int) -> int:
    """The same of a picture that is encoded: as a whole, however large it is."""
    return pixels * model.finest_encoded_width * size


def decoding_room(largest: int, platform: Platform, scarce: bool) -> float:
    """As `denoising_room`, in a decode or an encode whose largest array has so many bytes.

    On Metal a convolution's own memory comes on top of what waits: together they are what
    `decoding_bytes` says.
    """
    if platform == "metal":
        return max(0.5e9, (DECODE_ARRAYS - 1) * largest)
    return max(1e9, (4 if scarce or platform == "cpu" else 8) * largest)


def decoding_bytes(largest: int, platform: Platform) -> int:
    """Bytes that a decode, or an encode, takes at once, beside the autoencoder's weights.

    On a GPU what it needs: where there is more, as many results wait as `decoding_room` says.
    """
    if platform == "cpu":
        room = decoding_room(largest, platform, scarce=True)
        return int(min(CPU_ARRAYS * largest, room + CPU_CONVOLUTION * largest))
    arrays = DECODE_ARRAYS + (WINOGRAD if platform == "metal" else 0)
    return int(arrays * largest)


def gradient_bytes(state: int, blocks: int) -> int:
    """Bytes that a checkpointed gradient of a model of so many blocks takes at once, with some to
    spare; beside the model, what is trained, and a sum for each number of that.

    `state` is a hidden state's bytes, of all images of the micro-batch.
    """
    return (KEPT * blocks + IN_USE) * state + 3 * SCORES
