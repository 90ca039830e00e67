"""A worker's units, without agent or socket: what they leave in memory, resume, stop and count."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from fluxmesh.cluster.snapshot import ModelVariant, StepShape
from fluxmesh.engine import device_memory
from fluxmesh.engine.features import to_wire
from fluxmesh.engine.pipeline import FluxPipeline
from fluxmesh.engine.residency import WorkerOptions
from fluxmesh.engine.state import STOPS
from fluxmesh.engine.worker import Worker
from fluxmesh.errors import DoesNotFitError, ModelNotFoundError, UsageError
from fluxmesh.models.numpy_bits import from_numpy
from fluxmesh.sampling.latents import initial_noise
from fluxmesh.wire import messages
from fluxmesh.wire.messages import (
    Decode,
    Encode,
    EncodeSource,
    Load,
    Measure,
    Paint,
    Report,
    Warm,
)
from tests.checkpoints import TRANSFORMER, make_checkpoint

HEAD: dict[str, Any] = {"fence": 0, "job": "job", "ring_generation": 0}
R = TypeVar("R", bound=Report)


def shape(weights: ModelVariant, height: int, width: int) -> StepShape:
    return StepShape.of(weights, "data", 1, height, width)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> ModelVariant:
    made = make_checkpoint(tmp_path_factory.mktemp("model"), guidance=True)
    return ModelVariant(str(made.path), "float32")


@pytest.fixture
def worker() -> Worker:
    return Worker()


def only(worker: Worker, work: messages.Work, kind: type[R]) -> list[R]:
    return [report for report in worker.do(work) if isinstance(report, kind)]


def painting(worker: Worker, weights: ModelVariant, **more: Any) -> Paint:
    """A painting of 3 steps, 32 x 48 pixels."""
    (text,) = only(worker, Encode(**HEAD, weights=weights, prompt="two dogs"), messages.TextEncoded)
    noise = initial_noise(7, 32, 48, 16, 8)
    fields: dict[str, Any] = {
        "placement": "data",
        "image": 0,
        "height": 32,
        "width": 48,
        "steps": 3,
        "first": 0,
        "guidance": 4.0,
        "low_memory": False,
        "preview": False,
        "strength": 1.0,
        "latents": noise,
        "noise": noise,
        "features": text.features,
    }
    return Paint(**HEAD, weights=weights, **(fields | more))


def latents(worker: Worker, work: Paint) -> list[np.ndarray]:
    found = [step.latents for step in only(worker, work, messages.Stepped)]
    assert all(each is not None for each in found)
    return found  # type: ignore[return-value]


def loaded(worker: Worker) -> list[str]:
    assert worker.pipeline is not None
    return [name for name in ("t5", "clip", "flow", "ae") if worker.pipeline.is_loaded(name)]


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


def test_a_cached_image_goes_on_from_any_step_to_the_same_bytes(
    worker: Worker, weights: ModelVariant
) -> None:
    work = painting(worker, weights, steps=8, cache=0.7)
    told = only(worker, work, messages.Stepped)
    reused = [step.reused for step in told]
    assert reused[0] is reused[-1] is False and any(reused) and not all(reused[1:-1])
    assert (worker.counters.steps, worker.counters.reused) == (8, sum(reused))
    for first in range(1, 8):
        basis = max(step for step in range(first) if not reused[step])
        begun = told[basis - 1].latents if basis else None
        more = {"first": first, "latents": told[first - 1].latents}
        going = replace(work, **more, basis=basis, basis_latents=begun)
        rest = only(Worker(), going, messages.Stepped)
        assert [step.reused for step in rest] == reused[first:]
        assert np.array_equal(rest[-1].latents, told[-1].latents)


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
        worker, told = Worker(), []
        for report in worker.do(painting(worker, weights, low_memory=low)):
            if isinstance(report, messages.LoadProgress):
                told.append((report.component, report.done_bytes, report.total_bytes))
        flow = worker.model.flow
        assert flow.modulation_released == low and not worker.model.is_loaded("modulation")
        assert told[0][1] == 0 and told[-1][1] == told[-1][2]
        assert {(name, total) for name, _, total in told} == {("transformer", told[0][2])}
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


def test_encoders_that_may_not_stay_make_room_and_leave(
    worker: Worker, weights: ModelVariant
) -> None:
    list(worker.do(Load(**HEAD, weights=weights, components=("transformer", "autoencoder"))))
    assert loaded(worker) == ["flow", "ae"]
    list(worker.do(Encode(**HEAD, weights=weights, prompt="one", stay=False)))
    assert loaded(worker) == ["ae"]
    list(worker.do(Load(**HEAD, weights=weights)))
    (again,) = only(
        worker, Encode(**HEAD, weights=weights, prompt="one", stay=False), messages.TextEncoded
    )
    assert again.cached
    assert loaded(worker) == ["flow", "ae"]  # nothing had to run
    list(worker.do(Encode(**HEAD, weights=weights, prompt="two")))
    assert loaded(worker) == ["t5", "clip", "flow", "ae"]


def test_what_is_held_is_said_and_leaves_for_other_weights(
    worker: Worker, weights: ModelVariant
) -> None:
    assert worker.holding is None
    (whole,) = only(worker, Load(**HEAD, weights=weights), messages.Loaded)
    flow = worker.counters.transformer_bytes
    assert (whole.holding.weights, whole.holding.nbytes) == (weights, flow)
    list(worker.do(Load(**HEAD, weights=weights, components=("autoencoder",))))
    assert worker.holding is not None
    assert worker.holding.nbytes > flow
    half = replace(weights, dtype="bfloat16")
    before = mx.get_active_memory()
    (other,) = only(worker, Load(**HEAD, weights=half), messages.Loaded)
    assert other.holding.weights == half
    assert worker.counters.transformer_bytes * 2 == flow
    assert mx.get_active_memory() < before


def test_a_shard_is_loaded_alone_and_the_whole_comes_back_for_data(
    worker: Worker, weights: ModelVariant
) -> None:
    expected = latents(Worker(), painting(worker, weights))[-1]
    (whole,) = only(worker, Load(**HEAD, weights=weights), messages.Loaded)
    blocks = worker.counters.block_bytes
    for shard in (0, 1):
        (part,) = only(
            worker, Load(**HEAD, weights=weights, shards=2, shard=shard), messages.Loaded
        )
        assert (part.holding.shards, part.holding.shard) == (2, shard)
        assert blocks / 2 <= worker.counters.block_bytes <= (1 / 2 + 0.01) * blocks
    assert np.array_equal(latents(worker, painting(worker, weights))[-1], expected)
    assert worker.holding is not None
    assert worker.holding.shards == 1
    assert worker.counters.block_bytes == blocks
    assert whole.holding.shards == 1


def test_bytes_are_told_before_and_after_and_an_early_stop_leaves_nothing(
    weights: ModelVariant,
) -> None:
    heard: list[int] = []
    stop = False
    worker = Worker(
        WorkerOptions(hear=lambda event: heard.append(event.done_bytes), stopping=lambda: stop)
    )
    reports = list(worker.do(Load(**HEAD, weights=weights)))
    told = [r for r in reports if isinstance(r, messages.LoadProgress)]
    assert [r.done_bytes for r in told] == [0, told[-1].total_bytes]
    assert len(heard) > 10
    worker.drop_transformer()
    stop = True
    reports = list(worker.do(Load(**HEAD, weights=weights)))
    assert not any(isinstance(report, messages.Loaded) for report in reports)
    assert loaded(worker) == []
    stop = False
    assert only(worker, Load(**HEAD, weights=weights), messages.Loaded)


def test_an_image_stops_before_the_next_step(weights: ModelVariant) -> None:
    done = 0
    worker = Worker(WorkerOptions(stopping=lambda: done >= 2))
    for report in worker.do(painting(worker, weights, steps=10)):
        done += isinstance(report, messages.Stepped)
    assert done == 2
    assert worker.counters.steps == 2
    assert worker.counters.images == 0


def test_what_was_done_is_counted(worker: Worker, weights: ModelVariant) -> None:
    work = painting(worker, weights)
    x = latents(worker, work)[-1]
    pictures = only(
        worker,
        Decode(
            **HEAD,
            weights=weights,
            images=(4, 5),
            height=32,
            width=48,
            latents=np.concatenate([x, x]),
        ),
        messages.Pictured,
    )
    assert [picture.image for picture in pictures] == [4, 5]
    assert np.array_equal(pictures[0].pixels, pictures[1].pixels)
    counted = worker.counters
    assert (counted.encodes, counted.steps, counted.images, counted.decodes) == (1, 3, 1, 2)
    assert counted.peak_bytes >= pictures[0].peak_bytes > counted.transformer_bytes
    assert counted.load_peak_bytes >= counted.transformer_bytes


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
    latents(worker, replace(work, width=64, noise=wider))
    assert quiet[-3:] == ["first step", "", ""]


def test_a_step_and_a_decode_are_measured_whatever_is_held(
    worker: Worker, weights: ModelVariant
) -> None:
    latents(worker, painting(worker, weights, low_memory=True))
    list(worker.do(Load(**HEAD, weights=weights, shards=2, shard=1)))
    (timed,) = only(worker, Measure(**HEAD, weights=weights, height=32, width=48), messages.Timed)
    measured = timed.measured
    assert (measured.model, measured.height, measured.width) == (weights.model, 32, 48)
    assert (measured.dtype, measured.bits) == ("float32", None)


@pytest.mark.parametrize("placement", ["tensor", "sequence"])
def test_without_a_ring_no_image_is_painted_together(
    worker: Worker, weights: ModelVariant, placement: str
) -> None:
    with pytest.raises(UsageError, match="in no ring"):
        list(worker.do(painting(worker, weights, placement=placement)))


def test_mistakes_are_told_in_words(worker: Worker, weights: ModelVariant) -> None:
    with pytest.raises(UsageError, match="no 'heart'"):
        list(worker.do(Load(**HEAD, weights=weights, components=("heart",))))
    with pytest.raises(ModelNotFoundError):
        list(worker.do(Load(**HEAD, weights=ModelVariant("nonesuch"))))
    with pytest.raises(UsageError, match="even"):
        list(worker.do(painting(worker, weights, width=40)))
    assert latents(worker, painting(worker, weights))  # and it works on


def test_names_that_were_sent_are_not_those_that_are_opened(weights: ModelVariant) -> None:
    worker = Worker(WorkerOptions(locate=lambda sent: replace(sent, model=weights.model)))
    (report,) = only(worker, Load(**HEAD, weights=replace(weights, model="alias")), messages.Loaded)
    assert report.holding.weights.model == "alias"


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
def test_features_travel_without_a_rounding(dtype: mx.Dtype) -> None:
    x = mx.random.normal((1, 5, 7)).astype(dtype)
    y = from_numpy(to_wire(x))
    assert y.dtype == dtype
    assert mx.array_equal(x, y)


def test_every_unit_ticks_while_it_finds_its_weights(weights: ModelVariant) -> None:
    """Headers may come over a network, and the last user's model takes a while to leave."""
    doing: list[str] = []

    def locate(sent: ModelVariant) -> ModelVariant:
        doing.append(one.quiet)
        return sent

    one = Worker(WorkerOptions(locate=locate))
    paint = painting(one, weights)
    pixels = np.zeros((32, 48, 3), np.uint8)
    units: list[messages.Work] = [
        Encode(**HEAD, weights=weights, prompt="a dog"),
        EncodeSource(**HEAD, weights=weights, pixels=pixels),
        Load(**HEAD, weights=weights),
        paint,
        Decode(**HEAD, weights=weights, images=(0,), height=32, width=48, latents=paint.latents),
    ]
    for unit in units:
        one.release()
        doing.clear()
        list(one.do(unit))
        assert doing == ["loading"] and one.quiet == "", unit


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
        found = timed.measured
        return found.step_seconds, found.kernels_seconds, found.first_seconds

    assert measured(19.0, 32) == (1.0, 19.0, None)
    assert measured(0.0, 32) == (1.0, None, None)
    assert measured(0.25, 48) == (1.0, None, 0.25)
    assert measured(7.0, 48, replace(weights, dtype="bfloat16")) == (1.0, 7.0, None)
    assert measured(0.0, 48) == (1.0, None, None)  # compiled before, whatever came between
    assert measured(0.125, 64) == (1.0, None, 0.125)
    counters = worker.counters
    assert (counters.images, counters.steps, counters.decodes) == (0, 0, 0)


def decoding(weights: ModelVariant, latents: np.ndarray) -> Decode:
    size = {"height": 32, "width": 48}
    return Decode(**HEAD, weights=weights, images=(0,), **size, latents=latents)


@pytest.mark.parametrize("low_memory", [False, True])
def test_what_left_is_not_held_by_anything_else(weights: ModelVariant, low_memory: bool) -> None:
    """By the bytes that MLX holds: a forgotten reference would keep a model without its name."""
    work = painting(Worker(), weights, low_memory=low_memory)
    gc.collect()  # the workers of other tests, too
    worker = Worker()
    before = mx.get_active_memory()

    def held() -> int:
        mx.synchronize()
        return int(mx.get_active_memory()) - before

    reading = Encode(**HEAD, weights=weights, prompt="a cat", stay=False)
    (text,) = only(worker, reading, messages.TextEncoded)
    size = {name: worker.model.file_bytes(name) for name in ("t5", "flow")}
    assert held() < 0.1 * size["t5"]  # the prompt's features
    (*_, last) = latents(worker, replace(work, features=text.features))
    list(worker.do(decoding(weights, last)))
    worker.model.__dict__.pop("ae")
    if low_memory:
        assert held() < 0.1 * size["flow"]
    else:
        assert held() > 0.5 * size["flow"]  # it stays for the next image
    worker.release()
    assert held() < 0.1 * size["t5"]


@pytest.mark.parametrize(
    ("error", "told", "kind"),
    [
        (
            "[metal::malloc] Unable to allocate 99 bytes.",
            "decoding .*`low_memory`",
            DoesNotFitError,
        ),
        ("something else", "something else", RuntimeError),
    ],
)
def test_running_out_of_memory_says_what_to_do_and_nothing_else_is_called_that(
    worker: Worker,
    weights: ModelVariant,
    monkeypatch: pytest.MonkeyPatch,
    error: str,
    told: str,
    kind: type[Exception],
) -> None:
    def fail(*_: Any) -> mx.array:
        raise RuntimeError(error)

    monkeypatch.setattr(FluxPipeline, "decode", fail)
    with pytest.raises(kind, match=told):
        list(worker.do(decoding(weights, initial_noise(7, 32, 48, 16, 8))))


def test_to_go_on_takes_the_latents_that_were_left(worker: Worker, weights: ModelVariant) -> None:
    begins = painting(worker, weights)
    with pytest.raises(UsageError, match="latents after 1 steps are missing"):
        list(worker.do(replace(begins, first=1, latents=None)))
    named = latents(Worker(), replace(begins, latents=begins.noise))
    assert np.array_equal(latents(worker, replace(begins, latents=None))[-1], named[-1])


def test_sizes_in_memory_are_estimated_from_the_configs(tmp_path: Path) -> None:
    made = FluxPipeline(str(make_checkpoint(tmp_path).path), dtype="float32")
    made.ensure_models_are_loaded()
    models = (made.t5, made.clip, made.flow, made.ae)
    held = sum(array.nbytes for m in models for _, array in tree_flatten(m.parameters()))
    assert device_memory.resident_bytes(made.checkpoint, "float32", None) == held
    assert device_memory.resident_bytes(made.checkpoint, "bfloat16", None) == held / 2
    assert device_memory.resident_bytes(made.checkpoint, "bfloat16", 4) < held / 2
    assert device_memory.memory_of_device() > 100e6
