"""What ranks with unequal shares compute of FLUX.1 and FLUX.2: the cases of both, dealt otherwise.

    MLX_RANK=0 MLX_HOSTFILE=ring.json python -m tests.parallel.shares_cases SIZE CHECKPOINT OUT

OUT.npz gets each case's latents, OUT.json its collectives, bytes, work and weights. Each case runs
twice: with collectives that the graph waits for, and that the host waits for.
"""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fluxmesh.cluster.shares import Shares
from fluxmesh.models.collectives import Ranks
from fluxmesh.models.waiting import InGraph, OnHost
from tests.parallel import cases as flux1
from tests.parallel import flux2_cases as flux2
from tests.parallel import worker
from tests.parallel.cases import ParallelCase
from tests.parallel.flux2_cases import Flux2Case
from tests.parallel.worker import RankWork, join

SharedCase = ParallelCase | Flux2Case

# Of two and of three ranks: parts of all tokens; of 12 heads; of 6 or 8 heads in groups.
TOKENS = {2: (2, 1), 3: (5, 3, 2)}
FEW = {2: (1, 8), 3: (7, 1, 1)}  # of 9 tokens: the text, or nearly all, on one rank
HEADS = {2: (8, 4), 3: (7, 4, 1)}
GROUPS = {2: (4, 2), 3: (4, 2, 2)}  # heads of 32 channels: two are a quantization group of 64


def columns(width: int, size: int, unit: int) -> tuple[int, ...]:
    """Shares of an MLP's columns in other proportions than the heads', in whole `unit`s."""
    parts, units = {2: (3, 1), 3: (3, 2, 1)}[size], width // unit
    counts = [units * part // sum(parts) for part in parts]
    counts[0] += units - sum(counts)
    return tuple(unit * count for count in counts)


def cases(size: int, checkpoint: Path) -> list[SharedCase]:
    """All that `size` ranks run in one go."""
    sequence, few = Shares(tokens=TOKENS[size]), Shares(tokens=FEW[size])
    own = {"hidden_size": 192 if size == 2 else 256, "num_heads": 6 if size == 2 else 8}
    groups1 = replace(flux1.quantizable(2), **own)
    groups2 = replace(flux2.quantizable(2), **own)
    small1: dict[str, Any] = {"config": flux1.SHALLOW, "text_tokens": 3, "size": (4, 6)}
    small2: dict[str, Any] = {"config": flux2.SHALLOW, "text_tokens": 3, "size": (4, 6)}

    def tensor(config: Any, *, in_groups: bool = False) -> Shares:
        heads = GROUPS[size] if in_groups else HEADS[size]
        unit = 64 if in_groups else 1
        return Shares(heads=heads, columns=columns(config.mlp_hidden_dim, size, unit))

    odd1, odd2 = tensor(flux1.ODD), tensor(flux2.ODD)
    grouped1, grouped2 = tensor(groups1, in_groups=True), tensor(groups2, in_groups=True)
    on_disk, less1 = tensor(flux1.ON_DISK), tensor(flux1.SHALLOW)
    disk = str(checkpoint)
    return [
        ParallelCase("odd", "sequence", shares=sequence),
        ParallelCase("few", "sequence", **small1, shares=few),
        ParallelCase("bfloat16", "sequence", dtype="bfloat16", shares=sequence),
        ParallelCase("quantized", "sequence", groups1, bits=4, adapter="beside", shares=sequence),
        ParallelCase("repainted", "sequence", **small1, repaints=True, shares=sequence),
        ParallelCase("guided twice", "sequence", **small1, cfg=3.0, shares=few),
        ParallelCase("cached", "sequence", steps=6, cache=0.608, shares=sequence),
        ParallelCase("odd", "tensor", shares=odd1),
        ParallelCase("bfloat16", "tensor", dtype="bfloat16", shares=odd1),
        ParallelCase("quantized", "tensor", groups1, bits=4, shares=grouped1),
        ParallelCase("adapted", "tensor", groups1, bits=4, adapter="beside", shares=grouped1),
        ParallelCase("fused", "tensor", **small1, adapter="fused", shares=less1),
        ParallelCase("from files", "tensor", flux1.ON_DISK, checkpoint=disk, shares=on_disk),
        ParallelCase("cached", "tensor", steps=6, cache=0.608, shares=odd1),
        Flux2Case("odd", "sequence", shares=sequence),
        Flux2Case("few", "sequence", **small2, shares=few),
        Flux2Case("quantized", "sequence", groups2, bits=4, is_adapted=True, shares=sequence),
        Flux2Case("references", "sequence", references="at every step", shares=sequence),
        Flux2Case("remembered", "sequence", references="remembered", shares=sequence),
        Flux2Case("cached", "sequence", steps=6, cache=flux2.CACHE, shares=sequence),
        Flux2Case("odd", "tensor", shares=odd2),
        Flux2Case("quantized", "tensor", groups2, bits=4, shares=grouped2),
        Flux2Case("adapted", "tensor", groups2, bits=4, is_adapted=True, shares=grouped2),
        Flux2Case("remembered", "tensor", references="remembered", shares=odd2),
    ]


def key_of(case: SharedCase) -> str:
    family = "FLUX.1" if isinstance(case, ParallelCase) else "FLUX.2"
    return f"{family} {case.name}/{case.placement}"


def run(case: SharedCase, join: Any = None, work: RankWork | None = None) -> tuple[Any, Any]:
    """A case's latents, and what this rank did; on one host without `join`."""
    if isinstance(case, ParallelCase):
        return worker.run(case, join, work)
    return flux2.run(case, join() if join else None, work)


def main(size: int, checkpoint: Path, out: Path) -> None:
    assert Ranks.join().size == size
    work = RankWork()
    latents: dict[str, np.ndarray] = {}
    did: dict[str, Any] = {}
    for case in cases(size, checkpoint):
        key = key_of(case)
        latents[key], did[key] = run(case, functools.partial(join, InGraph), work)
        key += "/on host"
        latents[key], did[key] = run(case, functools.partial(join, OnHost), work)
    np.savez(out.with_suffix(".npz"), **latents)
    out.with_suffix(".json").write_text(json.dumps(did))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
