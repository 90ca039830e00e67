"""A worker's units, without agent or socket: what they leave in memory, load, stop and count."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from fluxmesh.cluster.snapshot import ModelVariant
from fluxmesh.engine import device_memory
from fluxmesh.engine.features import to_wire
from fluxmesh.engine.pipeline import FluxPipeline
from fluxmesh.engine.residency import WorkerOptions
from fluxmesh.engine.stages import PipelineStages
from fluxmesh.engine.worker import Worker
from fluxmesh.errors import DoesNotFitError, ModelNotFoundError, UsageError
from fluxmesh.models.numpy_bits import from_numpy
from fluxmesh.sampling.latents import initial_noise
from fluxmesh.wire import messages
from fluxmesh.wire.messages import Decode, Encode, EncodeSource, Load
from fluxmesh.wire.protocol import decode, encode
from fluxmesh_agent.engine import failed_of
from fluxmesh_coordinator.jobs.failures import error_of
from tests.checkpoints import make_checkpoint
from tests.numerics.units import HEAD, latents, loaded, only, painting


def decoding(weights: ModelVariant, latents: np.ndarray) -> Decode:
    size = {"height": 32, "width": 48}
    return Decode(**HEAD, weights=weights, images=(0,), **size, latents=latents)


def test_encoders_that_may_not_stay_make_room_and_leave(
    worker: Worker, weights: ModelVariant
) -> None:
    list(worker.do(Load(**HEAD, weights=weights, components=("transformer", "autoencoder"))))
    assert loaded(worker) == ["flow", "ae"]
    list(worker.do(Encode(**HEAD, weights=weights, prompt="one", stay=False, makes_room=True)))
    assert loaded(worker) == ["ae"]
    list(worker.do(Load(**HEAD, weights=weights)))
    (again,) = only(
        worker, Encode(**HEAD, weights=weights, prompt="one", stay=False), messages.TextEncoded
    )
    assert again.cached
    assert loaded(worker) == ["flow", "ae"]  # nothing had to run
    list(worker.do(Encode(**HEAD, weights=weights, prompt="two")))
    assert loaded(worker) == ["t5", "clip", "flow", "ae"]
    # Who is thought to remember a prompt is told so: what is there stays, unless it has to run.
    list(worker.do(Encode(**HEAD, weights=weights, prompt="two", makes_room=True)))
    assert loaded(worker) == ["t5", "clip", "flow", "ae"]
    list(worker.do(Encode(**HEAD, weights=weights, prompt="three", makes_room=True)))
    assert loaded(worker) == ["ae"]


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
    progress = [r for r in reports if isinstance(r, messages.LoadProgress)]
    assert [r.done_bytes for r in progress] == [0, progress[-1].total_bytes]
    assert len(heard) > 10
    worker.drop_transformer()
    stop = True
    reports = list(worker.do(Load(**HEAD, weights=weights)))
    assert not any(isinstance(report, messages.Loaded) for report in reports)
    assert loaded(worker) == []
    stop = False
    assert only(worker, Load(**HEAD, weights=weights), messages.Loaded)


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
        doing.append(worker.quiet)
        return sent

    worker = Worker(WorkerOptions(locate=locate))
    paint = painting(worker, weights)
    pixels = np.zeros((32, 48, 3), np.uint8)
    units: list[messages.Work] = [
        Encode(**HEAD, weights=weights, prompt="a dog"),
        EncodeSource(**HEAD, weights=weights, pixels=pixels),
        Load(**HEAD, weights=weights),
        paint,
        Decode(**HEAD, weights=weights, images=(0,), height=32, width=48, latents=paint.latents),
    ]
    for unit in units:
        worker.release()
        doing.clear()
        list(worker.do(unit))
        assert doing == ["loading"] and worker.quiet == "", unit


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
    ("error", "sentence", "kind"),
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
    sentence: str,
    kind: type[Exception],
) -> None:
    def fail(*_: Any) -> mx.array:
        raise RuntimeError(error)

    monkeypatch.setattr(PipelineStages, "decode", fail)
    with pytest.raises(kind, match=sentence):
        list(worker.do(decoding(weights, initial_noise(7, 32, 48, 16, 8))))


def test_sizes_in_memory_are_estimated_from_the_configs(tmp_path: Path) -> None:
    made = FluxPipeline(str(make_checkpoint(tmp_path).path), dtype="float32")
    made.ensure_models_are_loaded()
    models = (made.t5, made.clip, made.flow, made.ae)
    held = sum(array.nbytes for m in models for _, array in tree_flatten(m.parameters()))
    assert device_memory.resident_bytes(made.checkpoint, "float32", None) == held
    assert device_memory.resident_bytes(made.checkpoint, "bfloat16", None) == held / 2
    assert device_memory.resident_bytes(made.checkpoint, "bfloat16", 4) < held / 2
    assert device_memory.memory_of_device() > 100e6


def test_what_an_engine_can_t_do_travels_with_the_setting_at_fault(weights: ModelVariant) -> None:
    work = Load(**HEAD, weights=weights)
    told = failed_of(work, UsageError.about("lora_targets", "match nothing"))
    _, came = decode(encode(told, 1))
    assert isinstance(came, messages.Failed)
    made = error_of(came.kind, came.text, came.setting)
    assert (type(made), str(made)) == (UsageError, "`lora_targets` match nothing.")
    assert made.setting == "lora_targets"
