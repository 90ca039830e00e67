"""What ranks compute of FLUX.2, and one host too: small random transformers with no zero in them.

    MLX_RANK=0 MLX_HOSTFILE=ring.json python -m tests.parallel.flux2_cases SIZE OUT

OUT.npz gets each case's latents, OUT.json its collectives, bytes, work and weights. Up to three
ranks run each case twice: with collectives that the graph waits for, and that the host waits for.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from fluxmesh.cluster.shares import EVEN, Shares
from fluxmesh.models.collectives import Ranks
from fluxmesh.models.flux2.config import Flux2Config, Flux2Schedule
from fluxmesh.models.flux2.parallel import SequenceFlux2, TensorFlux2
from fluxmesh.models.flux2.partition import cuts
from fluxmesh.models.flux2.positions import image_positions
from fluxmesh.models.flux2.quantization import group_size
from fluxmesh.models.flux2.runtime import ReferenceTokens, TextFeatures
from fluxmesh.models.flux2.transformer import Flux2
from fluxmesh.models.lora_linear import LoRALinear
from fluxmesh.models.module_tree import module_at, replace_module
from fluxmesh.models.partition import Shard
from fluxmesh.models.step_cache import StepCache
from fluxmesh.models.waiting import InGraph, OnHost
from fluxmesh.sampling.latents import initial_noise
from fluxmesh.sampling.schedule import timesteps
from tests.flux2_models import random_flux2
from tests.flux2_runtime import Flux2Models
from tests.parallel.worker import RankWork, join
from tests.shards import used

WAITING_SIZES = (2, 3)  # ranks that also run each case with a host that waits for collectives

# 19 tokens, which no number of ranks divides; 12 heads of 8 channels; an embedding of guidance
ODD = Flux2Config(
    in_channels=16,
    out_channels=16,
    context_in_dim=12,
    hidden_size=96,
    num_heads=12,
    depth=2,
    depth_single_blocks=3,
    axes_dim=(2, 2, 2, 2),
    guidance_embed=True,
)
# 9 tokens: of four ranks one has text alone, one both, one image alone, and one nothing to do
SHALLOW = replace(ODD, depth=1, depth_single_blocks=1, guidance_embed=False)
CACHE = 0.8  # a threshold that skips some steps
REFERENCES = ((2, 3), (1, 5))  # rows and columns of tokens: 11, which no number of ranks divides


@dataclass(frozen=True)
class Flux2Case:
    """One request; equal but for `placement`, two cases should give one picture."""

    name: str
    placement: str  # "one", "tensor" or "sequence"
    config: Flux2Config = ODD
    text_tokens: int = 7
    size: tuple[int, int] = (6, 8)  # latents: 12 image tokens
    dtype: str = "float32"
    bits: int | None = None
    is_adapted: bool = False
    references: str = ""  # "", "at every step" or "remembered"
    guidance: float = 3.5
    is_distilled: bool = True
    steps: int = 3
    cache: float = 0.0  # threshold of step caching
    shares: Shares = EVEN

    @property
    def image_tokens(self) -> int:
        return self.size[0] * self.size[1] // 4

    @property
    def calls(self) -> int:
        """Of the transformer, a step."""
        guided = not self.is_distilled and not self.config.guidance_embed
        return 2 if guided else 1


def quantizable(size: int) -> Flux2Config:
    """Heads of 32 channels, two a host, and columns that are whole groups of 64."""
    return replace(SHALLOW, hidden_size=64 * size, num_heads=2 * size, axes_dim=(8, 8, 8, 8))


def cases(size: int) -> list[Flux2Case]:
    """All that `size` ranks run in one go."""
    small: dict[str, Any] = {"config": SHALLOW, "text_tokens": 3, "size": (4, 6)}
    groups: dict[str, Any] = {"config": quantizable(size), "bits": 4}
    made = []
    for placement in ("tensor", "sequence"):
        made += [
            Flux2Case("odd", placement),
            Flux2Case("shallow", placement, **small),
            Flux2Case("bfloat16", placement, dtype="bfloat16"),
            Flux2Case("float16", placement, dtype="float16"),
            Flux2Case("quantized", placement, **groups),
            Flux2Case("adapted", placement, **small, is_adapted=True),
            Flux2Case("quantized and adapted", placement, **groups, is_adapted=True),
            Flux2Case("guided twice", placement, **small, is_distilled=False),
            Flux2Case("references", placement, references="at every step"),
            Flux2Case("remembered", placement, references="remembered"),
            Flux2Case("cached", placement, steps=6, cache=CACHE),
        ]
    return made


def flux_of(case: Flux2Case) -> Flux2:
    """The case's whole transformer, the same each time."""
    flux = random_flux2(case.config)
    if case.bits:

        def chosen(name: str, module: nn.Module) -> bool | dict[str, int]:
            if not isinstance(module, nn.Linear):
                return False
            group = group_size("transformer", f"{name}.weight", module.weight.shape)
            return {"group_size": group, "bits": case.bits or 0} if group else False

        nn.quantize(flux, class_predicate=chosen)
    flux.set_dtype(getattr(mx, case.dtype))
    rng = np.random.default_rng(9)
    for name, cut in cuts(case.config, Shard(0, 2)).items() if case.is_adapted else ():
        linear = module_at(flux, name)
        out, columns = linear.weight.shape
        if case.bits:
            columns = columns * 32 // case.bits
        assert cut.length == (columns if cut.axis else out)
        low = [rng.standard_normal(shape) / 8 for shape in ((columns, 3), (3, out))]
        replace_module(
            flux, name, LoRALinear(linear, *(mx.array(x, dtype=flux.dtype) for x in low), 0.7)
        )
    return flux


def references() -> ReferenceTokens:
    rng = np.random.default_rng(4)
    count = sum(rows * columns for rows, columns in REFERENCES)
    ids = [image_positions(*grid, number) for number, grid in enumerate(REFERENCES, start=1)]
    tokens = rng.standard_normal((1, count, 16)).astype(np.float32)
    return ReferenceTokens(mx.array(tokens), np.concatenate(ids))


def run(case: Flux2Case, ranks: Ranks | None, work: RankWork | None = None) -> tuple[Any, Any]:
    """A case's latents, and what this rank did; on one host without `ranks`."""
    whole = flux_of(case)
    flow: Any = whole
    if ranks:
        flow = {"tensor": TensorFlux2, "sequence": SequenceFlux2}[case.placement](
            whole, ranks, case.shares
        )
    flux = getattr(flow, "flux", flow)
    unused: Any = None
    runtime = Flux2Models(
        transformer=flow,
        text_encoder=unused,
        embedding=unused,
        tokenizer=unused,
        autoencoder=unused,
        is_distilled=case.is_distilled,
        remembers_references=case.references == "remembered",
    )
    rng = np.random.default_rng(1)
    shape = (1, case.text_tokens, case.config.context_in_dim)
    text = TextFeatures(*(mx.array(rng.standard_normal(shape), dtype=mx.float32) for _ in "ab"))
    times = timesteps(case.steps, case.image_tokens, Flux2Schedule())
    kept = references() if case.references else None
    request = runtime.prepare(text, times, case.size, case.guidance, kept)
    if work:
        work.reset(flux)
    before = dataclasses.asdict(ranks.traffic) if ranks else {}
    gather = ranks.gather if ranks else None
    caches = [StepCache(case.cache, gather)] if case.cache else None
    noise = mx.array(initial_noise(0, *(8 * side for side in case.size), channels=4))
    reused = []
    for x in runtime.denoise(request, noise, caches):
        mx.eval(x)
        reused.append(bool(caches and caches[0].reused))
    blocks = [
        array
        for name, array in used(flux).items()
        if name.startswith(("double_blocks", "single_blocks")) and "norm" not in name
    ]
    did: dict[str, Any] = {
        "held": sum(array.nbytes for array in blocks),
        "dtype": str(x.dtype),
        "reused": reused,
    }
    if ranks:
        after = dataclasses.asdict(ranks.traffic)
        did |= {"before": before, "traffic": {k: after[k] - before[k] for k in after}}
    if work:
        did |= {"linears": work.linears, "attention": work.attention}
    return np.array(x), did


def main(size: int, out: Path) -> None:
    assert Ranks.join().size == size
    work = RankWork()
    latents: dict[str, np.ndarray] = {}
    did: dict[str, Any] = {}
    for case in cases(size):
        key = f"{case.name}/{case.placement}"
        latents[key], did[key] = run(case, join(InGraph), work)
        if size in WAITING_SIZES:
            key += "/on host"
            latents[key], did[key] = run(case, join(OnHost), work)
    np.savez(out.with_suffix(".npz"), **latents)
    out.with_suffix(".json").write_text(json.dumps(did))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
