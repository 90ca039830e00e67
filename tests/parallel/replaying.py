"""One rank that describes two replayed calls and computes the second first, if it is the second.

    MLX_RANK=0 MLX_HOSTFILE=ring.json python -m tests.parallel.replaying OUT

OUT.npz gets both velocities, by each placement.
"""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np

from fluxmesh.engine import replay
from fluxmesh.models.collectives import Ranks
from fluxmesh.models.waiting import InGraph
from tests.parallel.cases import SHALLOW, ParallelCase, flow_of, noise_of, plan_of


def main(out: Path) -> None:
    replay.device = lambda: "cuda"  # where calls are replayed
    replay.has_kernels = lambda *_: True
    ranks = Ranks(mx.distributed.init(strict=True, backend="ring"), waiting=InGraph())
    done = {}
    for placement in ("sequence", "tensor"):
        case = ParallelCase("small", placement, SHALLOW, 3, (4, 6))
        flow = replay.replayed(flow_of(case, ranks), ranks)
        plan = plan_of(case, flow)
        mx.eval(*plan.arrays)
        for _ in range(2):  # described, then replayed
            velocities = [plan.velocity(flow, noise_of(case), step) for step in range(2)]
            mx.eval(*(velocities[::-1] if ranks.rank else velocities))
        done[placement] = np.stack([np.array(velocity) for velocity in velocities])
    np.savez(out.with_suffix(".npz"), **done)


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
