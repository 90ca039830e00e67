"""How much memory the models take, how much there is, and what a phase really used.

`residency.py` asks here whether all models fit at once, and measures the peak of each phase. Sizes
come from the checkpoint's configs, so that the answer is there before any weight is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx

from fluxmesh.kernels.ops import device
from fluxmesh.machine import memory
from fluxmesh.models.base import Architecture
from fluxmesh.planning import activations
from fluxmesh.request import DTYPE_BYTES
from fluxmesh.weights.checkpoint import Checkpoint

GROUP = 64  # weights that share a scale and a bias when quantized
ROOMY = 0.7  # share of memory that resident weights may take; the rest is for activations
# Of freed memory, what Metal may keep: a block of a step at 2048x2048 frees and takes some 1.5 GB.
# MLX's own limit is 95% of the machine. On small Macs an eighth serves a step at 1024x1024.
CACHE_BYTES, CACHE_SHARE = 2 << 30, 1 / 8


def resident_bytes(
    checkpoint: Checkpoint,
    dtype: str,
    bits: int | None,
    shards: int = 1,
    text_bits: int | None = None,
) -> float:
    """Bytes of all models in memory, estimated: as if every matrix were quantized.

    Of the transformer, 1/`shards`. `text_bits` are the text encoders', where those have others.
    """
    plain = DTYPE_BYTES[dtype]

    def packed(bits: int | None) -> float:
        return plain if bits is None else bits / 8 + 2 * plain / GROUP

    bits = checkpoint.bits or bits
    model = checkpoint.architecture
    transformer = model.parameters("modulator") + model.parameters("denoiser")
    return (
        plain * model.parameters("autoencoder")
        + packed(text_bits or checkpoint.text_bits or bits) * model.parameters("text")
        + packed(bits) * transformer / shards
    )


def memory_of_device() -> int:
    """Bytes that MLX's device may use: what Metal recommends, a GPU's own, or the machine's."""
    known = mx.device_info()
    for key in ("max_recommended_working_set_size", "total_memory", "memory_size"):
        if key in known:
            return int(known[key])
    return memory.total_bytes()


def room(limit: int | None) -> int:
    """Bytes that this engine may use in all: of the device, of `limit`, of what is free now.

    What it holds counts as free: some of it may leave.
    """
    most = memory_of_device() if limit is None else min(limit, memory_of_device())
    if device() == "cuda":
        return most
    own = mx.get_active_memory() + mx.get_cache_memory()
    return min(most, memory.free_bytes() + own)


def is_roomy(
    checkpoint: Checkpoint,
    dtype: str,
    bits: int | None,
    shards: int = 1,
    limit: int | None = None,
    text_bits: int | None = None,
) -> bool:
    """Whether all models together leave memory for the activations of a large picture.

    `text_bits` as in `resident_bytes`; `limit` is the most that may be used, in bytes, where that
    is not all of the device's.
    """
    room = memory_of_device() if limit is None else min(limit, memory_of_device())
    return resident_bytes(checkpoint, dtype, bits, shards, text_bits) <= ROOMY * room


def denoising_room(
    hidden_size: int, tokens: int, dtype: mx.Dtype, scarce: bool, *, is_quantized: bool
) -> float:
    """Bytes for what a step computes beside the weights (`planning/activations.py`).

    Whoever has quantized the weights wants memory more than the last hundredths of speed.
    """
    state = tokens * hidden_size * dtype.size
    most = min(mx.get_memory_limit(), memory_of_device())
    free = 0 if is_quantized else most - mx.get_active_memory()
    return activations.denoising_room(state, device(), scarce, free)


def decoding_room(
    model: Architecture, height: int, width: int, dtype: mx.Dtype, scarce: bool
) -> float:
    """Bytes for what the decoder computes of a picture of so many pixels."""
    largest = activations.largest_of_decode(model, height, width, dtype.size)
    return activations.decoding_room(largest, device(), scarce)


def encoding_room(model: Architecture, pixels: int, dtype: mx.Dtype, scarce: bool) -> float:
    """The same for the encoder."""
    largest = activations.largest_of_encode(model, pixels, dtype.size)
    return activations.decoding_room(largest, device(), scarce)


def counts_operations() -> bool:
    """Whether MLX counts what waits for the device in operations alone (`engine_envs`)."""
    return device() == "cuda" and os.environ.get("MLX_USE_CUDA_GRAPHS") == "0"


@contextmanager
def bounded(room: float) -> Iterator[None]:
    """Inside, results that wait for their use take at most about `room` bytes.

    MLX describes work as fast as the host can, and holds whatever that will write until it has run:
    on a CUDA GPU 12 GB ahead of a step of FLUX, and no faster for it; on Metal ten command buffers,
    each of which may be one convolution of a picture with gigabytes of its own. Beyond its limit
    MLX waits for the device before it describes more, and on Metal keeps no more freed memory
    than that. What is computed stays the same to the bit.

    Where it `counts_operations`, MLX looks at that limit once in 30 of them (`engine_envs`).

    The limit stays within the one that holds already, and within what the device may use: there it
    is better to wait for the device than to make macOS page the weights out.
    """
    before = mx.get_memory_limit()
    mx.set_memory_limit(min(before, memory_of_device(), int(mx.get_active_memory() + room)))
    try:
        yield
    finally:
        mx.set_memory_limit(before)


def bound_cache() -> None:
    """On Metal, lets MLX keep CACHE_BYTES of freed memory for its next use, and not all of it."""
    if device() == "metal":
        mx.set_cache_limit(int(min(CACHE_BYTES, CACHE_SHARE * memory_of_device())))


def free_cache() -> None:
    """Lets it keep as much as the device may use: a training frees and takes tens of GB a step."""
    if device() == "metal":
        mx.set_cache_limit(memory_of_device())


def give_back() -> None:
    """Gives freed memory that MLX keeps to whom it is in common with; a CUDA GPU's is its own."""
    if device() != "cuda":
        mx.clear_cache()


@dataclass
class Apart:
    """The peak of what `PeakMeter.apart` measured, there when it is over."""

    nbytes: int = 0


class PeakMeter:
    """Peak memory by phase: the largest of all the times that a phase ran."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self._current: str | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measures what runs inside; MLX has one counter, so phases don't nest."""
        mx.reset_peak_memory()
        self._current = name
        try:
            yield
        finally:
            self._keep()
            self._current = None

    @contextmanager
    def apart(self) -> Iterator[Apart]:
        """Measures a part of a phase by itself, and as part of the phase."""
        self._keep()
        mx.reset_peak_memory()
        part = Apart()
        try:
            yield part
        finally:
            part.nbytes = _peak()
            self._keep()

    def now(self, name: str | None = None) -> int:
        """Bytes of the phase so far; without a name, of all of them."""
        self._keep()
        return max(self.peaks.values(), default=0) if name is None else self.peaks.get(name, 0)

    def forget(self) -> None:
        """Begins anew, with the next job."""
        self.peaks.clear()

    def _keep(self) -> None:
        if self._current is not None:
            self.peaks[self._current] = max(_peak(), self.peaks.get(self._current, 0))


def _peak() -> int:
    # The counter starts at nothing, although weights may be resident already.
    return max(mx.get_peak_memory(), mx.get_active_memory())
