"""What one machine makes of a request by itself, in this process: what every mesh is held against.

By way of `FluxPipeline`, which Python programs use: it shares the models and the sampler with an
engine, and neither units of work, nor messages, nor a session.
"""

from __future__ import annotations

import numpy as np

from fluxmesh.engine.pipeline import FluxPipeline
from fluxmesh.engine.stages import to_pixels
from fluxmesh.planning.workload import ModelSizes
from fluxmesh.request import GenerateRequest


def painted_alone(request: GenerateRequest, pipeline: FluxPipeline | None = None) -> np.ndarray:
    """The pictures of a request, uint8 [images, H, W, 3]; `pipeline` holds its weights already."""
    if pipeline is None:
        pipeline = FluxPipeline(
            request.model,
            dtype=request.dtype,
            bits=request.bits,
            adapters=request.adapters,
            fuse_adapters=request.fuse_adapters,
            t5_padding=request.t5_padding,
        )
    filled = ModelSizes.of(pipeline.checkpoint).fill(request)
    side = pipeline.checkpoint.architecture.downsampling
    return to_pixels(
        pipeline.generate_images(
            filled.prompt,
            filled.n_images,
            filled.steps,
            filled.guidance,
            (filled.height // side, filled.width // side),
            filled.seed,
            source=filled.source,
            cache=filled.cache,
            references=filled.references,
            control=filled.control,
            negative=request.negative,
            cfg=request.cfg,
        )
    )
