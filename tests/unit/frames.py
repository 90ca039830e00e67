"""Messages for tests of the codec."""

from __future__ import annotations

import numpy as np

from fluxmesh.cluster.snapshot import ModelVariant
from fluxmesh.wire.messages import Stepped

WEIGHTS = ModelVariant("tiny")


def stepped(latents: np.ndarray | None) -> Stepped:
    return Stepped(
        job="job",
        ring_generation=1,
        image=0,
        step=1,
        is_last=False,
        seconds=0.5,
        peak_bytes=0,
        latents=latents,
    )
