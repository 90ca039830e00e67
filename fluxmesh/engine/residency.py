"""What an engine holds: the models of one checkpoint, whole or a shard, and its place in a ring.

Below `state.py` and the units, which do the work with them. Here is decided what leaves when
something else comes, and every load is told, timed, measured and, when asked, broken off.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from fluxmesh.cluster.snapshot import Holding, ModelVariant, StepShape
from fluxmesh.engine import device_memory
from fluxmesh.engine.pipeline import FluxPipeline
from fluxmesh.errors import UsageError
from fluxmesh.events import Loading
from fluxmesh.models.collectives import Ranks
from fluxmesh.models.flux1.parallel import SequenceFlux, TensorFlux
from fluxmesh.models.flux1.transformer import Flux
from fluxmesh.models.partition import Shard
from fluxmesh.wire.messages import EngineCounters, Measure, Paint, Warm

COMPONENTS = {"text encoders": ("clip", "t5"), "transformer": ("flow",), "autoencoder": ("ae",)}
PARTS = {**COMPONENTS, "modulation": ("modulation",)}  # that one is of the transformer
COMPILED = 32  # shapes of steps that are remembered
BLOCKS = ("double_blocks.", "single_blocks.", "final_layer.adaLN_modulation.")


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


class ModelStore:
    """A pipeline and a place in a ring, kept between units of work."""

    def __init__(self, options: WorkerOptions | None = None) -> None:
        self.options = options or WorkerOptions()
        self.pipeline: FluxPipeline | None = None
        self.ranks: Ranks | None = None
        self.meter = device_memory.PeakMeter()
        self.doing = "starting"
        self.load_rate = 0.0  # bytes/s of the last load; 0 before one
        self.done = EngineCounters()  # what was done since the start
        self.weights: ModelVariant | None = None  # under the names that they were asked for
        self.compiled: tuple[StepShape, ...] = ()  # made in this process, the latest one last
        self._content = ""
        self._spread: dict[str, TensorFlux | SequenceFlux] = {}
        self._sizes: dict[tuple[str, tuple[str, ...]], tuple[Any, int]] = {}

    @property
    def model(self) -> FluxPipeline:
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
            held, blocks = self._bytes_of("flow"), self._bytes_of("flow", BLOCKS)
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
        names = (name for every in COMPONENTS.values() for name in every)
        nbytes = sum(self._bytes_of(name) for name in names if pipeline.is_loaded(name))
        shard = pipeline.shard
        return Holding(
            weights=self.weights,
            nbytes=nbytes,
            shards=shard.size,
            shard=shard.rank,
            content=self.content,
        )

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
        return device_memory.is_roomy(checkpoint, weights.dtype, weights.bits, shards, limit)

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

    def open(self, weights: ModelVariant) -> FluxPipeline:
        """The pipeline of these weights: the one at hand, or a new one, after the other has left.

        Reads headers alone. Raises what `FluxPipeline` does.
        """
        if self.pipeline is None or weights != self.weights:
            self.release()
            variant = self.options.locate(weights)
            self.pipeline = FluxPipeline(
                variant.model,
                dtype=variant.dtype,
                bits=variant.bits,
                adapters=variant.adapters,
                fuse_adapters=variant.fuse_adapters,
                download=self.options.download,
                on_loading=self._hear,
            )
            self.weights, self._content = weights, self.pipeline.checkpoint.content
        return self.pipeline

    def release(self) -> None:
        """Lets every model leave memory."""
        self.pipeline, self.weights = None, None
        self._spread.clear()
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
        """The part that a placement runs: any shard of this rank, or the whole, for `tensor`."""
        if work.placement != "tensor":
            self.hold(Shard())
        elif self.model.shard != Shard() or self.model.low_memory:
            self.hold(self.ring().shard)

    def flow(self, placement: str) -> Flux | TensorFlux | SequenceFlux:
        """The transformer as the placement runs it."""
        if placement == "data":
            return self.model.flow
        if placement not in self._spread:
            self._spread[placement] = self._spread_out(self.model.flow, placement)
        return self._spread[placement]

    def planner(self, placement: str) -> Flux | TensorFlux | SequenceFlux:
        """What makes modulations (`FluxPipeline.planner`), as the placement runs it."""
        planner = self.model.planner()
        if self.model.is_loaded("flow"):
            return self.flow(placement)
        return planner if placement == "data" else self._spread_out(planner, placement)

    def _spread_out(self, flux: Flux, placement: str) -> TensorFlux | SequenceFlux:
        return (TensorFlux if placement == "tensor" else SequenceFlux)(flux, self.ring())

    def missing(self, component: str) -> list[str]:
        """The models of a component that are not in memory."""
        if component not in PARTS:
            raise UsageError(f"A model has no {component!r}; ask for {', '.join(COMPONENTS)}.")
        return [name for name in PARTS[component] if not self.model.is_loaded(name)]

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
        state = (id(model), getattr(model, "modulation_released", False))
        known, nbytes = self._sizes.get((name, prefixes), (None, 0))
        if known != state:
            arrays = tree_flatten(model.parameters())
            nbytes = sum(array.nbytes for key, array in arrays if key.startswith(prefixes))
            self._sizes[name, prefixes] = (state, nbytes)
        return nbytes
