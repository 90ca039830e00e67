"""One rank beside a watchdog like Metal's, and a last rank that comes late to one collective.

    MLX_RANK=0 MLX_HOSTFILE=ring.json python -m tests.parallel.late ROAD MOMENT... OUT

Each MOMENT is played twice, first with all in time; OUT.json gets whether both gave the same bytes.
Fails in Metal's words where something was in line on the GPU that waited for longer than LIMIT.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

from fluxmesh.engine.lookahead import walked
from fluxmesh.models.collectives import Ranks
from fluxmesh.models.step_cache import StepCache
from fluxmesh.models.waiting import InGraph, OnHost
from fluxmesh.sampling.denoise import denoise
from tests.parallel.cases import ParallelCase, flow_of, noise_of, plan_of
from tests.watchdog import Watchdog, late

# As 8 s are to Metal's 5 s. A machine under load may keep a thread, or a whole rank, waiting for
# seconds: a graph that must wait too long waits for longer still.
LIMIT = 1.5
LATE = {"host": 2.4, "graph": 6.0}

Play = Callable[[Ranks], np.ndarray]


def painted(case: ParallelCase) -> Play:
    """All steps of an image, with the questions between them."""

    def play(ranks: Ranks) -> np.ndarray:
        flow = flow_of(case, ranks)
        plan = plan_of(case, flow)
        mx.eval(*plan.arrays)
        caches = [StepCache(case.cache, ranks.gather)] if case.cache else []
        walk = denoise(flow, plan, noise_of(case), caches=caches)
        ahead = not caches
        for step, _ in walked(walk, case.steps, ranks, stopping=lambda: False, ahead=ahead):
            x = np.array(step.x)
        return x

    return play


def agreed(ranks: Ranks) -> np.ndarray:
    return np.array(ranks.agree(b"the nonce of a ring generation"))


def trained(ranks: Ranks) -> np.ndarray:
    """What `TrainingWorker` does with the sums of an update."""
    total = mx.arange(1000, dtype=mx.int64)
    mx.eval(total)
    total = ranks.sum(total)
    mx.eval(total)
    return np.array(total * 2)


CACHED = {"steps": 6, "cache": 0.608}
# What is played, and the collective to which somebody comes late.
MOMENTS: dict[str, tuple[Play, int]] = {
    "nonce": (agreed, 1),
    "training": (trained, 1),
    "modulations": (painted(ParallelCase("odd", "tensor")), 1),
    "first step of tensor": (painted(ParallelCase("odd", "tensor")), 3),
    "later step of tensor": (painted(ParallelCase("odd", "tensor")), 12),
    "first step of sequence": (painted(ParallelCase("odd", "sequence")), 3),
    "later step of sequence": (painted(ParallelCase("odd", "sequence")), 10),
    "later step of a cache": (painted(ParallelCase("cached", "sequence", **CACHED)), 10),
}


def main(road: str, moments: list[str], out: Path) -> None:
    watchdog = Watchdog(LIMIT)
    group = mx.distributed.init(strict=True, backend="ring")
    ranks = Ranks(group, watchdog.collectives, OnHost() if road == "host" else InGraph())
    is_late = ranks.rank == ranks.size - 1
    same: dict[str, bool] = {}
    for moment in moments:
        play, call = MOMENTS[moment]
        expected = play(ranks)
        with late(call, LATE[road]) if is_late else contextlib.nullcontext():
            actual = play(ranks)
        watchdog.check()
        same[moment] = actual.tobytes() == expected.tobytes()
    out.with_suffix(".json").write_text(json.dumps(same))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:-1], Path(sys.argv[-1]))
    os._exit(0)  # the watchdog's thread still asks MLX, whose end under it is an abort
