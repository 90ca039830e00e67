"""The units that measure and warm: a trial picture, and what a measurement times and tells."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from fluxmesh.cluster.snapshot import ModelVariant, StepShape
from fluxmesh.engine.residency import WorkerOptions
from fluxmesh.engine.state import STOPS
from fluxmesh.engine.worker import Worker
from fluxmesh.wire import messages
from fluxmesh.wire.messages import Load, Measure, Warm
from tests.numerics.units import HEAD, latents, only, painting


def shape(weights: ModelVariant, height: int, width: int) -> StepShape:
    return StepShape.of(weights, "data", 1, height, width)


def test_a_step_and_a_decode_are_measured_whatever_is_held(
    worker: Worker, weights: ModelVariant
) -> None:
    latents(worker, painting(worker, weights, low_memory=True))
    list(worker.do(Load(**HEAD, weights=weights, shards=2, shard=1)))
    (timed,) = only(worker, Measure(**HEAD, weights=weights, height=32, width=48), messages.Timed)
    measured = timed.measured
    assert (measured.model, measured.height, measured.width) == (weights.model, 32, 48)
    assert (measured.dtype, measured.bits) == ("float32", None)


def test_a_trial_picture_loads_and_compiles_and_counts_as_nothing(
    worker: Worker, weights: ModelVariant
) -> None:
    reports = list(worker.do(Warm(**HEAD, weights=weights, height=32, width=48)))
    assert {r.component for r in reports if isinstance(r, messages.LoadProgress)} == {
        "transformer",
        "autoencoder",
    }
    assert isinstance(reports[-1], messages.Warmed) and reports[-1].seconds > 0
    assert not any(isinstance(r, messages.Stepped | messages.Pictured) for r in reports)
    assert worker.components == ("transformer", "autoencoder")
    assert worker.compiled == (shape(weights, 32, 48),)
    counters = worker.counters
    assert (counters.images, counters.steps, counters.decodes) == (0, 0, 0)
    assert counters.busy_seconds > 0


def test_a_picture_after_a_trial_is_the_same(worker: Worker, weights: ModelVariant) -> None:
    paint = painting(worker, weights)
    alone = only(worker, paint, messages.Stepped)[-1].latents
    other = Worker()
    only(other, Warm(**HEAD, weights=weights, height=32, width=48), messages.Warmed)
    for report in other.do(painting(other, weights)):
        if isinstance(report, messages.Stepped):
            latents = report.latents
    assert np.array_equal(alone, latents)
    assert other.compiled == (shape(weights, 32, 48),)


def test_a_trial_that_is_told_to_stop_ends_without_a_word(weights: ModelVariant) -> None:
    stops: list[bool] = []
    stopped = Worker(WorkerOptions(stopping=lambda: bool(stops)))
    for component in ("transformer", "autoencoder"):
        only(stopped, Load(**HEAD, weights=weights, components=(component,)), messages.Loaded)
    stops.append(True)
    assert list(stopped.do(Warm(**HEAD, weights=weights, height=32, width=48))) == []
    assert stopped.compiled == () and stopped.counters.steps == 0


def test_a_measurement_that_is_told_to_stop_at_its_trial_tells_the_other_ranks(
    weights: ModelVariant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who left by itself would leave them in the collectives of the steps that are timed."""
    stops: list[bool] = []
    agreed: list[int] = []

    def agree(work: messages.Work, own: int) -> int:
        agreed.append(own)
        return own

    def pause(phase: str) -> None:
        if phase == "step" and halts == "decode":
            stops.append(True)
        if phase == "load" and halts == "load" and worker.components:
            stops.append(True)

    for halts in ("decode", "load"):
        stops.clear()
        worker = Worker(WorkerOptions(stopping=lambda: bool(stops), pause=pause))
        monkeypatch.setattr(worker, "agree", agree)
        assert (
            only(worker, Measure(**HEAD, weights=weights, height=32, width=48), messages.Timed)
            == []
        )
        assert agreed[-1] == STOPS and stops, halts


def test_what_was_compiled_stays_when_other_weights_come_and_the_latest_is_last(
    worker: Worker, weights: ModelVariant, monkeypatch: pytest.MonkeyPatch
) -> None:
    for side in (32, 48, 32):
        only(worker, Warm(**HEAD, weights=weights, height=side, width=32), messages.Warmed)
    assert worker.compiled == (shape(weights, 48, 32), shape(weights, 32, 32))
    other = replace(weights, dtype="bfloat16")
    monkeypatch.setattr("fluxmesh.engine.residency.COMPILED", 2)
    only(worker, Warm(**HEAD, weights=other, height=16, width=16), messages.Warmed)
    assert worker.compiled == (shape(weights, 32, 32), shape(other, 16, 16))


def test_a_first_step_is_timed_apart_for_a_new_engine_and_for_a_new_size(
    weights: ModelVariant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a false clock: the next step takes `extra` seconds to compile, and any step one."""
    clock, extra = [0.0], [0.0]

    def pause(phase: str) -> None:
        if phase == "step":
            clock[0] += 1.0 + extra[0]
            extra[0] = 0.0

    monkeypatch.setattr(
        "fluxmesh.engine.lookahead.time", SimpleNamespace(perf_counter=lambda: clock[0])
    )
    worker = Worker(WorkerOptions(pause=pause))

    def measured(compiling: float, side: int, of: ModelVariant = weights) -> tuple[float, ...]:
        extra[0] = compiling
        (timed,) = only(worker, Measure(**HEAD, weights=of, height=side, width=32), messages.Timed)
        timing = timed.measured
        return timing.step_seconds, timing.kernels_seconds, timing.first_seconds

    assert measured(19.0, 32) == (1.0, 19.0, None)
    assert measured(0.0, 32) == (1.0, None, None)
    assert measured(0.25, 48) == (1.0, None, 0.25)
    assert measured(7.0, 48, replace(weights, dtype="bfloat16")) == (1.0, 7.0, None)
    assert measured(0.0, 48) == (1.0, None, None)  # compiled before, whatever came between
    assert measured(0.125, 64) == (1.0, None, 0.125)
    counters = worker.counters
    assert (counters.images, counters.steps, counters.decodes) == (0, 0, 0)
