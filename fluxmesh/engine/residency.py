"""What an engine holds: the models of a checkpoint, whole or a shard, and its place in a ring.

Below `state.py` and the units, which do the work with them. Here is decided what leaves when
something else comes, and every load is told, timed, measured and, when asked, broken off. A
checkpoint that another one follows is kept in memory beside it while there is room; the least
recently used leaves first.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from fluxmesh.cluster.shares import EVEN, Shares
from fluxmesh.cluster.snapshot import (
    Holding,
    KeptModel,
    ModelVariant,
    StepShape,
    TextHolding,
    prompt_mark,
)
from fluxmesh.engine import device_memory
from fluxmesh.engine.replay import replayed
from fluxmesh.engine.stages import PipelineStages
from fluxmesh.errors import FluxmeshError, UsageError
from fluxmesh.events import Loading
from fluxmesh.models.base import Architecture
from fluxmesh.models.collectives import Ranks
from fluxmesh.models.partition import Shard
from fluxmesh.models.runtime import Flow
from fluxmesh.weights import hub
from fluxmesh.wire.messages import EngineCounters, Measure, Paint, Warm

COMPONENTS = ("text encoders", "transformer", "autoencoder")
READER = "picture reader"  # of references, for a model that reads none by itself
COMPILED = 32  # shapes of steps that are remembered
KEPT = 8  # checkpoints, beside the one at hand


@functools.lru_cache(maxsize=2)
def _cut(architecture: Architecture) -> tuple[str, ...]:
    """How the names of what a shard divides begin."""
    return tuple(f"{module}." for module in sorted(architecture.partition.modules))


def _arrays(model: Any) -> list[tuple[str, mx.array]]:
    """A model's, by name."""
    arrays: list[tuple[str, mx.array]] = tree_flatten(model.parameters())
    return arrays


class Stopped(Exception):
    """A load was told to stop before it was done."""


@dataclass
class WorkerOptions:
    """What surrounds a worker, and how it finds models."""

    # Names here for the names that a coordinator sent.
    locate: Callable[[ModelVariant], ModelVariant] = lambda variant: variant
    download: bool = False
    memory_bytes: int | None = None  # the most that it may use; None is all of the device's
    hear: Callable[[Loading], None] | None = None  # told of bytes while weights are read
    stopping: Callable[[], bool] = lambda: False  # whether the unit at hand was cancelled
    pause: Callable[[str], None] = lambda phase: None  # tests slow an engine down with it


@dataclass(frozen=True)
class KeptPipeline:
    """A checkpoint in memory that others have followed."""

    pipeline: PipelineStages
    model: KeptModel
    content: str


class ModelStore:
    """A pipeline and a place in a ring, kept between units of work."""

    def __init__(self, options: WorkerOptions | None = None) -> None:
        self.options = options or WorkerOptions()
        self.pipeline: PipelineStages | None = None
        self.ranks: Ranks | None = None
        self.meter = device_memory.PeakMeter()
        self.doing = "starting"
        self.load_rate = 0.0  # bytes/s of the last load; 0 before one
        self.done = EngineCounters()  # what was done since the start
        self.weights: ModelVariant | None = None  # under the names that they were asked for
        self.compiled: tuple[StepShape, ...] = ()  # made in this process, the latest one last
        self.memory_bytes = 0  # that the work at hand takes; 0: nobody knows
        self._kept: list[KeptPipeline] = []  # the least recently used first
        self._room: tuple[int, int] | None = None  # for how much, beside how many, was looked
        self._content = ""
        self._spread: dict[str, Flow] = {}
        self._shares: dict[str, Shares] = {}  # of each placement, as it was asked for last
        self._sizes: dict[tuple[str, tuple[str, ...]], tuple[Any, int]] = {}

    @property
    def model(self) -> PipelineStages:
        """The pipeline that `open` made."""
        assert self.pipeline is not None, "open the weights first"
        return self.pipeline

    @property
    def content(self) -> str:
        """`Checkpoint.content` of the files that were opened."""
        return self._content

    @property
    def counters(self) -> EngineCounters:
        """What was done since the start, and what is held now: counted, not reckoned."""
        pipeline = self.pipeline
        held = blocks = 0
        if pipeline is not None and pipeline.is_loaded("flow"):
            held, blocks = (
                self._bytes_of("flow"),
                self._bytes_of("flow", _cut(pipeline.checkpoint.architecture)),
            )
        return replace(
            self.done,
            sent_bytes=0 if self.ranks is None else self.ranks.traffic.bytes,
            transformer_bytes=held,
            block_bytes=blocks,
            peak_bytes=max(self.done.peak_bytes, self.meter.now()),
        )

    @property
    def holding(self) -> Holding | None:
        """The transformer in memory, and the bytes of all beside it; None without one."""
        pipeline = self.pipeline
        if pipeline is None or self.weights is None or not pipeline.is_loaded("flow"):
            return None
        names = [name for part in (*COMPONENTS, READER) for name in self._names(part)]
        nbytes = sum(self._bytes_of(name) for name in names if pipeline.is_loaded(name))
        shard = pipeline.shard
        return Holding(
            weights=self.weights,
            nbytes=nbytes,
            shards=shard.size,
            shard=shard.rank,
            content=self.content,
            shares=shard.shares,
        )

    @property
    def text_holding(self) -> TextHolding | None:
        """What there is for reading prompts with the weights at hand; None without any."""
        pipeline = self.pipeline
        if pipeline is None or self.weights is None:
            return None
        readers = (*pipeline.runtime.text_models, *self._names(READER))
        names = [name for name in readers if pipeline.is_loaded(name)]
        return TextHolding(
            weights=self.weights,
            nbytes=sum(map(self._bytes_of, names)),
            prompts=tuple(dict.fromkeys(prompt_mark(*key[:3]) for key in pipeline.remembered)),
        )

    @property
    def kept_models(self) -> tuple[KeptModel, ...]:
        """What is in memory beside that, the least recently used first."""
        return tuple(kept.model for kept in self._kept)

    @property
    def components(self) -> tuple[str, ...]:
        """What is in memory, whole."""
        if self.pipeline is None:
            return ()
        return tuple(name for name in COMPONENTS if not self.missing(name))

    def shape_of(self, work: Paint | Measure | Warm) -> StepShape:
        """The kind of step that this work makes here. Raises as `ring`."""
        hosts = 1 if work.placement == "data" else self.ring().size
        return StepShape.of(work.weights, work.placement, hosts, work.height, work.width)

    def has_made(self, shape: StepShape) -> None:
        """Keeps in mind that such a step was made."""
        others = tuple(other for other in self.compiled if other != shape)
        self.compiled = (*others, shape)[-COMPILED:]

    def count(self, **more: float) -> None:
        """Adds to the counters."""
        self.done = replace(
            self.done, **{name: getattr(self.done, name) + value for name, value in more.items()}
        )

    def is_roomy(self, weights: ModelVariant, shards: int = 1) -> bool:
        """Whether all models together, 1/`shards` of the transformer, leave room for a picture."""
        limit, checkpoint = self.options.memory_bytes, self.open(weights).checkpoint
        how = (weights.dtype, weights.bits, shards, limit, weights.text_bits)
        return device_memory.is_roomy(checkpoint, *how)

    def join(self, ranks: Ranks | None) -> None:
        """Takes a place in a ring; None is alone."""
        self.ranks = ranks
        self._spread.clear()

    def ring(self) -> Ranks:
        """The place in the ring. Raises `UsageError` without one."""
        if self.ranks is None:
            raise UsageError("This host is in no ring, which tensor and sequence need; join one.")
        return self.ranks

    # What comes and what leaves

    def open(self, weights: ModelVariant) -> PipelineStages:
        """The pipeline of these weights: the one at hand, one that was kept, or a new one.

        What was at hand is kept then, if there is room. Reads headers alone. Raises what
        `PipelineStages` does; then what is at hand stays.
        """
        if self.weights is None or weights.denoiser != self.weights.denoiser:
            self._turn_to(weights)
        assert self.pipeline is not None
        if weights != self.weights:  # the denoiser stays
            self.pipeline.reload_text_encoders()
            self.pipeline.text_bits, self.weights = weights.text_bits, weights
        self._free_for_work()
        return self.pipeline

    def _turn_to(self, weights: ModelVariant) -> None:
        known = self._take_kept(weights)
        if known is not None:
            self._set_aside()
            self.pipeline, self._content = known.pipeline, known.content
            self.weights = known.model.holds.weights
        else:
            variant = self.options.locate(weights)
            pipeline = PipelineStages(
                variant.model,
                dtype=variant.dtype,
                bits=variant.bits,
                text_bits=variant.text_bits,
                adapters=variant.adapters,
                fuse_adapters=variant.fuse_adapters,
                download=self.options.download,
                on_loading=self._hear,
            )
            self._set_aside()
            self.pipeline = pipeline
            self.weights, self._content = weights, pipeline.checkpoint.content

    def _take_kept(self, weights: ModelVariant) -> KeptPipeline | None:
        """What was kept of these weights, unless their files are others by now; kept no more."""
        for kept in self._kept:
            if kept.model.holds.weights.denoiser == weights.denoiser:
                self._kept.remove(kept)
                model = self.options.locate(weights).model
                with contextlib.suppress(FluxmeshError):  # who opens it anew tells what is wrong
                    if hub.resolve(model, download=False).content == kept.content:
                        return kept
                break
        return None

    def drop_changed(self) -> None:
        """Models whose files are others by now leave memory: who asks for them reads them anew."""
        self._kept = [kept for kept in self._kept if kept.pipeline.stamps.changed is None]
        if self.pipeline is not None and self.pipeline.stamps.changed is not None:
            self._leave()

    def _set_aside(self) -> None:
        """What is at hand is kept, if it is whole; or it leaves."""
        holding, pipeline = self.holding, self.pipeline
        if holding is not None and pipeline is not None and not pipeline.low_memory:
            model = KeptModel(holds=holding, text=self.text_holding)
            self._kept = [*self._kept, KeptPipeline(pipeline, model, self._content)][-KEPT:]
        self._leave()

    def _free_for_work(self) -> None:
        """Kept models leave, the least recently used first, until the work at hand has its memory.

        As the planner counts it: within the limit of this engine, and what is free on its device,
        which is looked at once a job.
        """
        if not self._kept or self._room == (self.memory_bytes, len(self._kept)):
            return
        before = len(self._kept)
        if self.memory_bytes:
            room = device_memory.room(self.options.memory_bytes)
            while self._kept and self.memory_bytes + self._kept_bytes > room:
                del self._kept[0]
        else:
            self._kept.clear()
        if len(self._kept) < before:
            gc.collect()
            mx.clear_cache()
        self._room = (self.memory_bytes, len(self._kept))

    @property
    def _kept_bytes(self) -> int:
        return sum(kept.model.holds.nbytes for kept in self._kept)

    def release(self) -> None:
        """Lets every model leave memory."""
        self._kept.clear()
        self._leave()

    def _leave(self) -> None:
        """Nothing is at hand."""
        self.pipeline, self.weights, self._room = None, None, None
        self._spread.clear()
        self._sizes.clear()
        mx.clear_cache()

    def drop_transformer(self) -> None:
        """Lets the transformer leave; it loads again when it is needed."""
        self._spread.clear()
        if self.pipeline is not None:
            del self.pipeline.flow, self.pipeline.modulation

    def drop_incomplete(self, placement: str) -> None:
        """Lets it leave if its modulation weights, which are needed again, were released."""
        spread = self._spread.get(placement)
        if self.model.is_loaded("flow") and (
            self.model.flow.modulation_released or (spread and spread.modulation_released)
        ):
            self.drop_transformer()

    def hold(self, shard: Shard) -> None:
        """Says which part of the transformer is wanted; another part leaves."""
        if self.model.shard != shard:
            self.drop_transformer()
            self.model.shard = shard

    def hold_for(self, work: Paint | Measure) -> None:
        """The part that a placement runs: this rank's share, or the whole, for `tensor`.

        Raises `UsageError` where the shares are not those of this ring.
        """
        if work.placement != "data":
            work.shares.check(self.ring().size)
        if self._shares.get(work.placement, EVEN) != work.shares:
            self._spread.pop(work.placement, None)
            self._shares[work.placement] = work.shares
        if work.placement != "tensor":
            self.hold(Shard())
        elif self.model.shard != Shard() or self.model.low_memory:
            self.hold(Shard(self.ring().rank, self.ring().size, work.shares))

    def flow(self, placement: str) -> Flow:
        """The transformer as the placement runs it."""
        if placement == "data":
            return self.model.flow
        if placement not in self._spread:
            spread = self._spread_out(self.model.flow, placement)
            self._spread[placement] = replayed(spread, self.ring())
        return self._spread[placement]

    def planner(self, placement: str) -> Flow:
        """What makes modulations (`PipelineStages.planner`), as the placement runs it."""
        planner = self.model.planner()
        if self.model.is_loaded("flow"):
            return self.flow(placement)
        return planner if placement == "data" else self._spread_out(planner, placement)

    def _spread_out(self, flow: Flow, placement: str) -> Flow:
        shares = self._shares.get(placement, EVEN)
        spread: Flow = self.model.runtime.spread(flow, placement, self.ring(), shares)
        return spread

    def missing(self, component: str) -> list[str]:
        """The models of a component that are not in memory."""
        return [name for name in self._names(component) if not self.model.is_loaded(name)]

    def _names(self, component: str) -> tuple[str, ...]:
        """The models of a component, as the pipeline calls them."""
        names = {
            "text encoders": self.model.runtime.text_models,
            "transformer": ("flow",),
            "autoencoder": ("ae",),
            "modulation": ("modulation",),  # of the transformer
            READER: ("vision",),
        }
        if component not in names:
            raise UsageError(f"A model has no {component!r}; ask for {', '.join(COMPONENTS)}.")
        return names[component]

    def load(self, component: str) -> Generator[Loading, None, None]:
        """Loads what is missing of a component, with an event before and after.

        Raises `Stopped` when the unit at hand is cancelled meanwhile.
        """
        missing = self.missing(component)
        if not missing:
            return
        is_part = component == "modulation"  # the rest of the transformer comes after it
        goes_on = component == "transformer" and self.model.low_memory
        shown = "transformer" if is_part else component
        self.doing = f"loading the {shown}"
        total = self.model.file_bytes(*(["flow"] if is_part else missing))
        if not goes_on:
            yield Loading(shown, 0, total)
        self.options.pause("load")
        gc.collect()  # what has left is gone before anything comes
        start, before = time.perf_counter(), mx.get_active_memory()
        with self.meter.apart() as peak:
            self._sizes.clear()
            for name in missing:
                getattr(self.model, name)
        if not is_part and not goes_on:
            self.load_rate = total / max(time.perf_counter() - start, 1e-6)
        if component == "transformer":
            self.done = replace(self.done, load_peak_bytes=max(0, peak.nbytes - before))
        if not is_part:
            yield Loading(shown, total, total)

    def _hear(self, event: Loading) -> None:
        """Bytes were read: the one moment at which a load can stop."""
        if self.options.stopping():
            raise Stopped
        if self.options.hear is not None:
            self.options.hear(event)

    def _bytes_of(self, name: str, prefixes: tuple[str, ...] = ("",)) -> int:
        """Bytes of a model's arrays, counted once for as long as it is the same."""
        model = getattr(self.model, name)
        if name == "vision":  # several, that come and go together
            return sum(array.nbytes for each in model.values() for _, array in _arrays(each))
        state = (id(model), getattr(model, "modulation_released", False))
        known, nbytes = self._sizes.get((name, prefixes), (None, 0))
        if known != state:
            arrays = _arrays(model)
            nbytes = sum(array.nbytes for key, array in arrays if key.startswith(prefixes))
            self._sizes[name, prefixes] = (state, nbytes)
        return nbytes
