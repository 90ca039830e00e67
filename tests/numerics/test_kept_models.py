"""Several models in one engine: what stays beside the one at hand, and which leaves first."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from fluxmesh.cluster.snapshot import ModelVariant
from fluxmesh.engine import device_memory, lazy_models, residency
from fluxmesh.engine.residency import WorkerOptions
from fluxmesh.engine.worker import Worker
from fluxmesh.errors import WeightsError
from fluxmesh.wire import messages
from fluxmesh.wire.messages import Encode, Load
from tests.checkpoints import make_checkpoint
from tests.numerics.units import HEAD, latents, only, painting

MB = 1 << 20
ALL: dict[str, Any] = {"components": ("text encoders", "transformer", "autoencoder")}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[ModelVariant]:
    """Three checkpoints of one size."""
    folder = tmp_path_factory.mktemp("models")
    paths = [make_checkpoint(folder / name, seed=k).path for k, name in enumerate("abc")]
    return [ModelVariant(str(path), "float32") for path in paths]


def load(weights: ModelVariant, memory_bytes: int) -> Load:
    return Load(**HEAD, weights=weights, memory_bytes=memory_bytes, **ALL)


def read(worker: Worker, work: Load) -> int:
    """Components whose bytes were read for it."""
    return len({r.component for r in only(worker, work, messages.LoadProgress)})


def in_memory(worker: Worker) -> list[str]:
    names = [each.holds.weights.model for each in worker.kept_models]
    names += [] if worker.weights is None else [worker.weights.model]
    return [Path(name).parent.name + Path(name).name for name in names]


def names_of(*models: ModelVariant) -> list[str]:
    return [Path(m.model).parent.name + Path(m.model).name for m in models]


def test_two_models_that_alternate_are_read_once_each_and_paint_the_same_bytes(
    models: list[ModelVariant],
) -> None:
    a, b, _ = models
    works = [painting(Worker(), weights, memory_bytes=MB) for weights in (a, b)]
    alone = [latents(Worker(), work)[-1] for work in works]
    worker = Worker(WorkerOptions(memory_bytes=1 << 40))
    assert [read(worker, load(weights, MB)) for weights in (a, b)] == [3, 3]
    held = worker.holding
    assert held is not None
    assert [each.holds.nbytes for each in worker.kept_models] == [held.nbytes]
    for _ in range(2):
        for weights, work, expected in zip((a, b), works, alone, strict=True):
            assert read(worker, load(weights, MB)) == 0
            assert np.array_equal(latents(worker, work)[-1], expected)
    assert in_memory(worker) == names_of(a, b)


def test_the_least_recently_used_leaves_first_and_no_more_than_must(
    models: list[ModelVariant],
) -> None:
    a, b, c = models
    probe = Worker()
    list(probe.do(load(a, 0)))
    assert probe.holding is not None
    size = probe.holding.nbytes
    del probe
    worker = Worker(WorkerOptions(memory_bytes=3 * size))
    for weights in (a, b):
        list(worker.do(load(weights, size)))
    list(worker.do(load(a, size)))  # the last that was used is a
    assert in_memory(worker) == names_of(b, a)
    list(worker.do(load(c, size)))
    assert in_memory(worker) == names_of(b, a, c)  # just enough
    before = mx.get_active_memory()
    list(worker.do(load(c, size + 1)))  # a larger picture
    assert in_memory(worker) == names_of(a, c)
    assert before - mx.get_active_memory() >= size
    list(worker.do(load(c, 3 * size)))
    assert in_memory(worker) == names_of(c)
    assert read(worker, load(b, size)) == 3  # it had left


def test_the_oldest_of_as_many_as_are_kept_can_be_turned_to(
    models: list[ModelVariant], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency, "KEPT", 1)
    a, b, _ = models
    worker = Worker(WorkerOptions(memory_bytes=1 << 40))
    for weights in (a, b):
        list(worker.do(load(weights, MB)))
    assert read(worker, load(a, MB)) == 0
    assert in_memory(worker) == names_of(b, a)


def test_the_memory_that_is_free_on_the_device_bounds_it_too(
    models: list[ModelVariant], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, _ = models
    worker = Worker()
    list(worker.do(load(a, MB)))
    monkeypatch.setattr(device_memory.memory, "free_bytes", lambda: 0)
    monkeypatch.setattr(device_memory, "device", lambda: "cpu")
    list(worker.do(load(b, 1)))
    assert in_memory(worker) == names_of(a, b)
    # All that this process holds, and the machine has nothing more.
    list(worker.do(load(b, mx.get_active_memory() + mx.get_cache_memory())))
    assert in_memory(worker) == names_of(b)


def test_what_is_free_is_looked_at_again_by_the_next_job_alone(
    models: list[ModelVariant], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, _ = models
    free, looks = [1 << 40], []
    monkeypatch.setattr(
        device_memory.memory, "free_bytes", lambda: looks.append(free[0]) or free[0]
    )
    monkeypatch.setattr(device_memory, "memory_of_device", lambda: 1 << 40)
    monkeypatch.setattr(device_memory, "device", lambda: "cpu")
    worker = Worker()
    nbytes = 1 << 30  # of the job: more than this process holds
    for weights in (a, b):
        list(worker.do(load(weights, nbytes)))
    assert in_memory(worker) == names_of(a, b)
    count = len(looks)
    list(worker.do(load(b, nbytes)))  # of the same job
    assert len(looks) == count
    free[0] = 0  # another program has taken it
    list(worker.do(replace(load(b, nbytes), job="another")))
    assert len(looks) == count + 1
    assert in_memory(worker) == names_of(b)


def test_a_model_whose_files_are_others_by_now_is_read_again(tmp_path: Path) -> None:
    paths = [make_checkpoint(tmp_path / name, seed=k).path for k, name in enumerate("abc")]
    a, b, c = (ModelVariant(str(path), "float32") for path in paths)
    expected = latents(Worker(), painting(Worker(), c, memory_bytes=MB))[-1]
    worker = Worker(WorkerOptions(memory_bytes=1 << 40))
    for weights in (a, b):
        list(worker.do(load(weights, MB)))
    shutil.rmtree(a.model)
    shutil.copytree(c.model, a.model)  # under the same name
    assert read(worker, load(a, MB)) == 3
    assert in_memory(worker) == names_of(b, a)
    assert np.array_equal(latents(worker, painting(worker, a, memory_bytes=MB))[-1], expected)


def test_a_model_at_hand_whose_files_change_is_read_again_by_the_next_job_alone(
    tmp_path: Path,
) -> None:
    """In the midst of a job what is in memory goes on, and nothing new is mixed with it."""
    a, c = (
        ModelVariant(str(make_checkpoint(tmp_path / name, seed=k).path), "float32")
        for k, name in enumerate("ac")
    )
    works = [painting(Worker(), weights, memory_bytes=MB) for weights in (a, c)]
    before, after = (latents(Worker(), work)[-1] for work in works)
    worker = Worker(WorkerOptions(memory_bytes=1 << 40))
    list(worker.do(load(a, MB)))
    content = worker.content
    shutil.rmtree(a.model)
    shutil.copytree(c.model, a.model)  # under the same name
    assert np.array_equal(latents(worker, works[0])[-1], before)
    assert worker.pipeline is not None
    worker.pipeline.reload_text_encoders()
    with pytest.raises(WeightsError, match="were changed while they were in use"):
        list(worker.do(Encode(**HEAD, weights=a, prompt="three cats")))
    worker.drop_transformer()
    with pytest.raises(WeightsError, match="were changed while they were in use"):
        list(worker.do(works[0]))
    following = replace(works[1], job="the next one", weights=a)
    assert np.array_equal(latents(worker, following)[-1], after)
    assert worker.content != content


def test_files_that_change_while_they_are_read_make_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_checkpoint(tmp_path / "a").path
    weights = ModelVariant(str(path), "float32")
    worker = Worker(WorkerOptions(memory_bytes=1 << 40))
    load_transformer = lazy_models.loading.load_transformer

    def changing(*how: Any) -> Any:
        flow = load_transformer(*how)
        (file,) = (path / "transformer").glob("*.safetensors")
        os.utime(file, ns=(1, 1))
        return flow

    monkeypatch.setattr(lazy_models.loading, "load_transformer", changing)
    with pytest.raises(WeightsError, match="were changed while they were in use"):
        list(worker.do(load(weights, MB)))
    monkeypatch.undo()
    assert worker.holding is None
    assert read(worker, replace(load(weights, MB), job="the next one")) == 3


def test_work_that_says_nothing_of_its_memory_has_it_all(models: list[ModelVariant]) -> None:
    a, b, _ = models
    worker = Worker(WorkerOptions(memory_bytes=1 << 40))
    list(worker.do(load(a, MB)))
    list(worker.do(load(b, 0)))
    assert in_memory(worker) == names_of(b)
    list(worker.do(load(a, MB)))
    assert in_memory(worker) == names_of(b, a)
    worker.release()
    assert in_memory(worker) == [] and worker.holding is None


def test_the_oldest_of_as_many_as_are_kept_is_found_again(
    models: list[ModelVariant], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, c = models
    monkeypatch.setattr(residency, "KEPT", 2)
    worker = Worker(WorkerOptions(memory_bytes=1 << 40))
    for weights in (a, b, c):
        list(worker.do(load(weights, MB)))
    assert in_memory(worker) == names_of(a, b, c)
    assert read(worker, load(a, MB)) == 0
    assert in_memory(worker) == names_of(b, c, a)


def test_a_model_of_which_a_part_has_left_is_not_kept(models: list[ModelVariant]) -> None:
    a, b, _ = models
    worker = Worker(WorkerOptions(memory_bytes=1 << 40))
    list(worker.do(painting(worker, a, low_memory=True)))
    list(worker.do(load(b, MB)))
    assert in_memory(worker) == names_of(b)
    list(worker.do(Load(**HEAD, weights=b, memory_bytes=MB, shards=2, shard=1)))
    list(worker.do(load(a, MB)))
    assert [each.holds.shards for each in worker.kept_models] == [2]  # as it was
    list(worker.do(Load(**HEAD, weights=b, memory_bytes=MB)))
    assert worker.holding is not None and worker.holding.shards == 1
