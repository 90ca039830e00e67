"""One rank of a ring that ends in the middle of an image, and then goes on with another.

    MLX_RANK=0 MLX_HOSTFILE=ring.json python -m tests.parallel.ending DEVICES OUT

Ranks behave as on DEVICES, such as "cuda,cpu". By each placement an image is "stopped", as the last
rank alone is told after two steps, and one is "not finite", as its third step's latents are.
OUT.json gets, for each, how many steps came and what came after them: every rank's number,
gathered, and whether the next image is the one that begins nothing early.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from fluxmesh.engine import lookahead, replay
from fluxmesh.errors import NotFiniteError
from fluxmesh.models.collectives import Ranks
from fluxmesh.models.waiting import InGraph, OnHost
from fluxmesh.sampling.denoise import StepState, denoise
from tests.parallel.cases import ParallelCase, flow_of, noise_of, plan_of


def main(devices: str, out: Path) -> None:
    group = mx.distributed.init(strict=True, backend="ring")
    device = devices.split(",")[group.rank()]
    lookahead.SHORT = 60.0  # so that steps are short on a slow machine, too
    replay.device = lambda: device  # type: ignore[assignment]
    replay.has_kernels = lambda *_: True
    ranks = Ranks(group, waiting=OnHost() if device == "metal" else InGraph())
    ends = {
        f"{placement}, {way}": ended(ParallelCase("odd", placement, steps=6), way, ranks, device)
        for placement in ("sequence", "tensor")
        for way in ("stopped", "not finite")
    }
    out.with_suffix(".json").write_text(json.dumps(ends))


def ended(case: ParallelCase, way: str, ranks: Ranks, device: str) -> dict[str, Any]:
    flow = replay.replayed(flow_of(case, ranks), ranks)
    plan = plan_of(case, flow)
    mx.eval(*plan.arrays)

    def steps(spoiled: int | None) -> Iterator[StepState]:
        for number, step in enumerate(denoise(flow, plan, noise_of(case)), start=1):
            yield step._replace(x=step.x * mx.nan) if number == spoiled else step

    def painted(stopping: Callable[[int], bool], spoiled: int | None = None) -> list[np.ndarray]:
        done: list[np.ndarray] = []
        walk = lookahead.walked(steps(spoiled), case.steps, ranks, lambda: stopping(len(done)))
        with contextlib.suppress(NotFiniteError):
            for step, _ in walk:
                done.append(np.array(step.x))
        return done

    lookahead.device = lambda: "cpu"  # where nothing is begun early
    expected = painted(lambda _: False)
    lookahead.device = lambda: device  # type: ignore[assignment]
    is_told = way == "stopped" and ranks.rank == ranks.size - 1
    cut = painted(lambda done: is_told and done >= 2, 3 if way == "not finite" else None)
    gathered = ranks.gather(mx.array([ranks.rank])).tolist()
    again = painted(lambda _: False)
    return {
        "whole": len(expected),
        "cut": len(cut),
        "gathered": gathered,
        "is_same": expected[-1].tobytes() == again[-1].tobytes(),
    }


if __name__ == "__main__":
    main(*sys.argv[1:-1], Path(sys.argv[-1]))
