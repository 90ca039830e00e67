"""Short training runs of a random model on random pictures, everything random switched on."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

from fluxmesh.engine.stages import PipelineStages
from fluxmesh.training import checkpoint
from fluxmesh.training.compute.learner import Learner
from fluxmesh.training.data.encoding import Caption, Crop, DatasetEncoder
from fluxmesh.training.data.feature_cache import FeatureCache
from fluxmesh.training.events import TrainEvent
from fluxmesh.training.local_executor import train
from fluxmesh.training.plan import prepare
from fluxmesh.training.request import TrainRequest
from fluxmesh.training.run import read_examples
from tests.checkpoints import make_checkpoint
from tests.datasets import make_dataset
from tests.flux2_checkpoint import Kind, make_flux2

FINAL = checkpoint.FINAL
TEXT_LENGTH = 40  # of FLUX.2, so that klein's frame and a short caption go in
FLUX2_KINDS: dict[str, Kind] = {"klein": "klein", "klein-base": "base", "flux2-dev": "dev"}


def make_place(folder: Path, model: str = "dev") -> Path:
    """A model (FLUX.1 dev's kind, or one of FLUX.2), a data set of two sizes, room for a cache."""
    if model == "dev":
        make_checkpoint(folder / "model", seed=4, guidance=True)
    else:
        make_flux2(folder / "model", FLUX2_KINDS[model], seed=4, text_length=TEXT_LENGTH)
    make_dataset(folder / "data", sizes=((40, 40), (48, 24), (33, 37)))
    return folder


def asked(place: Path, out: Path, **changed) -> TrainRequest:
    """A short run with everything random switched on."""
    request = TrainRequest(
        dataset=str(place / "data"),
        seed=7,
        model=str(place / "model"),
        dtype="float32",
        iterations=16,
        grad_accumulate=4,
        batch_size=2,
        num_augmentations=2,
        lora_rank=4,
        lora_dropout=0.1,
        caption_dropout=0.2,
        warmup_steps=1,
        learning_rate=3e-3,
        checkpoint_every=4,
        output_dir=str(out),
        cache_dir=str(place / "cache"),
    )
    return dataclasses.replace(request, **changed)


def run(request: TrainRequest) -> list[TrainEvent]:
    return list(train(request))


def of(events: list[TrainEvent], kind: type) -> list:
    return [event for event in events if isinstance(event, kind)]


def final(out: Path) -> str:
    """The hash of a run's adapter: a test that fails does not compare its bytes in words."""
    return hashlib.sha256((out / FINAL).read_bytes()).hexdigest()


def learner(request: TrainRequest) -> Learner:
    """One host's learner, its features encoded."""
    pipeline = PipelineStages(request.model, dtype=request.dtype, bits=request.bits)
    examples, _ = read_examples(request)
    plan = prepare(request, examples, pipeline.checkpoint)
    cache = FeatureCache(Path(request.cache_dir))
    encoder = DatasetEncoder(pipeline, cache, examples, plan.sizes, request.seed)
    units = [*map(Caption, plan.captions), *(Crop(image, crop) for image, crop in plan.crops)]
    for unit in encoder.pending(units):
        encoder.store(unit)
    return Learner(pipeline, encoder, plan)
