"""One rank: runs every case and writes what came out, and what it did for it.

    MLX_RANK=0 MLX_HOSTFILE=ring.json python -m tests.parallel.worker SIZE CHECKPOINT OUT

OUT.npz gets each case's latents, OUT.json its collectives, bytes, work and weights. Up to three
ranks run each case twice: with collectives that the graph waits for, and that the host waits for.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from fluxmesh.models.collectives import Ranks
from fluxmesh.models.flux1.transformer import Flux
from fluxmesh.models.step_cache import StepCache
from fluxmesh.models.waiting import InGraph, OnHost, Waiting
from fluxmesh.sampling.denoise import denoise
from tests.parallel.cases import (
    WAITING_SIZES,
    ParallelCase,
    cases,
    flow_of,
    guide_of,
    noise_of,
    plan_of,
    source_of,
)
from tests.shards import used


class RankWork:
    """Counts multiplications of matrices by watching the calls that make them."""

    def __init__(self) -> None:
        self.linears = self.attention = 0
        self.ignored: set[int] = set()
        for kind in (nn.Linear, nn.QuantizedLinear):
            self._watch_linear(kind)
        attend = mx.fast.scaled_dot_product_attention

        def attention(q: mx.array, k: mx.array, v: mx.array, **options: Any) -> mx.array:
            self.attention += 2 * q.size * k.shape[2]
            return attend(q, k, v, **options)

        mx.fast.scaled_dot_product_attention = attention

    def _watch_linear(self, kind: Any) -> None:
        call = kind.__call__

        def watched(module: Any, x: mx.array) -> mx.array:
            y = call(module, x)
            if id(module) not in self.ignored:
                self.linears += x.size * y.shape[-1]
            return y

        kind.__call__ = watched

    def reset(self, flux: Flux) -> None:
        """Counts from here on, but for what meets the latents and the prompt."""
        self.linears = self.attention = 0
        self.ignored = {id(flux.img_in), id(flux.txt_in), id(flux.final_layer.linear)}


def held(flux: Flux) -> int:
    """Bytes of blocks and modulations that this process multiplies with."""
    return sum(
        array.nbytes
        for name, array in used(flux).items()
        if name.startswith(("double_blocks", "single_blocks", "final_layer.adaLN"))
    )


def run(
    case: ParallelCase, join: Any = None, work: RankWork | None = None
) -> tuple[np.ndarray, dict[str, Any]]:
    """A case's latents, and what this rank did; on one host without `join`."""
    ranks = join() if join else None
    flow = flow_of(case, ranks)
    flux = getattr(flow, "flux", flow)
    plan = plan_of(case, flow)
    if work:
        work.reset(flux)
    gather = ranks.gather if ranks else None
    images = [
        denoise(
            flow,
            plan,
            noise_of(case, image),
            source=source_of(case),
            guide=guide_of(case),
            caches=[StepCache(case.cache, gather)] if case.cache else (),
        )
        for image in range(case.images)
    ]
    reused = []
    order = range(case.images)
    if case.swapped and ranks and ranks.rank % 2:
        order = order[::-1]
    for steps in zip(*images, strict=True):
        for image in order:
            mx.eval(steps[image].x)
        reused.append([step.reused for step in steps])
    latents = np.concatenate([np.array(step.x) for step in steps])
    did: dict[str, Any] = {"held": held(flux), "dtype": str(steps[0].x.dtype), "reused": reused}
    if ranks:
        did["traffic"] = dataclasses.asdict(ranks.traffic)
    if work:
        did |= {"linears": work.linears, "attention": work.attention}
    return latents, did


def join(waiting: type[Waiting]) -> Ranks:
    """This rank, with collectives of one kind."""
    return Ranks(mx.distributed.init(strict=True, backend="ring"), waiting=waiting())


def main(size: int, checkpoint: Path, out: Path) -> None:
    ranks = Ranks.join()
    assert ranks.size == size
    work = RankWork()
    latents: dict[str, np.ndarray] = {}
    did: dict[str, Any] = {
        "same nonce": ranks.agree(b"ring generation 7 of a mesh"),
        "strange nonce": ranks.agree(b"ring generation 7" if ranks.rank else b"ring generation 6"),
    }
    for case in cases(size, checkpoint):
        key = f"{case.name}/{case.placement}"
        latents[key], did[key] = run(case, functools.partial(join, InGraph), work)
        if size in WAITING_SIZES:
            key += "/on host"
            latents[key], did[key] = run(case, functools.partial(join, OnHost), work)
    np.savez(out.with_suffix(".npz"), **latents)
    out.with_suffix(".json").write_text(json.dumps(did))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
