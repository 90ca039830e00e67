"""Requests to random models of both families, and what an engine takes for each of their phases.

The units are those that agents give to engines. An engine of a ring is one alone here, whose
collectives reach nobody (`AloneInARing`): what others would send, it makes itself, so that it
computes and holds what a rank does.
"""

from __future__ import annotations

import gc
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from fluxmesh.engine.worker import Worker
from fluxmesh.models.collectives import Pending, Ranks
from fluxmesh.models.flux2.files.folder import KV_PIPELINE
from fluxmesh.planning.workload import ModelSizes, Workload
from fluxmesh.request import FilledRequest, GenerateRequest, SourceImage
from fluxmesh.sampling.latents import initial_noise
from fluxmesh.sampling.takes import with_reader
from fluxmesh.weights import hub
from fluxmesh.wire import messages
from fluxmesh.wire.messages import Decode, Encode, EncodePictures, EncodeSource, Load, Paint
from tests.checkpoints import AUTOENCODER, TRANSFORMER, make_checkpoint
from tests.flux2_checkpoint import AUTOENCODER as AUTOENCODER2
from tests.flux2_checkpoint import TWELVE_HEADS, make_flux2
from tests.redux_checkpoint import make_redux

R = TypeVar("R", bound=messages.Report)
HEAD: dict[str, Any] = {"fence": 0, "ring_generation": 0}
# Weights that outweigh what small things beside them take.
FLUX1 = replace(
    TRANSFORMER,
    hidden_size=192,
    num_heads=6,
    depth=1,
    depth_single_blocks=2,
    axes_dim=(8, 12, 12),
)
FLUX2 = replace(
    TWELVE_HEADS,
    hidden_size=192,
    num_heads=6,
    axes_dim=(8, 8, 8, 8),
    depth=1,
    depth_single_blocks=2,
)
AE1 = replace(AUTOENCODER, widths=(32, 32, 64, 64))
AE2 = replace(AUTOENCODER2, widths=(16, 16, 32, 32), decoder_widths=(16, 16, 32, 32))
SIZE = (64, 96)


class AloneInARing(Ranks):
    """A rank of so many whose sums and gathers have its own part alone, as often as there are
    ranks."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(SimpleNamespace(rank=lambda: rank, size=lambda: size))

    def sum(self, x: mx.array) -> mx.array:
        return x * self.size

    def begin_gather(self, x: mx.array) -> Pending:
        return self._begun(mx.concatenate([x] * self.size))


@dataclass(frozen=True)
class MemoryCase:
    """A request to one of the models that `make_models` writes."""

    name: str
    model: str
    asked: dict[str, Any] = field(default_factory=dict)
    references: int = 0
    source: bool = False

    def request(self, models: Path) -> GenerateRequest:
        rng = np.random.default_rng(3)
        sizes = ((64, 96), (96, 64))[: self.references]
        pictures = tuple(rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in sizes)
        asked = {"dtype": "float32", "steps": 2, "height": SIZE[0], "width": SIZE[1]} | self.asked
        if self.source:
            pixels, mask = (
                rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8),
                np.zeros(SIZE, np.uint8),
            )
            mask[20:40, 30:70] = 255
            asked["source"] = SourceImage(pixels, mask=mask)
        if asked.get("redux"):
            asked["redux"] = str(models / asked["redux"])
        model = self.model if self.model == "tiny" else str(models / self.model)
        return GenerateRequest("two dogs", 5, model, references=pictures, **asked)


CASES = (
    MemoryCase("tiny", "tiny"),
    MemoryCase("tiny, bfloat16", "tiny", {"dtype": "bfloat16"}),
    MemoryCase("tiny, 4 bits", "tiny", {"bits": 4}),
    MemoryCase("dev", "dev"),
    MemoryCase("dev, two calls", "dev", {"cfg": 3.0, "negative": "rain"}),
    MemoryCase("dev, Redux", "dev", {"redux": "redux", "reference_strengths": (0.9, 0.4)}, 2),
    MemoryCase("dev, inpainting", "dev", source=True),
    MemoryCase("Kontext", "kontext", references=1),
    MemoryCase("Fill", "fill", source=True),
    MemoryCase("klein", "klein"),
    MemoryCase("klein, 4 bits", "klein", {"bits": 4}),
    MemoryCase("klein, two references", "klein", references=2),
    MemoryCase("klein KV, two references", "klein-kv", references=2),
    MemoryCase("base, two calls", "base"),
    MemoryCase("base, two calls and references", "base", references=2),
)


def make_models(folder: Path) -> None:
    """What the cases name."""
    for name, channels in (("dev", 64), ("kontext", 64), ("fill", 2 * 64 + 256)):
        sizes = replace(FLUX1, in_channels=channels, out_channels=64)
        how: Any = {"transformer": sizes, "autoencoder": AE1, "guidance": True}
        make_checkpoint(folder / name, **how)
    _call(folder / "kontext", "FluxKontextPipeline")
    for name, kind in (("klein", "klein"), ("klein-kv", "klein"), ("base", "base")):
        make_flux2(folder / name, kind, transformer=FLUX2, autoencoder=AE2)  # type: ignore[arg-type]
    _call(folder / "klein-kv", KV_PIPELINE)
    make_redux(folder / "redux")


def _call(folder: Path, pipeline: str) -> None:
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": pipeline}))


def peaks(
    case: MemoryCase, models: Path, placement: Any, hosts: int, shards: int, **more: Any
) -> dict[str, tuple[int, int]]:
    """Bytes of each phase on the first of so many hosts: what it took at most, and what the plan
    says. What other tests of this process still hold counts for none."""
    asked = replace(case.request(models), **more)
    sizes = ModelSizes.of(hub.resolve(asked.model))
    if asked.references:
        reading = with_reader(sizes.architecture, asked.model, asked.redux, download=False)
        sizes = replace(sizes, architecture=reading.architecture)
    request = sizes.fill(asked)
    work = Workload.of(request, sizes)
    gc.collect()
    others = mx.get_active_memory()
    worker = Worker()
    if hosts > 1:
        worker.join(AloneInARing(0, hosts))
    mx.clear_cache()
    measured = _measured(worker, case.name, request, work, placement, shards)
    plan = work.memory(placement, hosts, shards, "cpu")
    planned = {
        "pictures": work.encoding_memory(shards, "cpu"),
        "denoise": plan.denoise,
        "decode": plan.decode,
    }
    return {phase: (nbytes - others, planned[phase]) for phase, nbytes in measured.items()}


def _measured(
    worker: Worker,
    job: str,
    request: FilledRequest,
    work: Workload,
    placement: Any,
    shards: int,
) -> dict[str, int]:
    """Each phase's peak. Text encoders leave, as where they take turns with the rest."""
    measured: dict[str, int] = {}
    common: dict[str, Any] = {**HEAD, "job": job, "weights": work.weights}
    model = work.model.architecture

    def run(unit: messages.Work, kind: type[R], phase: str = "") -> R:
        worker.meter.forget()
        (*_, report) = (each for each in worker.do(unit) if isinstance(each, kind))
        if phase:
            measured[phase] = max(worker.meter.now(), measured.get(phase, 0))
        return report

    words = {"prompt": request.prompt, "negative": request.negative, "stay": False}
    text = run(Encode(**common, **words), messages.TextEncoded)
    features, conditions = dict(text.features), None
    if not request.low_memory:  # as there from earlier requests
        rank = 0 if worker.ranks is None or shards == 1 else worker.ranks.rank
        list(worker.do(Load(**common, shard=rank, shards=shards)))
    low: dict[str, Any] = {"text_stays": False, "makes_room": request.low_memory}
    if pictures := model.pictures(request):
        sees = bool(model.of_role("vision"))
        how = {"reader": request.redux, "strengths": request.reference_strengths} if sees else {}
        unit = EncodePictures(**common, **low, named=pictures, stay=False, **how)
        report = run(unit, messages.PicturesEncoded, "" if sees else "pictures")
        conditions = dict(report.conditions)
    source = None
    if request.source is not None and not model.fills_by_channels:
        unit = EncodeSource(**common, **low, pixels=request.source.pixels)
        source = run(unit, messages.SourceEncoded, "pictures").latents
    height, width = request.height, request.width
    noise = initial_noise(7, height, width, model.latent_channels, model.downsampling)
    size: dict[str, Any] = {"height": height, "width": width}
    mask = None if request.source is None or source is None else request.source.mask
    paint = Paint(
        **common,
        **size,
        placement=placement,
        image=0,
        steps=request.steps,
        first=0,
        guidance=request.guidance,
        low_memory=request.low_memory,
        preview=False,
        strength=1.0,
        latents=None,
        noise=noise,
        features=features,
        conditions=conditions,
        source=source,
        mask=mask,
        cfg=request.cfg,
    )
    step = run(paint, messages.Stepped, "denoise")
    latents = noise if step.latents is None else step.latents
    decode = Decode(**common, **size, images=(0,), latents=latents)
    run(decode, messages.Pictured, "decode")
    return measured
