"""The runner: its events, what it keeps in memory, and that no setting changes the picture."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from fluxmesh.engine import device_memory
from fluxmesh.engine.pipeline import FluxPipeline
from fluxmesh.engine.reference import Runner
from fluxmesh.errors import AdapterError, DoesNotFitError, ModelNotFoundError, UsageError
from fluxmesh.events import Encoded, Event, Loading, Peak, Picture, Step
from fluxmesh.request import AdapterRef, GenerateRequest, SourceImage
from tests.checkpoints import make_checkpoint, write_safetensors


@pytest.fixture
def request_of(checkpoint: Path) -> GenerateRequest:
    return GenerateRequest(
        "two dogs", seed=5, model=str(checkpoint), height=32, width=48, steps=3, dtype="float32"
    )


def events_of(request: GenerateRequest, runner: Runner | None = None) -> list[Event]:
    return list((runner or Runner()).run(request))


def pictures(events: list[Event]) -> list[np.ndarray]:
    return [event.pixels for event in events if isinstance(event, Picture)]


def loaded(events: list[Event]) -> list[str]:
    """Components in the order in which they began to load."""
    return [e.component for e in events if isinstance(e, Loading) and e.done_bytes == 0]


def resident(runner: Runner) -> list[str]:
    assert runner.pipeline is not None
    return [name for name in ("t5", "clip", "flow", "ae") if runner.pipeline.is_loaded(name)]


def test_a_job_tells_what_it_does_in_order(request_of: GenerateRequest) -> None:
    events = events_of(dataclasses.replace(request_of, n_images=2))
    told = [event for event in events if not isinstance(event, Loading)]
    kinds = [type(event) for event in told]
    assert kinds == [Encoded, Peak, *[Step] * 3, Picture, *[Step] * 3, Picture, Peak, Peak]
    assert loaded(events) == ["text encoders", "transformer", "autoencoder"]
    steps = [(e.image, e.step, e.steps) for e in events if isinstance(e, Step)]
    assert steps == [(0, 1, 3), (0, 2, 3), (0, 3, 3), (1, 1, 3), (1, 2, 3), (1, 3, 3)]
    assert [(e.image, e.seed) for e in events if isinstance(e, Picture)] == [(0, 5), (1, 6)]
    peaks = {e.phase: e.bytes for e in events if isinstance(e, Peak)}
    assert list(peaks) == ["text", "denoise", "decode"]
    assert min(peaks.values()) > 100_000
    for picture in pictures(events):
        assert picture.shape == (32, 48, 3)
        assert picture.dtype == np.uint8


def test_a_cached_picture_is_another_one_and_its_steps_say_why(
    request_of: GenerateRequest,
) -> None:
    eight = dataclasses.replace(request_of, steps=8, n_images=2)
    plain, cached = (events_of(dataclasses.replace(eight, cache=c)) for c in (0.0, 0.7))
    reused = [[e.reused for e in told if isinstance(e, Step)] for told in (plain, cached)]
    counts = [[e.reused for e in told if isinstance(e, Picture)] for told in (plain, cached)]
    assert counts[0] == [0, 0] and min(counts[1]) > 0
    assert [sum(reused[1][k : k + 8]) for k in (0, 8)] == counts[1]
    assert not any(reused[0])
    for a, b in zip(pictures(plain), pictures(cached), strict=True):
        assert not np.array_equal(a, b)


def test_image_k_is_what_its_seed_gives_alone(request_of: GenerateRequest) -> None:
    three = pictures(events_of(dataclasses.replace(request_of, n_images=3)))
    alone = pictures(events_of(dataclasses.replace(request_of, seed=7)))
    assert np.array_equal(three[2], alone[0])
    assert not np.array_equal(three[1], alone[0])


def test_size_and_steps_come_from_the_checkpoint(request_of: GenerateRequest) -> None:
    runner = Runner()
    bare = dataclasses.replace(request_of, height=None, width=None, steps=None)
    events = events_of(bare, runner)
    assert runner.pipeline is not None
    defaults = runner.pipeline.checkpoint.defaults
    assert pictures(events)[0].shape == (defaults.height, defaults.width, 3)
    assert len([e for e in events if isinstance(e, Step)]) == defaults.steps


def test_text_encoders_leave_before_the_transformer_loads(request_of: GenerateRequest) -> None:
    runner = Runner()
    seen = {}
    for event in runner.run(request_of):
        if isinstance(event, Loading) and event.done_bytes == 0:
            seen[event.component] = resident(runner)
    assert seen["text encoders"] == []
    assert seen["transformer"] == []
    assert seen["autoencoder"] == ["flow"]
    assert resident(runner) == []


@pytest.mark.parametrize("low_memory", [False, True])
def test_what_left_is_not_held_by_anything_else(
    request_of: GenerateRequest, low_memory: bool
) -> None:
    """By the bytes that MLX holds: a forgotten reference would keep a model without its name."""
    runner = Runner()
    two = dataclasses.replace(request_of, n_images=2, low_memory=low_memory)
    before = mx.get_active_memory()
    held = {}
    for event in runner.run(two):
        mx.synchronize()
        if isinstance(event, Loading) and event.done_bytes == 0:
            held[event.component] = mx.get_active_memory() - before
    assert runner.pipeline is not None
    size = {name: runner.pipeline.file_bytes(name) for name in ("t5", "flow")}
    assert held["transformer"] < 0.1 * size["t5"]
    if low_memory:
        assert held["autoencoder"] < 0.1 * size["flow"]
    else:
        assert held["autoencoder"] > 0.5 * size["flow"]  # it stays for the next image
    assert mx.get_active_memory() - before < 0.1 * size["t5"]  # the prompt's features


def test_bytes_read_are_told_while_they_are_read(request_of: GenerateRequest) -> None:
    heard: list[Loading] = []
    events = events_of(request_of, Runner(on_loading=heard.append))
    totals = {e.component: e.total_bytes for e in events if isinstance(e, Loading)}
    for component, total in totals.items():
        ticks = [e for e in heard if e.component == component]
        done = [e.done_bytes for e in ticks]
        assert len(ticks) > 10
        assert {e.total_bytes for e in ticks} == {total}
        assert done == sorted(done)
        assert 0.9 * total < done[-1] <= total


def test_a_warm_runner_reads_nothing_twice(request_of: GenerateRequest) -> None:
    runner = Runner(keep_warm=True)
    first = events_of(request_of, runner)
    assert resident(runner) == ["t5", "clip", "flow", "ae"]
    again = events_of(request_of, runner)
    assert loaded(again) == []
    assert [e.cached for e in first + again if isinstance(e, Encoded)] == [False, True]
    assert np.array_equal(pictures(first)[0], pictures(again)[0])
    other = events_of(dataclasses.replace(request_of, prompt="a cat"), runner)
    assert loaded(other) == []
    assert not np.array_equal(pictures(other)[0], pictures(first)[0])


def test_a_warm_runner_short_of_memory_never_holds_both_large_models(
    request_of: GenerateRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_memory, "memory_of_device", lambda: 1_000_000)
    runner = Runner(keep_warm=True)
    events_of(request_of, runner)
    assert resident(runner) == ["flow", "ae"]
    assert loaded(events_of(request_of, runner)) == []  # a prompt that it remembers
    held = []
    for event in runner.run(dataclasses.replace(request_of, prompt="a cat")):
        held.append(resident(runner))
        if isinstance(event, Encoded):
            assert "flow" not in resident(runner)
    assert not any({"t5", "flow"} <= set(names) for names in held)


def test_preloading_loads_everything_first(request_of: GenerateRequest) -> None:
    events = events_of(dataclasses.replace(request_of, preload=True))
    first = next(i for i, event in enumerate(events) if not isinstance(event, Loading))
    assert loaded(events[:first]) == ["text encoders", "transformer", "autoencoder"]
    assert loaded(events[first:]) == []
    assert np.array_equal(pictures(events)[0], pictures(events_of(request_of))[0])


def test_low_memory_drops_weights_on_the_way_and_paints_the_same(
    request_of: GenerateRequest,
) -> None:
    two = dataclasses.replace(request_of, n_images=2)
    runner = Runner(keep_warm=True)
    events = []
    for event in runner.run(dataclasses.replace(two, low_memory=True)):
        events.append(event)
        assert runner.pipeline is not None
        if isinstance(event, Step):
            assert runner.pipeline.flow.modulation_released
        if isinstance(event, Picture):
            assert "flow" not in resident(runner)
    assert resident(runner) == []
    for ours, expected in zip(pictures(events), pictures(events_of(two)), strict=True):
        assert np.array_equal(ours, expected)
    # The next request finds its modulation weights again.
    assert np.array_equal(pictures(events_of(two, runner))[0], pictures(events)[0])


def test_preloading_in_low_memory_is_refused(request_of: GenerateRequest) -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        dataclasses.replace(request_of, preload=True, low_memory=True)


def test_a_job_that_is_closed_leaves_a_runner_that_works(request_of: GenerateRequest) -> None:
    runner = Runner()
    stream: Any = runner.run(request_of)
    for event in stream:
        if isinstance(event, Step):
            break
    stream.close()
    assert resident(runner) == []
    assert np.array_equal(
        pictures(events_of(request_of, runner))[0], pictures(events_of(request_of))[0]
    )


def test_a_larger_decoding_batch_may_differ_by_one(request_of: GenerateRequest) -> None:
    three = dataclasses.replace(request_of, n_images=3)
    batched = events_of(dataclasses.replace(three, decoding_batch_size=2))
    kinds = [type(e) for e in batched if isinstance(e, Step | Picture)]
    assert kinds == [*[Step] * 6, Picture, Picture, *[Step] * 3, Picture]
    for ours, expected in zip(pictures(batched), pictures(events_of(three)), strict=True):
        assert np.abs(ours.astype(int) - expected).max() <= 1


def test_previews_end_in_the_picture(request_of: GenerateRequest) -> None:
    events = events_of(dataclasses.replace(request_of, stepwise=True))
    previews = [e.preview for e in events if isinstance(e, Step)]
    picture = pictures(events)[0]
    last = previews[-1]
    assert last is not None
    # The last prediction is the result but for the rounding of one float32 sum.
    assert np.abs(last.astype(int) - picture).max() <= 1
    assert previews[0] is not None
    assert not np.array_equal(previews[0], previews[1])


def test_a_mask_keeps_the_picture_around_it(request_of: GenerateRequest) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (48, 32, 3), dtype=np.uint8)
    mask = np.zeros((48, 32), np.uint8)
    mask[10:20, 5:30] = 255
    source = SourceImage(pixels, 1.0, mask)
    sized = dataclasses.replace(request_of, height=None, width=None, source=source, stepwise=True)
    events = events_of(sized)
    steps = [e for e in events if isinstance(e, Step)]
    for picture in (pictures(events)[0], steps[0].preview):
        assert picture is not None
        assert np.array_equal(picture[mask == 0], pixels[mask == 0])
        assert not np.array_equal(picture[mask == 255], pixels[mask == 255])


def test_strength_says_how_many_steps_run(request_of: GenerateRequest) -> None:
    source = SourceImage(np.zeros((32, 48, 3), np.uint8), 0.5)
    events = events_of(dataclasses.replace(request_of, steps=4, source=source))
    assert [e.steps for e in events if isinstance(e, Step)] == [2, 2]


def test_a_source_of_another_size_is_refused(request_of: GenerateRequest) -> None:
    source = SourceImage(np.zeros((64, 48, 3), np.uint8), 0.5)
    with pytest.raises(UsageError, match="64x48 and the image 32x48"):
        events_of(dataclasses.replace(request_of, source=source))


def test_dtype_and_bits_reach_the_weights(request_of: GenerateRequest) -> None:
    exact = pictures(events_of(request_of))[0].astype(int)
    rounded = pictures(events_of(dataclasses.replace(request_of, dtype="bfloat16")))[0]
    packed = pictures(events_of(dataclasses.replace(request_of, bits=8)))[0]
    for near in (rounded, packed):
        assert 0 < np.abs(exact - near).mean() < 8


def adapter(folder: Path, seed: int, module: str = "double_blocks.0.img_attn.proj") -> str:
    rng = np.random.default_rng(seed)
    low = {"lora_down": (4, 64), "lora_up": (64, 4)}
    arrays = {
        f"diffusion_model.{module}.{leaf}.weight": rng.standard_normal(shape, dtype=np.float32)
        for leaf, shape in low.items()
    }
    path = folder / f"adapter-{seed}.safetensors"
    write_safetensors(path, arrays)
    return str(path)


def test_adapters_change_the_picture_and_leave_with_the_request(
    request_of: GenerateRequest, tmp_path: Path
) -> None:
    refs = (AdapterRef(adapter(tmp_path, 1), 0.5), AdapterRef(adapter(tmp_path, 2), 0.25))
    runner = Runner(keep_warm=True)
    plain = pictures(events_of(request_of, runner))[0]
    adapted = pictures(events_of(dataclasses.replace(request_of, adapters=refs), runner))[0]
    fused_request = dataclasses.replace(request_of, adapters=refs, fuse_adapters=True)
    fused = pictures(events_of(fused_request, runner))[0]
    assert np.abs(adapted.astype(int) - plain).max() > 5
    assert np.abs(adapted.astype(int) - fused).max() <= 1
    assert np.array_equal(pictures(events_of(request_of, runner))[0], plain)


def test_an_adapter_that_does_not_fit_is_refused_before_any_weight_is_read(
    request_of: GenerateRequest, tmp_path: Path
) -> None:
    wrong = AdapterRef(adapter(tmp_path, 1, "double_blocks.9.img_attn.proj"))
    heard: list[Loading] = []
    runner = Runner(on_loading=heard.append)
    with pytest.raises(AdapterError, match=r"double_blocks\.9"):
        events_of(dataclasses.replace(request_of, adapters=(wrong,)), runner)
    assert heard == []


def test_a_model_that_is_not_there_is_named(request_of: GenerateRequest) -> None:
    with pytest.raises(ModelNotFoundError, match="nonesuch"):
        events_of(dataclasses.replace(request_of, model="nonesuch"))


def test_running_out_of_memory_says_what_to_do(
    request_of: GenerateRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> mx.array:
        raise RuntimeError("[metal::malloc] Unable to allocate 99 bytes.")

    monkeypatch.setattr(FluxPipeline, "decode", fail)
    with pytest.raises(DoesNotFitError, match=r"while decoding .*`low_memory`"):
        events_of(request_of)


def test_other_failures_are_not_called_a_lack_of_memory(
    request_of: GenerateRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> mx.array:
        raise RuntimeError("something else")

    monkeypatch.setattr(FluxPipeline, "decode", fail)
    with pytest.raises(RuntimeError, match="something else"):
        events_of(request_of)


def test_prompts_without_padding_are_another_conditioning(request_of: GenerateRequest) -> None:
    runner = Runner(keep_warm=True)
    padded = events_of(request_of, runner)
    bare = events_of(dataclasses.replace(request_of, t5_padding=False), runner)
    assert [e.cached for e in padded + bare if isinstance(e, Encoded)] == [False, False]
    assert not np.array_equal(pictures(padded)[0], pictures(bare)[0])


def test_sizes_in_memory_are_estimated_from_the_configs(tmp_path: Path) -> None:
    made = FluxPipeline(str(make_checkpoint(tmp_path).path), dtype="float32")
    made.ensure_models_are_loaded()
    from mlx.utils import tree_flatten

    models = (made.t5, made.clip, made.flow, made.ae)
    held = sum(array.nbytes for m in models for _, array in tree_flatten(m.parameters()))
    assert device_memory.resident_bytes(made.checkpoint, "float32", None) == held
    assert device_memory.resident_bytes(made.checkpoint, "bfloat16", None) == held / 2
    assert device_memory.resident_bytes(made.checkpoint, "bfloat16", 4) < held / 2
    assert device_memory.memory_of_device() > 100e6
