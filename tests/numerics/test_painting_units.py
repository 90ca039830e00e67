"""The unit that paints, without agent or socket: what it resumes, shares, stops and spares."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from fluxmesh.cluster.snapshot import ModelVariant
from fluxmesh.engine.replay import Replayed
from fluxmesh.engine.residency import WorkerOptions
from fluxmesh.engine.worker import Worker
from fluxmesh.errors import UsageError
from fluxmesh.models.collectives import Ranks
from fluxmesh.models.waiting import InGraph
from fluxmesh.sampling.latents import initial_noise
from fluxmesh.wire import messages
from fluxmesh.wire.messages import Decode, EncodeSource
from tests.checkpoints import TRANSFORMER, make_checkpoint
from tests.numerics.units import HEAD, latents, loaded, only, painting


@pytest.mark.parametrize("kind", ["plain", "source", "mask", "low memory"])
def test_an_image_goes_on_from_any_step_to_the_same_bytes(
    worker: Worker, weights: ModelVariant, kind: str
) -> None:
    more: dict[str, Any] = {"steps": 4, "low_memory": kind == "low memory"}
    if kind in ("source", "mask"):
        pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
        (source,) = only(
            worker, EncodeSource(**HEAD, weights=weights, pixels=pixels), messages.SourceEncoded
        )
        more |= {"source": source.latents, "strength": 0.7}
    if kind == "mask":
        more["mask"] = np.tile(np.array([0, 255], np.uint8), (32, 24))
    work = painting(worker, weights, **more)
    whole = latents(worker, work)
    assert len(whole) == (3 if "source" in more else 4)  # strength leaves the first step out
    for first in range(1, len(whole)):
        other = Worker()  # as after a death: nothing is warm
        rest = latents(other, replace(work, first=first, latents=whole[first - 1]))
        assert len(rest) == len(whole) - first
        assert np.array_equal(rest[-1], whole[-1])
        assert other.counters.steps == len(rest)


@pytest.mark.parametrize("placement", ["sequence", "tensor"])
def test_a_gpu_of_a_ring_replays_its_steps_and_lets_the_weights_go(
    weights: ModelVariant, monkeypatch: pytest.MonkeyPatch, placement: str
) -> None:
    worker = Worker()
    worker.join(Ranks(mx.distributed.init(), waiting=InGraph()))  # a group of one
    work = painting(worker, weights, placement=placement)
    expected = latents(worker, work)
    monkeypatch.setattr("fluxmesh.engine.replay.device", lambda: "cuda")
    monkeypatch.setattr("fluxmesh.engine.replay.has_kernels", lambda *_: True)
    few = worker.counters.transformer_bytes / 10
    worker.release()
    before = mx.get_active_memory()
    for _ in range(2):
        worker.release()  # and loads again
        assert mx.get_active_memory() <= before + few
        actual = latents(worker, work)
        assert isinstance(worker.flow(placement), Replayed)
        assert np.allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_cached_image_goes_on_from_any_step_to_the_same_bytes(
    worker: Worker, weights: ModelVariant
) -> None:
    work = painting(worker, weights, steps=8, cache=0.7)
    steps = only(worker, work, messages.Stepped)
    reused = [step.reused for step in steps]
    assert reused[0] is reused[-1] is False and any(reused) and not all(reused[1:-1])
    assert (worker.counters.steps, worker.counters.reused) == (8, sum(reused))
    for first in range(1, 8):
        basis = max(step for step in range(first) if not reused[step])
        begun = steps[basis - 1].latents if basis else None
        more = {"first": first, "latents": steps[first - 1].latents}
        going = replace(work, **more, basis=basis, basis_latents=begun)
        rest = only(Worker(), going, messages.Stepped)
        assert [step.reused for step in rest] == reused[first:]
        assert np.array_equal(rest[-1].latents, steps[-1].latents)


def test_what_a_cache_goes_on_from_is_a_step_that_was_made(
    worker: Worker, weights: ModelVariant
) -> None:
    work = painting(worker, weights, first=1, cache=0.7, basis=1)
    with pytest.raises(UsageError, match="can't have step 2"):
        latents(worker, work)


def test_a_cache_of_0_is_none(worker: Worker, weights: ModelVariant) -> None:
    plain = latents(worker, painting(worker, weights))
    assert np.array_equal(latents(worker, painting(worker, weights, cache=0.0)), plain)
    assert worker.counters.reused == 0


def test_an_image_whose_steps_are_done_is_not_painted(
    worker: Worker, weights: ModelVariant
) -> None:
    with pytest.raises(UsageError, match="decode it"):
        latents(worker, painting(worker, weights, first=3))


def test_to_go_on_takes_the_latents_that_were_left(worker: Worker, weights: ModelVariant) -> None:
    begins = painting(worker, weights)
    with pytest.raises(UsageError, match="latents after 1 steps are missing"):
        list(worker.do(replace(begins, first=1, latents=None)))
    named = latents(Worker(), replace(begins, latents=begins.noise))
    assert np.array_equal(latents(worker, replace(begins, latents=None))[-1], named[-1])


def test_images_of_a_job_share_what_the_prompt_gives_and_jobs_do_not(
    worker: Worker, weights: ModelVariant, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = painting(worker, weights)
    made = []
    plan = worker.model.plan
    monkeypatch.setattr(worker.model, "plan", lambda *a, **k: made.append(k) or plan(*a, **k))
    first = latents(worker, work)
    assert np.array_equal(latents(worker, replace(work, image=1))[-1], first[-1])
    assert len(made) == 1
    latents(worker, replace(work, guidance=2.0))
    assert len(made) == 2
    assert np.array_equal(latents(worker, replace(work, job="next"))[-1], first[-1])
    assert len(made) == 3


def test_low_memory_paints_the_same_and_the_transformer_leaves_before_the_decode(
    worker: Worker, weights: ModelVariant
) -> None:
    expected = latents(Worker(), painting(worker, weights))[-1]
    work = painting(worker, weights, low_memory=True)
    for _ in range(2):  # the second image needs no modulation weights
        assert np.array_equal(latents(worker, work)[-1], expected)
        assert worker.model.flow.modulation_released
    assert np.array_equal(latents(worker, replace(work, job="next"))[-1], expected)
    list(
        worker.do(
            Decode(
                fence=0,
                job="next",
                ring_generation=0,
                weights=weights,
                images=(0,),
                height=32,
                width=48,
                latents=expected,
            )
        )
    )
    assert "flow" not in loaded(worker)


@pytest.mark.parametrize("bits", [None, 4])
def test_low_memory_never_holds_modulation_weights_and_others_at_once(
    tmp_path: Path, bits: int | None
) -> None:
    wide = replace(TRANSFORMER, hidden_size=512, num_heads=4, axes_dim=(16, 56, 56))
    made = make_checkpoint(tmp_path, transformer=wide)
    weights = ModelVariant(str(made.path), "float32", bits)
    peaks, sizes = {}, {}
    for low in (False, True):
        worker, progress = Worker(), []
        for report in worker.do(painting(worker, weights, low_memory=low)):
            if isinstance(report, messages.LoadProgress):
                progress.append((report.component, report.done_bytes, report.total_bytes))
        flow = worker.model.flow
        assert flow.modulation_released == low and not worker.model.is_loaded("modulation")
        assert progress[0][1] == 0 and progress[-1][1] == progress[-1][2]
        assert {(name, total) for name, _, total in progress} == {("transformer", progress[0][2])}
        peaks[low] = worker.meter.now("denoise")
        sizes[low] = sum(array.nbytes for _, array in tree_flatten(flow.parameters()))
        del worker, flow  # or they would be in the next one's peak
    spared = sizes[False] - sizes[True]
    assert spared > 0.2 * sizes[False]
    # While it is quantized, a matrix of these small models takes as much as some that were spared.
    assert peaks[False] - peaks[True] > (0.5 if bits else 0.9) * spared


def test_low_memory_that_is_stopped_leaves_nothing(weights: ModelVariant) -> None:
    stop = False

    def stopping() -> bool:
        pipeline = worker.pipeline
        return stop and pipeline is not None and pipeline.is_loaded("modulation")

    worker = Worker(WorkerOptions(stopping=stopping))
    work = painting(worker, weights, low_memory=True)
    stop = True
    assert not only(worker, work, messages.Stepped)
    assert not worker.model.is_loaded("modulation") and "flow" not in loaded(worker)
    stop = False
    assert len(latents(worker, work)) == 3


def test_an_image_stops_before_the_next_step(weights: ModelVariant) -> None:
    done = 0
    worker = Worker(WorkerOptions(stopping=lambda: done >= 2))
    for report in worker.do(painting(worker, weights, steps=10)):
        done += isinstance(report, messages.Stepped)
    assert done == 2
    assert worker.counters.steps == 2
    assert worker.counters.images == 0


def test_previews_are_decoded_when_they_are_asked_for(
    worker: Worker, weights: ModelVariant
) -> None:
    steps = only(worker, painting(worker, weights, preview=True), messages.Stepped)
    assert all(step.preview is not None and step.preview.shape == (32, 48, 3) for step in steps)
    assert steps[-1].latents is not None
    (last,) = only(
        worker,
        Decode(
            **HEAD, weights=weights, images=(0,), height=32, width=48, latents=steps[-1].latents
        ),
        messages.Pictured,
    )
    assert steps[-1].preview is not None
    assert np.abs(steps[-1].preview.astype(int) - last.pixels).max() <= 1


def test_a_first_step_ticks_and_the_next_ones_do_not(weights: ModelVariant) -> None:
    quiet: list[str] = []
    worker = Worker(WorkerOptions(pause=lambda phase: quiet.append(worker.quiet)))
    work = painting(worker, weights)
    assert set(quiet) >= {"loading"}
    quiet.clear()
    latents(worker, work)
    assert quiet[-3:] == ["first step", "", ""]
    latents(worker, replace(work, image=1))
    assert quiet[-3:] == ["step", "", ""]
    wider = initial_noise(7, 32, 64, 16, 8)
    latents(worker, replace(work, width=64, noise=wider, latents=wider))
    assert quiet[-3:] == ["first step", "", ""]


@pytest.mark.parametrize("placement", ["tensor", "sequence"])
def test_without_a_ring_no_image_is_painted_together(
    worker: Worker, weights: ModelVariant, placement: str
) -> None:
    with pytest.raises(UsageError, match="in no ring"):
        list(worker.do(painting(worker, weights, placement=placement)))
