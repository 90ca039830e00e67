"""How much memory the models take, how much there is, and what a phase really used.

The runner asks here whether all models fit at once, and measures the peak of each phase. Sizes
come from the checkpoint's configs, so that the answer is there before any weight is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from fluxmesh.flux import components, layouts
from fluxmesh.flux.checkpoint import Checkpoint

BYTES = {"bfloat16": 2.0, "float32": 4.0}
GROUP = 64  # weights that share a scale and a bias when quantized
ROOMY = 0.7  # share of memory that resident weights may take; the rest is for activations


def resident_bytes(checkpoint: Checkpoint, dtype: str, bits: int | None) -> float:
    """Bytes of all four models in memory, estimated: as if every matrix were quantized."""
    plain = BYTES[dtype]
    bits = checkpoint.bits or bits
    packed = plain if bits is None else bits / 8 + 2 * plain / GROUP
    return sum(
        (plain if component == "vae" else packed) * layouts.parameter_count(tensors)
        for component, tensors in components.tables(checkpoint).items()
    )


def memory_of_device() -> int:
    """Bytes that MLX's device may use: what Metal recommends, a GPU's own, or the machine's."""
    known = mx.device_info()
    for key in ("max_recommended_working_set_size", "total_memory", "memory_size"):
        if key in known:
            return int(known[key])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def is_roomy(checkpoint: Checkpoint, dtype: str, bits: int | None) -> bool:
    """Whether all models together leave memory for the activations of a large picture."""
    return resident_bytes(checkpoint, dtype, bits) <= ROOMY * memory_of_device()


class PeakMeter:
    """Peak memory by phase: the largest of all the times that a phase ran."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measures what runs inside; MLX has one counter, so phases don't nest."""
        mx.reset_peak_memory()
        try:
            yield
        finally:
            # The counter starts at nothing, although weights may be resident already.
            peak = max(mx.get_peak_memory(), mx.get_active_memory())
            self.peaks[name] = max(peak, self.peaks.get(name, 0))
