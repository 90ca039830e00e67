"""What an engine does of a training: a `flux.Worker` that knows those units of work too.

All ranks of a ring hold the same state and are given every `Update`, each with the micro-batches
that it computes. Their integer sums meet in one collective, evaluated on its own (a compiled or
lazy graph around it can dead-lock a ring: mlx#4475); then each makes the same move. A rank that is
told to stop says so in that sum: all ranks stop at the same update, or none.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from fluxmesh.engine import device_memory, features
from fluxmesh.engine.residency import Stopped, WorkerOptions
from fluxmesh.engine.state import Reports
from fluxmesh.engine.worker import Worker
from fluxmesh.errors import FluxmeshError, UsageError
from fluxmesh.models.partition import Shard
from fluxmesh.models.runtime import PromptFeatures
from fluxmesh.training.compute import exact_sum
from fluxmesh.training.compute.learner import Learner
from fluxmesh.training.data.dataset import Example
from fluxmesh.training.data.encode_units import caption_name, crop_name
from fluxmesh.training.data.kohya import MAX_REPEATS
from fluxmesh.training.plan import prepare
from fluxmesh.training.request import LESS_MEMORY, TrainRequest
from fluxmesh.training.run import NO_LOSS
from fluxmesh.wire.messages import Work
from fluxmesh.wire.messages.training import (
    STOPPED,
    Closed,
    CloseTraining,
    Computed,
    DropFeatures,
    GiveVectors,
    HeldOut,
    MakeRoom,
    Opened,
    OpenTraining,
    PaintProgress,
    ProgressPainted,
    PutFeatures,
    PutVector,
    Update,
    UpdateDone,
    Validate,
    VectorPart,
    in_pieces,
)


class Given:
    """PromptFeatures as they were sent. Captions are numbers."""

    def __init__(self) -> None:
        self._held: dict[str, Mapping[str, np.ndarray]] = {}

    def put(self, work: PutFeatures) -> None:
        self._held[work.name] = work.features

    def drop(self, names: tuple[str, ...]) -> None:
        for name in names:
            self._held.pop(name, None)

    def text(self, caption: str) -> PromptFeatures:
        return features.from_arrays(self._find(caption_name(caption)))

    def latents(self, image: int, crop: int) -> mx.array:
        return features.latents(self._find(crop_name(image, crop)))

    def _find(self, name: str) -> Mapping[str, np.ndarray]:
        if name not in self._held:
            raise FluxmeshError(f"The features {name!r} were not sent to this host.")
        return self._held[name]


class TrainingWorker(Worker):
    """Paints and trains."""

    def __init__(self, options: WorkerOptions | None = None) -> None:
        super().__init__(options)
        self._learner: Learner | None = None
        self._given = Given()
        self._vectors: dict[str, np.ndarray] = {}  # of the state that comes

    def units(self) -> dict[type, Callable[[Any], Reports]]:
        return super().units() | {
            MakeRoom: self._make_room,
            PutVector: self._put_vector,
            OpenTraining: self._open_training,
            PutFeatures: self._put_features,
            DropFeatures: self._drop_features,
            Update: self._update,
            GiveVectors: self._give_vectors,
            Validate: self._validate,
            PaintProgress: self._paint_progress,
            CloseTraining: self._close_training,
        }

    def less_memory(self, work: Work) -> str:
        is_training = type(work) not in super().units()
        return LESS_MEMORY if is_training else super().less_memory(work)

    def end_job(self) -> None:
        super().end_job()
        self._given, self._vectors = Given(), {}
        if self._learner is not None:
            self._learner.close()
            self._learner = None
            self._spread.clear()
            device_memory.bound_cache()

    @property
    def learner(self) -> Learner:
        """Raises `UsageError` where no training is open."""
        if self._learner is None:
            raise UsageError("No training is open on this host.")
        return self._learner

    # What it is given

    def _make_room(self, work: MakeRoom) -> Reports:
        if not self.is_roomy(work.weights):
            self.drop_transformer()
        yield from ()

    def _put_vector(self, work: PutVector) -> Reports:
        vector = self._vectors.get(work.vector)
        if vector is None:
            vector = self._vectors[work.vector] = np.empty(work.total, np.float32)
        if work.offset + len(work.numbers) > len(vector):
            raise UsageError(f"A piece of {work.vector} lies beyond its end.")
        vector[work.offset : work.offset + len(work.numbers)] = work.numbers
        yield from ()

    def _put_features(self, work: PutFeatures) -> Reports:
        self._given.put(work)
        yield from ()

    def _drop_features(self, work: DropFeatures) -> Reports:
        self._given.drop(work.features)
        yield from ()

    # What it does

    def _open_training(self, work: OpenTraining) -> Reports:
        vectors, self._vectors = self._vectors, {}
        pipeline = self.open(work.weights)  # other weights end what was open
        if self._learner is not None:
            self._learner.close()
            self._learner = None
        pipeline.low_memory = False  # what a picture before this was painted with
        self.hold(Shard())
        self.drop_incomplete("data")
        pipeline.reload_text_encoders()
        del pipeline.ae
        self._spread.clear()
        with self.meter.phase("load"):
            yield from self.loading(work, "transformer")
            self.begin("opening the training")
            request = request_of(work.request)
            examples = _examples(work)
            plan = prepare(request, examples, pipeline.checkpoint)
            learner = Learner(pipeline, self._given, plan, self._go_on)
            if work.update:
                _check_state(vectors, learner.adapters.size)
                learner.restore(work.update, vectors)
            self._learner = learner
        device_memory.free_cache()
        yield Opened(
            job=work.job,
            ring_generation=work.ring_generation,
            trained=learner.adapters.size,
            content=self.content,
        )

    def _update(self, work: Update) -> Reports:
        learner = self.learner
        if learner.state.update != work.update:
            raise UsageError(
                f"Update {work.update} was asked for after {learner.state.update} updates."
            )
        self.doing = "training"
        self.begin("training")
        started = time.perf_counter()
        with self.meter.phase("training"):
            total, is_stopped = learner.nothing(), False
            for number in work.numbers:
                is_stopped = self.options.stopping()
                if is_stopped:
                    break
                start = time.perf_counter()
                self.options.pause("step")
                total = learner.add(total, number, work.parts)
                yield Computed(
                    job=work.job,
                    ring_generation=work.ring_generation,
                    number=number,
                    seconds=time.perf_counter() - start,
                )
            if is_stopped or self.options.stopping():
                total = total.at[-exact_sum.TAIL].add(mx.array(STOPPED, dtype=mx.int64))
            mx.eval(total)
            if work.together:
                total = self.ring().sum(total)
                mx.eval(total)
            self.options.pause("advance")
            moved = learner.advance(total)
            if moved.bad >= STOPPED:
                return
            self.count(steps=1)
            peak = self.meter.now("training")
        yield UpdateDone(
            job=work.job,
            ring_generation=work.ring_generation,
            update=work.update + 1,
            loss=moved.loss if math.isfinite(moved.loss) else 0.0,
            norm=moved.norm if math.isfinite(moved.norm) else 0.0,
            rate=moved.rate,
            images=moved.images,
            # Bad is also what the norm alone shows.
            bad=max(moved.bad, int(not (math.isfinite(moved.loss) and math.isfinite(moved.norm)))),
            seconds=time.perf_counter() - started,
            peak_bytes=peak,
        )

    def _give_vectors(self, work: GiveVectors) -> Reports:
        learner = self.learner
        self.begin("sending the state")
        vectors = learner.vectors()
        last = list(vectors)[-1]
        for name, vector in vectors.items():
            for offset, numbers in in_pieces(vector):
                self._go_on()
                is_last = name == last and offset + len(numbers) == len(vector)
                yield VectorPart(
                    job=work.job,
                    ring_generation=work.ring_generation,
                    update=learner.state.update,
                    vector=name,
                    offset=offset,
                    total=len(vector),
                    is_last=is_last,
                    numbers=numbers,
                )

    def _validate(self, work: Validate) -> Reports:
        self.doing = "measuring on what was held out"
        self.begin("validating")
        with self.meter.phase("training"):
            loss = self.learner.validate()
        yield HeldOut(
            job=work.job,
            ring_generation=work.ring_generation,
            loss=loss if math.isfinite(loss) else NO_LOSS,
        )

    def _paint_progress(self, work: PaintProgress) -> Reports:
        self.doing = "painting the progress prompt"
        self.begin("painting")
        with self.meter.phase("training"):
            pixels = self.learner.paint()
        yield ProgressPainted(job=work.job, ring_generation=work.ring_generation, pixels=pixels)

    def _close_training(self, work: CloseTraining) -> Reports:
        self.end_job()
        yield Closed(job=work.job, ring_generation=work.ring_generation)

    def _go_on(self) -> None:
        if self.options.stopping():
            raise Stopped


def _examples(work: OpenTraining) -> list[Example]:
    """The data set as far as a host needs to know it. Raises `UsageError`."""
    columns = (work.captions.tolist(), work.sizes.tolist(), work.repeats.tolist())
    repeats = columns[2]
    if len({*map(len, columns)}) > 1 or min(repeats) < 1 or max(repeats) > MAX_REPEATS:
        raise UsageError("This is no training that could be opened: its pictures don't add up.")
    shown = len(work.captions) - work.priors
    return [
        Example(
            where="",
            caption=str(caption),
            content="",
            size=(height, width),
            data=b"",
            prior=place >= shown,
            repeats=times,
        )
        for place, (caption, (height, width), times) in enumerate(zip(*columns, strict=True))
    ]


def _check_state(vectors: Mapping[str, np.ndarray], size: int) -> None:
    lengths = {name: len(vector) for name, vector in vectors.items()}
    if not {"weights", "first", "second"} <= lengths.keys() or set(lengths.values()) != {size}:
        raise UsageError(f"A state of {size} numbers was needed, and {lengths} came.")


def request_of(text: str) -> TrainRequest:
    """What `OpenTraining.request` says. Raises `UsageError`."""
    try:
        fields = json.loads(text)
        pairs: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()
        }
        return TrainRequest(**pairs)
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"This is no training that could be opened: {error}.") from error
