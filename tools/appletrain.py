"""One step of mlx-examples' FLUX training, for `tools/fulltrain.py` to compare with.

Nothing of it is here: the folder that holds its `flux` package is named by the caller, and its own
functions make the LoRAs and compute the loss. Weights are random, on the device; the step is
compiled as a whole with the optimizer in it, as its `dreambooth.py` does.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from fluxmesh.flux.config import FluxConfig

WARM_UP = 3
RANK = 8
TEXT = 512  # tokens


def measure_apple(folder: Path, config: FluxConfig, side: int, steps: int) -> tuple[Any, ...]:
    """What a `Row` of `tools/fulltrain.py` takes."""
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim

    from tools.fulltrain import device_bytes

    start = time.perf_counter()
    mx.clear_cache()
    mx.reset_peak_memory()
    pipeline = build(folder, config)
    pipeline.flow.freeze()
    pipeline.linear_to_lora_layers(RANK)
    optimizer = optim.Adam(learning_rate=1e-4)
    mx.eval(pipeline.flow.parameters())
    before = mx.get_peak_memory()
    state = [pipeline.flow.state, optimizer.state, mx.random.state]

    @functools.partial(mx.compile, inputs=state, outputs=state)
    def step(x: mx.array, t5: mx.array, clip: mx.array, guidance: mx.array) -> mx.array:
        loss, grads = nn.value_and_grad(pipeline.flow, pipeline.training_loss)(
            x, t5, clip, guidance
        )
        optimizer.update(pipeline.flow, grads)
        return loss

    batch = [
        mx.random.normal((1, side // 8, side // 8, config.in_channels // 4)),
        mx.random.normal((1, TEXT, config.context_in_dim)),
        mx.random.normal((1, config.vec_in_dim)),
        mx.full((1,), 4.0),
    ]
    batch = [x.astype(mx.bfloat16) for x in batch]
    mx.eval(batch)
    taken, peaks = [], []
    for _ in range(steps):
        mx.reset_peak_memory()
        began = time.perf_counter()
        loss = step(*batch)
        mx.eval(loss, state)
        taken.append(time.perf_counter() - began)
        peaks.append(mx.get_peak_memory())
    if not mx.isfinite(loss).item():
        raise SystemExit("The loss of mlx-examples' step is no number.")
    return (
        "mlx-examples",
        statistics.median(taken[WARM_UP:] or taken),
        max(peaks),
        max(before, *peaks),
        device_bytes(),
        taken[0],
        time.perf_counter() - start,
        None,
        taken,
    )


def build(folder: Path, config: FluxConfig) -> Any:
    """Its pipeline with a random transformer and nothing else."""
    import mlx.core as mx
    from mlx.utils import tree_map

    sys.path.insert(0, str(folder.resolve()))
    from flux.flux import FluxPipeline
    from flux.model import Flux, FluxParams
    from flux.sampler import FluxSampler

    def random(shape: tuple[int, ...]) -> mx.array:
        drawn = 0.02 * mx.random.normal(shape, dtype=mx.bfloat16)
        mx.eval(drawn)
        return drawn

    flow = Flux(
        FluxParams(
            in_channels=config.in_channels,
            vec_in_dim=config.vec_in_dim,
            context_in_dim=config.context_in_dim,
            hidden_size=config.hidden_size,
            mlp_ratio=config.mlp_hidden_dim / config.hidden_size,
            num_heads=config.num_heads,
            depth=config.depth,
            depth_single_blocks=config.depth_single_blocks,
            axes_dim=list(config.axes_dim),
            theta=config.theta,
            qkv_bias=True,
            guidance_embed=config.guidance_embed,
        )
    )
    flow.update(tree_map(lambda value: random(value.shape), flow.parameters()))
    pipeline = FluxPipeline.__new__(FluxPipeline)  # without its downloads
    pipeline.dtype, pipeline.name, pipeline.flow = mx.bfloat16, "flux-dev", flow
    pipeline.sampler = FluxSampler("flux-dev")
    return pipeline
