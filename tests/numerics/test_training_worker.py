"""What an engine does of a training, without agent or socket: units in, reports out."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from fluxmesh.engine import device_memory
from fluxmesh.engine.residency import WorkerOptions
from fluxmesh.engine.stages import PipelineStages
from fluxmesh.errors import DoesNotFitError, FluxmeshError, UsageError, WeightsError
from fluxmesh.training.compute.learner import Learner
from fluxmesh.training.data.encode_units import Unit, Units
from fluxmesh.training.data.feature_cache import FeatureCache
from fluxmesh.training.data.kohya import MAX_REPEATS
from fluxmesh.training.plan import prepare
from fluxmesh.training.run import read_examples
from fluxmesh.training.worker import TrainingWorker
from fluxmesh.weights.hub import resolve
from fluxmesh.wire import messages
from fluxmesh.wire.messages import Report, training
from fluxmesh_coordinator.jobs.training.tasks import Names, TrainingJob
from fluxmesh_coordinator.runtime.mesh_executor import job_of
from tests.trainings import asked, learner, make_place

HEAD: dict[str, Any] = {"fence": 0, "job": "job", "ring_generation": 0}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return make_place(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def job(place) -> TrainingJob:
    """3 micro-batches an update, everything random on; its features are encoded."""
    request = asked(
        place,
        place / "out",
        grad_accumulate=3,
        iterations=12,
        lora_blocks=2,
        validation=1,
        ema=0.9,
        progress_prompt="a red dog",
        progress_steps=1,
    )
    made = learner(request)
    cache = FeatureCache(Path(request.cache_dir))

    def features(unit: Unit) -> dict[str, np.ndarray]:
        entry = cache.get(made.features.key(unit))
        return {name: array for name, (array, _) in entry.items()}

    training_job = job_of(made.plan, resolve(request.model), features, made.features.units.pixels)
    return dataclasses.replace(training_job, id="job")


class TrainingEngine:
    """A worker that is handed a run."""

    def __init__(self, job: TrainingJob, **options: Any) -> None:
        self.job, self.names = job, Names(job)
        self.worker = TrainingWorker(WorkerOptions(**options))

    def do(self, work: messages.Work) -> list[Report]:
        return list(self.worker.do(work))

    def open(self, update: int = 0, parts: list[training.VectorPart] | None = None) -> None:
        for part in parts or []:
            put = training.PutVector(
                **HEAD,
                vector=part.vector,
                offset=part.offset,
                total=part.total,
                numbers=part.numbers,
            )
            assert self.do(put) == []
        opening = self.names.opening()
        work = training.OpenTraining(
            **HEAD,
            weights=self.job.weights,
            request=opening.request,
            update=update,
            sizes=opening.sizes,
            captions=opening.captions,
            repeats=opening.repeats,
            priors=opening.priors,
        )
        (opened,) = (r for r in self.do(work) if not isinstance(r, messages.LoadProgress))
        assert opened.trained == self.job.size

    def bring(self, names: list[str]) -> None:
        for name in names:
            assert self.do(self.names.put(name, 0, 0)) == []

    def update(self, update: int) -> list[Report]:
        numbers = tuple(self.job.plan.request.micro_batches(update))
        self.bring(self.names.of_micro_batches(numbers))
        return self.do(
            training.Update(
                **HEAD, update=update, numbers=numbers, parts=len(numbers), together=False
            )
        )

    def state(self) -> dict[str, bytes]:
        parts: dict[str, list[np.ndarray]] = {}
        for part in self.do(training.GiveVectors(**HEAD)):
            parts.setdefault(part.vector, []).append(part.numbers)
        return {name: np.concatenate(pieces).tobytes() for name, pieces in parts.items()}


def test_a_run_travels_with_how_it_could_take_less(job):
    asked, *smaller = job.ways
    assert asked.needed > job.needed_bytes, "activations come on top"
    assert [(way.bits, way.resolution) for way in smaller] == [(8, 0), (4, 0)]
    assert asked.grad_checkpoint and not asked.lora_rank  # it asks for the lowest one


def test_metals_cache_is_not_bounded_while_a_training_is_open(job, monkeypatch):
    limits = []
    monkeypatch.setattr(device_memory, "device", lambda: "metal")
    monkeypatch.setattr(mx, "set_cache_limit", limits.append)
    host = TrainingEngine(job)
    host.open()
    assert limits == [device_memory.memory_of_device()]
    host.do(training.CloseTraining(**HEAD))
    assert len(limits) == 2 and limits[1] <= device_memory.CACHE_BYTES


def test_a_state_that_travels_in_pieces_is_the_state(job, monkeypatch):
    monkeypatch.setattr(training, "PIECE", 1000)
    first = TrainingEngine(job)
    first.open()
    *computed, moved = first.update(0)
    assert [report.number for report in computed] == [0, 1, 2]
    assert (moved.update, moved.bad, moved.images) == (1, 0, moved.images) and moved.loss > 0
    parts = first.do(training.GiveVectors(**HEAD))
    assert len(parts) == 4 * -(-job.size // 1000)
    assert [part.is_last for part in parts] == [False] * (len(parts) - 1) + [True]
    second = TrainingEngine(job)
    second.open(1, parts)
    assert second.state() == first.state()
    (expected, actual) = (host.update(1)[-1] for host in (first, second))
    assert (expected.loss, expected.norm) == (actual.loss, actual.norm)
    assert second.state() == first.state()


def test_an_engine_that_painted_in_low_memory_trains_the_same(job):
    plain, scarce = TrainingEngine(job), TrainingEngine(job)
    scarce.do(messages.Load(**HEAD, weights=job.weights, low_memory=True))
    for host in (plain, scarce):
        host.open()
    (expected, actual) = (host.update(0)[-1] for host in (plain, scarce))
    assert (expected.loss, expected.norm) == (actual.loss, actual.norm)


def test_a_state_that_is_not_whole_is_refused(job):
    host = TrainingEngine(job)
    piece = np.zeros(10, np.float32)
    with pytest.raises(UsageError, match="beyond its end"):
        host.do(training.PutVector(**HEAD, vector="weights", offset=95, total=100, numbers=piece))
    host.do(training.PutVector(**HEAD, vector="weights", offset=0, total=100, numbers=piece))
    with pytest.raises(UsageError, match=f"A state of {job.size} numbers"):
        host.open(1)


def test_where_memory_runs_out_the_options_of_a_training_are_named(job, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("[malloc] Unable to allocate 1 bytes.")

    host = TrainingEngine(job)
    host.open()
    monkeypatch.setattr(Learner, "add", fail)
    with pytest.raises(DoesNotFitError, match="while training with .* `resolution`"):
        host.update(0)
    monkeypatch.setattr(PipelineStages, "encode", fail)
    with pytest.raises(DoesNotFitError, match="Memory ran out while .* `image_size`"):
        host.do(messages.Encode(**HEAD, weights=job.weights, prompt="two dogs"))


def test_updates_come_in_their_order_and_with_their_features(job):
    host = TrainingEngine(job)
    with pytest.raises(UsageError, match="No training is open"):
        host.do(training.Update(**HEAD, update=0, numbers=(0,), parts=3, together=False))
    host.open()
    with pytest.raises(UsageError, match="after 0 updates"):
        host.update(1)
    host.bring(host.names.of_micro_batches([0]))
    host.do(training.DropFeatures(**HEAD, features=tuple(host.names.of_micro_batches([0])[:1])))
    with pytest.raises(FluxmeshError, match="were not sent"):
        host.do(training.Update(**HEAD, update=0, numbers=(0,), parts=3, together=False))


@pytest.mark.parametrize("done", [0, 1])
def test_an_update_that_is_stopped_moves_nothing(job, done):
    asked = [False]
    host = TrainingEngine(job, stopping=lambda: asked[0])
    host.open()
    before = host.state()
    host.bring(host.names.of_micro_batches([0, 1, 2]))
    reports = []
    asked[0] = done == 0
    for report in host.worker.do(
        training.Update(**HEAD, update=0, numbers=(0, 1, 2), parts=3, together=False)
    ):
        reports.append(report)
        asked[0] = len(reports) == done
    assert [type(report) for report in reports] == [training.Computed] * done
    asked[0] = False
    assert host.state() == before
    assert isinstance(host.update(0)[-1], training.UpdateDone)


def test_what_a_host_is_asked_on_the_way_disturbs_nothing(job):
    plain, looked_at = TrainingEngine(job), TrainingEngine(job)
    for host in (plain, looked_at):
        host.open()
        host.update(0)
    looked_at.bring(looked_at.names.held_out() + looked_at.names.prompt())
    (held_out,) = looked_at.do(training.Validate(**HEAD))
    assert held_out.loss > 0
    (painted,) = looked_at.do(training.PaintProgress(**HEAD))
    assert painted.pixels.shape == (32, 32, 3)
    plain.update(1), looked_at.update(1)
    assert plain.state() == looked_at.state()


def test_the_transformer_is_what_it_was_once_the_training_is_closed(job):
    host = TrainingEngine(job)
    host.open()
    names = {type(module).__name__ for _, module in host.worker.model.flow.named_modules()}
    assert "TrainedLinear" in names
    flow = host.worker.model.flow
    (closed,) = host.do(training.CloseTraining(**HEAD))
    assert isinstance(closed, training.Closed)
    assert host.worker.model.flow is flow, "it stays in memory"
    assert "TrainedLinear" not in {type(m).__name__ for _, m in flow.named_modules()}
    with pytest.raises(UsageError, match="No training is open"):
        host.do(training.GiveVectors(**HEAD))


def test_a_request_that_is_none_is_refused(job):
    opening = Names(job).opening()
    for text in ("[]", "{}", "nonsense", '{"dataset": "", "seed": -1}'):
        with pytest.raises(UsageError):
            list(
                TrainingWorker().do(
                    training.OpenTraining(
                        **HEAD,
                        weights=job.weights,
                        request=text,
                        update=0,
                        sizes=opening.sizes,
                        captions=opening.captions,
                        repeats=opening.repeats,
                    )
                )
            )


def test_a_host_shows_pictures_as_often_as_the_run_does(job):
    examples = [
        dataclasses.replace(example, repeats=1 + 2 * number)
        for number, example in enumerate(job.plan.examples)
    ]
    request = dataclasses.replace(job.plan.request, validation=0)
    plan = prepare(request, examples, resolve(request.model))
    engine = TrainingEngine(dataclasses.replace(job, plan=plan))
    engine.open()
    assert engine.worker.learner.plan.trained == plan.trained == (0, 1, 1, 1, 2, 2, 2, 2, 2)
    epoch = [plan.parts(number)[0] for number in range(plan.sampler.epoch_length)]
    shown = Counter(item for part in epoch for item in part.items)
    assert shown == {(image, crop): 1 + 2 * image for image in range(3) for crop in range(2)}
    assert len(plan.crops) == 6 and sum(plan.sizes_count().values()) == 3

    opening = engine.names.opening()
    for repeats in ([0, 1, 1], [1, 1], [1, 1, MAX_REPEATS + 1]):
        with pytest.raises(UsageError, match="don't add up"):
            engine.do(
                training.OpenTraining(
                    **HEAD,
                    weights=job.weights,
                    request=opening.request,
                    update=0,
                    sizes=opening.sizes,
                    captions=opening.captions,
                    repeats=np.array(repeats, np.int32),
                )
            )


def test_a_run_whose_files_were_changed_before_it_travels_does_not_begin(
    place: Path, tmp_path: Path
) -> None:
    """Else hosts have what is here now, and it is kept under the revision that was here before."""
    model = Path(shutil.copytree(place / "model", tmp_path / "model"))
    request = asked(place, tmp_path / "out", model=str(model))
    base, (examples, _) = resolve(request.model), read_examples(request)
    plan = prepare(request, examples, base)
    (file,) = (model / "vae").glob("*.safetensors")
    os.utime(file, ns=(1, 1))
    with pytest.raises(WeightsError, match="were changed while they were in use"):
        job_of(plan, base, lambda _: {}, Units(plan.examples, plan.sizes, request.seed).pixels)
