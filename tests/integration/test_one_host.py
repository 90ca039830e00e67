"""A request on a mesh of one: its events in order, what loads when, and what changes the picture.

What an engine keeps in memory, unit by unit, is `test_worker.py`'s; files and options of the
command line are `tests/integration/generate/`'s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fluxmesh import Mesh
from fluxmesh.errors import AdapterError, ModelNotFoundError, UsageError
from fluxmesh.events import Encoded, Event, Loading, Peak, Picture, Planned, Step
from fluxmesh.request import AdapterRef, GenerateRequest, SourceImage
from fluxmesh.weights import hub
from tests.alone import painted_alone
from tests.checkpoints import write_safetensors
from tests.integration.test_mesh import mesh_of, pictures


@pytest.fixture(scope="module")
def warm(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    with mesh_of(tmp_path_factory.mktemp("warm"), 1, checkpoint) as mesh:
        yield mesh


@pytest.fixture
def request_of(checkpoint: Path) -> GenerateRequest:
    return GenerateRequest(
        "two dogs", seed=5, model=str(checkpoint), height=32, width=48, steps=3, dtype="float32"
    )


def events_of(mesh: Mesh, request: GenerateRequest, **changed: object) -> list[Event]:
    return list(mesh.generate(dataclasses.replace(request, **changed)))  # type: ignore[arg-type]


def loaded(events: list[Event]) -> list[str]:
    """Components in the order in which they began to load."""
    return [e.component for e in events if isinstance(e, Loading) and e.done_bytes == 0]


def test_a_job_tells_what_it_does_in_order_and_the_next_reads_nothing_twice(
    request_of: GenerateRequest, checkpoint: Path, tmp_path: Path
) -> None:
    with mesh_of(tmp_path, 1, checkpoint) as mesh:
        events = events_of(mesh, request_of, n_images=2)
        again = events_of(mesh, request_of, n_images=2)
        other = events_of(mesh, request_of, prompt="a cat")
    others = [event for event in events if not isinstance(event, Loading)]
    kinds = [type(event) for event in others]
    assert kinds == [Planned, Encoded, Peak, *[Step] * 3, Picture, *[Step] * 3, Picture, Peak, Peak]
    assert loaded(events) == ["text encoders", "transformer", "autoencoder"]
    steps = [(e.image, e.step, e.steps) for e in events if isinstance(e, Step)]
    assert steps == [(0, 1, 3), (0, 2, 3), (0, 3, 3), (1, 1, 3), (1, 2, 3), (1, 3, 3)]
    assert [(e.image, e.seed) for e in events if isinstance(e, Picture)] == [(0, 5), (1, 6)]
    peaks = {e.phase: e.bytes for e in events if isinstance(e, Peak)}
    assert list(peaks) == ["text", "denoise", "decode"] and min(peaks.values()) > 100_000
    assert loaded(again) == loaded(other) == []
    cached = [e.cached for e in (*events, *again, *other) if isinstance(e, Encoded)]
    assert cached == [False, True, False]
    assert np.array_equal(pictures(again), pictures(events))
    assert not np.array_equal(pictures(other)[0], pictures(events)[0])


@pytest.mark.parametrize(
    "changed",
    [
        {"n_images": 3},
        {"cache": 0.7, "steps": 8},
        {"dtype": "bfloat16"},
        {"bits": 8},
        {"t5_padding": False},
        {"low_memory": True, "n_images": 2},
        {"preload": True},
        {"height": None, "width": None, "steps": None, "guidance": None},
    ],
    ids=lambda changed: "-".join(changed),
)
def test_a_mesh_of_one_paints_what_a_python_program_paints(
    warm: Mesh, request_of: GenerateRequest, changed: dict[str, object]
) -> None:
    request = dataclasses.replace(request_of, **changed)  # type: ignore[arg-type]
    made = pictures(events_of(warm, request))
    assert np.array_equal(made, painted_alone(request))


def test_what_changes_the_conditioning_or_the_weights_changes_the_picture(
    warm: Mesh, request_of: GenerateRequest
) -> None:
    exact = pictures(events_of(warm, request_of))[0].astype(int)
    bare = pictures(events_of(warm, request_of, t5_padding=False))[0]
    assert not np.array_equal(bare, exact)
    for changed in ({"dtype": "bfloat16"}, {"bits": 8}):
        near = pictures(events_of(warm, request_of, **changed))[0]
        assert 0 < np.abs(exact - near).mean() < 8


def test_a_cached_picture_is_another_one_and_its_steps_say_why(
    warm: Mesh, request_of: GenerateRequest
) -> None:
    eight = dataclasses.replace(request_of, steps=8, n_images=2)
    plain, cached = (events_of(warm, eight, cache=cache) for cache in (0.0, 0.7))
    reused = [[e.reused for e in events if isinstance(e, Step)] for events in (plain, cached)]
    counts = [[e.reused for e in events if isinstance(e, Picture)] for events in (plain, cached)]
    assert counts[0] == [0, 0] and min(counts[1]) > 0
    assert [sum(reused[1][k : k + 8]) for k in (0, 8)] == counts[1]
    assert not any(reused[0])
    for a, b in zip(pictures(plain), pictures(cached), strict=True):
        assert not np.array_equal(a, b)


def test_size_and_steps_come_from_the_checkpoint(
    warm: Mesh, request_of: GenerateRequest, checkpoint: Path
) -> None:
    events = events_of(warm, request_of, height=None, width=None, steps=None)
    defaults = hub.resolve(str(checkpoint)).defaults
    assert pictures(events)[0].shape == (defaults.height, defaults.width, 3)
    assert len([e for e in events if isinstance(e, Step)]) == defaults.steps


def test_preloading_loads_everything_first(
    request_of: GenerateRequest, checkpoint: Path, tmp_path: Path
) -> None:
    with mesh_of(tmp_path, 1, checkpoint) as mesh:
        events = events_of(mesh, request_of, preload=True)
    assert sorted(loaded(events)) == ["autoencoder", "text encoders", "transformer"]
    first = next(i for i, event in enumerate(events) if isinstance(event, Encoded))
    assert loaded(events[first:]) == []


def test_preloading_in_low_memory_is_refused(request_of: GenerateRequest) -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        dataclasses.replace(request_of, preload=True, low_memory=True)


def test_a_job_that_is_closed_leaves_a_mesh_that_works(
    warm: Mesh, request_of: GenerateRequest
) -> None:
    stream = warm.generate(dataclasses.replace(request_of, steps=50))
    for event in stream:
        if isinstance(event, Step):
            break
    stream.close()
    assert np.array_equal(pictures(events_of(warm, request_of)), painted_alone(request_of))


def test_a_larger_decoding_batch_may_differ_by_one(warm: Mesh, request_of: GenerateRequest) -> None:
    batched = events_of(warm, request_of, n_images=3, decoding_batch_size=2)
    kinds = [type(e) for e in batched if isinstance(e, Step | Picture)]
    assert kinds == [*[Step] * 6, Picture, Picture, *[Step] * 3, Picture]
    alone = painted_alone(dataclasses.replace(request_of, n_images=3))
    for ours, expected in zip(pictures(batched), alone, strict=True):
        assert np.abs(ours.astype(int) - expected).max() <= 1


def test_previews_end_in_the_picture(warm: Mesh, request_of: GenerateRequest) -> None:
    events = events_of(warm, request_of, stepwise=True)
    previews = [e.preview for e in events if isinstance(e, Step)]
    first, last = previews[0], previews[-1]
    assert first is not None and last is not None
    # The last prediction is the result but for the rounding of one float32 sum.
    assert np.abs(last.astype(int) - pictures(events)[0]).max() <= 1
    assert not np.array_equal(first, previews[1])


def test_a_mask_keeps_the_picture_around_it(warm: Mesh, request_of: GenerateRequest) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 32, 3), dtype=np.uint8)
    mask = np.zeros((48, 32), np.uint8)
    mask[10:20, 5:30] = 255
    source = SourceImage(pixels, 1.0, mask)
    events = events_of(warm, request_of, height=None, width=None, source=source, stepwise=True)
    steps = [e for e in events if isinstance(e, Step)]
    for picture in (pictures(events)[0], steps[0].preview):
        assert picture is not None
        assert np.array_equal(picture[mask == 0], pixels[mask == 0])
        assert not np.array_equal(picture[mask == 255], pixels[mask == 255])


def test_strength_says_how_many_steps_run(warm: Mesh, request_of: GenerateRequest) -> None:
    source = SourceImage(np.zeros((32, 48, 3), np.uint8), 0.5)
    events = events_of(warm, request_of, steps=4, source=source)
    assert [e.steps for e in events if isinstance(e, Step)] == [2, 2]


def test_a_source_of_another_size_is_refused(warm: Mesh, request_of: GenerateRequest) -> None:
    source = SourceImage(np.zeros((64, 48, 3), np.uint8), 0.5)
    with pytest.raises(UsageError, match="64x48 and the image 32x48"):
        events_of(warm, request_of, source=source)


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
    warm: Mesh, request_of: GenerateRequest, tmp_path: Path
) -> None:
    refs = (AdapterRef(adapter(tmp_path, 1), 0.5), AdapterRef(adapter(tmp_path, 2), 0.25))
    plain = pictures(events_of(warm, request_of))[0]
    adapted = pictures(events_of(warm, request_of, adapters=refs))[0]
    fused = pictures(events_of(warm, request_of, adapters=refs, fuse_adapters=True))[0]
    assert np.abs(adapted.astype(int) - plain).max() > 5
    assert np.abs(adapted.astype(int) - fused).max() <= 1
    assert np.array_equal(pictures(events_of(warm, request_of))[0], plain)


def test_an_adapter_that_does_not_fit_is_refused_before_any_weight_is_read(
    request_of: GenerateRequest, checkpoint: Path, tmp_path: Path
) -> None:
    wrong = AdapterRef(adapter(tmp_path, 1, "double_blocks.9.img_attn.proj"))
    heard: list[Event] = []
    with (
        mesh_of(tmp_path, 1, checkpoint) as mesh,
        pytest.raises(AdapterError, match=r"double_blocks\.9"),
    ):
        for event in mesh.generate(dataclasses.replace(request_of, adapters=(wrong,))):
            heard.append(event)
    assert [e.component for e in heard if isinstance(e, Loading)] in ([], ["adapter"] * 2)


def test_a_model_that_is_not_there_is_named(warm: Mesh, request_of: GenerateRequest) -> None:
    with pytest.raises(ModelNotFoundError, match="nonesuch"):
        events_of(warm, request_of, model="nonesuch")
