"""What the ranks compute, and one host too: small random transformers with no zero in them.

Imported by the tests and by `worker.py`, so that both make the same model from the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from fluxmesh.adapters.changes import LowRank
from fluxmesh.adapters.lora_on_linear import beside, fused
from fluxmesh.cluster.shares import EVEN, Shares
from fluxmesh.models.collectives import Ranks
from fluxmesh.models.flux1.config import FluxConfig, ScheduleConfig
from fluxmesh.models.flux1.parallel import SequenceFlux, TensorFlux
from fluxmesh.models.flux1.partition import cuts
from fluxmesh.models.flux1.quantization import group_size
from fluxmesh.models.flux1.runtime import Flux1Flow, Flux1Plan, plan
from fluxmesh.models.flux1.transformer import Flux
from fluxmesh.models.module_tree import module_at, replace_module
from fluxmesh.models.partition import Shard
from fluxmesh.sampling import latents
from fluxmesh.sampling.denoise import Guide
from fluxmesh.sampling.img2img import SourceLatents
from fluxmesh.sampling.schedule import timesteps
from fluxmesh.weights import hub
from fluxmesh.weights.loading import load_transformer

STEPS = 3
WAITING_SIZES = (2, 3)  # ranks that also run each case with a host that waits for collectives

# 19 tokens, which no number of ranks divides; 12 heads of 6 channels; an embedding of guidance
ODD = FluxConfig(
    in_channels=16,
    out_channels=16,
    vec_in_dim=8,
    context_in_dim=12,
    hidden_size=72,
    num_heads=12,
    depth=2,
    depth_single_blocks=3,
    axes_dim=(2, 2, 2),
    guidance_embed=True,
)
# 9 tokens: of four ranks one has text alone, one both, one image alone, and one nothing to do
SHALLOW = replace(
    ODD,
    hidden_size=96,
    depth=1,
    depth_single_blocks=1,
    axes_dim=(2, 2, 4),
    guidance_embed=False,
)
# what a checkpoint's folder must have to count as FLUX
ON_DISK = replace(
    SHALLOW, in_channels=64, out_channels=64, vec_in_dim=32, context_in_dim=32, guidance_embed=True
)
# large enough for what every host holds (norms, biases of sums) to be well under 1%
LARGE = replace(
    ON_DISK, hidden_size=256, num_heads=8, axes_dim=(8, 12, 12), depth=1, depth_single_blocks=2
)


@dataclass(frozen=True)
class ParallelCase:
    """One request; equal but for `placement`, two cases should give one picture."""

    name: str
    placement: str  # "one", "tensor" or "sequence"
    config: FluxConfig = ODD
    text_tokens: int = 7
    size: tuple[int, int] = (6, 8)  # latents: 12 image tokens
    dtype: str = "float32"
    bits: int | None = None
    adapter: str = ""  # "", "beside" or "fused"
    images: int = 1
    checkpoint: str = ""  # a folder, instead of a model made here
    swapped: bool = False  # odd ranks evaluate the second image first
    steps: int = STEPS
    cache: float = 0.0  # threshold of step caching
    repaints: bool = False  # half of a picture, towards a custom loss
    cfg: float = 1.0  # above it, a step moves away from another text, by a second call
    shares: Shares = EVEN

    @property
    def image_tokens(self) -> int:
        return self.size[0] * self.size[1] // 4

    @property
    def calls(self) -> int:
        """Of the transformer, a step."""
        return 2 if self.cfg > 1 else 1

    @property
    def tokens(self) -> int:
        return self.text_tokens + self.image_tokens


def quantizable(size: int) -> FluxConfig:
    """Heads of 32 channels, and columns that are whole groups on each host: of 32 on three."""
    return replace(
        ODD,
        hidden_size=96 if size == 3 else 64 * size,
        num_heads=3 if size == 3 else 2 * size,
        depth=1,
        depth_single_blocks=1,
        axes_dim=(8, 12, 12),
    )


def cases(size: int, checkpoint: Path) -> list[ParallelCase]:
    """All that `size` ranks run in one go."""
    small = {"config": SHALLOW, "text_tokens": 3, "size": (4, 6)}
    groups = {"config": quantizable(size), "bits": 4}
    made = []
    for placement in ("tensor", "sequence"):
        made += [
            ParallelCase("odd", placement),
            ParallelCase("shallow", placement, **small),
            ParallelCase("bfloat16", placement, dtype="bfloat16"),
            ParallelCase("float16", placement, dtype="float16"),
            ParallelCase("float16, 4 bits", placement, **groups, adapter="beside", dtype="float16"),
            ParallelCase("quantized", placement, **groups),
            ParallelCase("adapted", placement, **small, adapter="beside"),
            ParallelCase("fused", placement, **small, adapter="fused"),
            ParallelCase("quantized and adapted", placement, **groups, adapter="beside"),
            ParallelCase("swapped", placement, **small, images=2, swapped=True),
            ParallelCase("from files", placement, ON_DISK, checkpoint=str(checkpoint)),
            ParallelCase("repainted", placement, **small, repaints=True),
            ParallelCase("filled", placement, replace(ODD, in_channels=16 + 16 + 64)),
            ParallelCase("guided twice", placement, **small, cfg=3.0),
            # Thresholds that skip some steps, for random models change much from step to step; one
            # change is so near to them that the tokens which fill up a rank would tip it.
            ParallelCase("cached", placement, steps=6, cache=0.608)
            if size < 4
            else ParallelCase("cached", placement, **small, steps=6, cache=0.715),
        ]
    return made


def random_flux(case: ParallelCase) -> Flux:
    """A transformer whose every parameter is random, norms and biases too; the same each time."""
    flux = Flux(case.config)
    rng = np.random.default_rng(5)

    def draw(name: str, shape: tuple[int, ...]) -> mx.array:
        values = rng.standard_normal(shape)
        if name.endswith("scale"):
            return mx.array(1 + 0.2 * values, dtype=mx.float32)
        width = shape[1] ** -0.5 if len(shape) == 2 else 0.3
        return mx.array(width * values, dtype=mx.float32)

    flux.load_weights([(name, draw(name, p.shape)) for name, p in nn.utils.tree_flatten(flux)])
    if case.bits:

        def chosen(name: str, module: nn.Module) -> bool | dict:
            if not isinstance(module, nn.Linear):
                return False
            group = group_size("transformer", f"{name}.weight", module.weight.shape)
            return {"group_size": group, "bits": case.bits} if group else False

        nn.quantize(flux, class_predicate=chosen)
    flux.set_dtype(getattr(mx, case.dtype))
    flux.make_room()
    for name in cuts(case.config, Shard(0, 2)) if case.adapter else ():
        linear = module_at(flux, name)
        bias = linear.bias.shape[0]
        inputs = flux.config.hidden_size
        if name.endswith("linear2"):
            inputs += flux.config.mlp_hidden_dim
        elif name.endswith("mlp.2"):
            inputs = flux.config.mlp_hidden_dim
        low = LowRank(
            rng.standard_normal((3, inputs)).astype(np.float32) / 8,
            rng.standard_normal((bias, 3)).astype(np.float32) / 8,
        )
        if case.adapter == "fused":
            fused(linear, low)
        else:
            replace_module(flux, name, beside(linear, low, flux.dtype))
    return flux


def flow_of(case: ParallelCase, ranks: Ranks | None = None) -> Flux1Flow:
    """The transformer as the case's placement runs it."""
    if case.checkpoint:
        shard = None
        if ranks and case.placement == "tensor":
            shard = Shard(ranks.rank, ranks.size, case.shares)
        flux = load_transformer(hub.resolve(case.checkpoint), mx.float32, shard=shard)
    else:
        flux = random_flux(case)
    if ranks is None:
        return flux
    return {"tensor": TensorFlux, "sequence": SequenceFlux}[case.placement](
        flux, ranks, case.shares
    )


def plan_of(case: ParallelCase, flow: Flux1Flow) -> Flux1Plan:
    times = timesteps(case.steps, case.image_tokens, ScheduleConfig())
    channels, beside = None, case.config.channels_beside
    if beside:
        values = np.random.default_rng(4).standard_normal((1, case.image_tokens, beside))
        channels = mx.array(values, dtype=mx.float32)
    how = {"channels": channels, "negative": text_of(case, seed=2), "cfg": case.cfg}
    return plan(flow, text_of(case, seed=1), times, case.size, guidance=3.5, **how)


def text_of(case: ParallelCase, seed: int) -> dict[str, mx.array]:
    rng = np.random.default_rng(seed)
    t5 = rng.standard_normal((1, case.text_tokens, case.config.context_in_dim))
    clip = rng.standard_normal((1, case.config.vec_in_dim))
    return {"t5": mx.array(t5, dtype=mx.float32), "clip": mx.array(clip, dtype=mx.float32)}


def source_of(case: ParallelCase) -> SourceLatents | None:
    """A picture whose left half stays."""
    if not case.repaints:
        return None
    clean = np.random.default_rng(3).standard_normal(noise_of(case).shape).astype(np.float32)
    painted = np.arange(case.image_tokens) % (case.size[1] // 2) >= case.size[1] // 4
    return SourceLatents(mx.array(clean), mx.array(painted[None, :, None].astype(np.float32)))


def guide_of(case: ParallelCase) -> Guide | None:
    """A loss that wants small latents."""
    return (lambda clean, step: 0.05 * (clean**2).sum() / (1 + step)) if case.repaints else None


def noise_of(case: ParallelCase, image: int = 0) -> mx.array:
    height, width = (8 * side for side in case.size)
    return mx.array(
        latents.initial_noise(image, height, width, channels=case.config.out_channels // 4)
    )
