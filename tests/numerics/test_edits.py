"""Pictures from references, in an engine and in a program: what changes them, and what must not."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from fluxmesh import FluxPipeline
from fluxmesh.cluster.snapshot import ModelVariant
from fluxmesh.engine.stages import PipelineStages
from fluxmesh.engine.state import GOES_ON, PLANS
from fluxmesh.engine.worker import Worker
from fluxmesh.errors import UsageError
from fluxmesh.models.base import named_references
from fluxmesh.models.collectives import Ranks
from fluxmesh.models.flux1.conditions import kontext
from fluxmesh.models.flux2.files.folder import KV_PIPELINE
from fluxmesh.sampling.latents import initial_noise
from fluxmesh.wire import messages
from fluxmesh.wire.messages import Decode, Encode, EncodePictures, EncodeSource, Paint
from tests.checkpoints import make_checkpoint, write_safetensors
from tests.flux2_checkpoint import make_flux2
from tests.numerics.units import HEAD, latents, loaded, only

Made = Literal["klein", "klein KV", "base", "kontext"]
MADE: tuple[Made, ...] = ("klein", "klein KV", "base", "kontext")
CHANGED = 1e-4  # of a picture's values: far more than two ways to compute the same differ
PICTURES = [
    np.random.default_rng(k).integers(0, 256, (64, 80, 3), dtype=np.uint8) for k in range(2)
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Made, Path]]:
    """A checkpoint of each kind that takes references."""
    place = tmp_path_factory.mktemp("models")
    made: dict[Made, Path] = {
        "klein": make_flux2(place / "klein"),
        "base": make_flux2(place / "base", "base"),
        "klein KV": place / "kv",
        "kontext": make_checkpoint(place / "kontext", seed=1, guidance=True).path,
    }
    shutil.copytree(made["klein"], made["klein KV"])
    for kind, pipeline in (("klein KV", KV_PIPELINE), ("kontext", "FluxKontextPipeline")):
        index = made[kind] / "model_index.json"  # type: ignore[index]
        index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": pipeline}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kontext, "SIZES", ((80, 64),))
        yield made


@functools.cache
def pipeline(folder: Path) -> FluxPipeline:
    """One for all tests: the prompt is read once."""
    return FluxPipeline(str(folder), dtype="float32")


def edit(flux: FluxPipeline | Path, pictures: list[Any], **options: Any) -> np.ndarray:
    flux = flux if isinstance(flux, FluxPipeline) else pipeline(flux)
    flux.low_memory = options.pop("low_memory", False)
    options = {"num_steps": 2, "seed": 3, "reload_text_encoders": False, **options}
    return np.array(flux.generate_images("a cat", references=pictures, **options))


@pytest.mark.parametrize("kind", MADE)
def test_a_reference_changes_the_picture_and_memory_options_do_not(
    kind: Made, models: dict[Made, Path]
) -> None:
    folder, first = models[kind], PICTURES[:1]
    made = edit(folder, first)
    assert made.shape == (1, 64, 80, 3)  # the size of the reference
    assert np.array_equal(made, edit(folder, first, low_memory=True))
    assert np.array_equal(made, edit(folder, first, n_images=2)[:1])
    assert not np.allclose(made, edit(folder, PICTURES[1:]), atol=CHANGED)
    assert not np.allclose(made, edit(folder, [], latent_size=(8, 10)), atol=CHANGED)


def test_a_quantized_model_with_an_adapter_and_a_cache_edits_too(
    models: dict[Made, Path], tmp_path: Path
) -> None:
    """Neither far from what float32 gives, nor the same."""
    rng, path = np.random.default_rng(0), tmp_path / "lora.safetensors"
    module = "diffusion_model.single_blocks.0.linear2"
    low = {"A": rng.standard_normal((4, 256)) / 16, "B": rng.standard_normal((64, 4)) / 16}
    write_safetensors(
        path, {f"{module}.lora_{k}.weight": array.astype(np.float32) for k, array in low.items()}
    )
    flux = FluxPipeline(str(models["klein"]), dtype="float32", bits=8, adapters=[str(path)])
    exact, made = edit(models["klein"], PICTURES), edit(flux, PICTURES)
    assert CHANGED < np.abs(made - exact).max() < 0.3
    assert not np.allclose(made, edit(flux, PICTURES[:1]), atol=CHANGED)
    whole, cached = (edit(models["klein"], PICTURES, num_steps=5, cache=c) for c in (0.0, 1.0))
    assert CHANGED < np.abs(whole - cached).max() < 0.3


def test_the_order_of_references_counts_and_files_are_as_their_pixels(
    models: dict[Made, Path], tmp_path: Path
) -> None:
    """A file that is turned by its EXIF data, and transparent in parts, as viewers show it."""
    clear = Image.fromarray(PICTURES[0]).convert("RGBA")
    clear.putalpha(Image.fromarray(np.where(PICTURES[0][..., 0] > 99, 255, 0).astype(np.uint8)))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    clear.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    white = np.where(PICTURES[0][..., :1] > 99, PICTURES[0], 255).astype(np.uint8)
    klein = models["klein"]
    pair = edit(klein, [white, PICTURES[1]])
    assert np.array_equal(pair, edit(klein, [tmp_path / "turned.png", PICTURES[1]]))
    assert not np.allclose(pair, edit(klein, [PICTURES[1], white]), atol=CHANGED)


def test_a_negative_prompt_moves_a_base_model_and_is_refused_by_others(
    models: dict[Made, Path],
) -> None:
    base, size = models["base"], (4, 6)
    plain = edit(base, [], latent_size=size)
    assert np.array_equal(plain, edit(base, [], latent_size=size, negative="", cfg=4.0))
    assert not np.allclose(plain, edit(base, [], latent_size=size, negative="dogs"), atol=CHANGED)
    assert not np.allclose(plain, edit(base, [], latent_size=size, cfg=2.0), atol=CHANGED)
    with pytest.raises(UsageError, match="takes no negative prompt"):
        edit(models["klein"], [], negative="dogs")
    with pytest.raises(UsageError, match="takes no more than 1, and 2 were given"):
        edit(models["kontext"], PICTURES)
    with pytest.raises(UsageError, match="60x80|80x60"):
        edit(models["klein"], [PICTURES[0][:60]])


def test_a_negative_prompt_that_is_cut_is_told_by_an_engine_and_to_a_program(
    models: dict[Made, Path],
) -> None:
    flux, long = pipeline(models["base"]), "blur " * 300
    with pytest.warns(UserWarning, match=r"tokens of the negative prompt; left out is all from"):
        next(flux.generate_latents("a cat", num_steps=1, latent_size=(4, 4), negative=long))
    weights = ModelVariant(str(models["base"]), "float32")
    cuts = []
    for negative in (long, "blur", None):
        unit = Encode(**HEAD, weights=weights, prompt="a cat", negative=negative)
        (report,) = only(Worker(), unit, messages.TextEncoded)
        assert report.cut is None
        cuts.append(report.negative_cut)
    assert cuts == [flux.cut(long), None, None] and cuts[0] is not None


# An engine's units


def units(worker: Worker, folder: Path, **more: Any) -> Paint:
    """A painting with two references, or Kontext's one, which the worker has encoded."""
    weights = ModelVariant(str(folder), "float32")
    architecture = worker.open(weights).checkpoint.architecture
    fitted = PICTURES[: min(2, architecture.most_references)]
    named = EncodePictures(**HEAD, weights=weights, named=named_references(fitted))
    (pictures,) = only(worker, named, messages.PicturesEncoded)
    (text,) = only(worker, Encode(**HEAD, weights=weights, prompt="two dogs"), messages.TextEncoded)
    channels = architecture.latent_channels
    fields: dict[str, Any] = {
        "placement": "data",
        "image": 0,
        "height": 32,
        "width": 48,
        "steps": 3,
        "first": 0,
        "guidance": 3.0,
        "low_memory": False,
        "preview": False,
        "strength": 1.0,
        "latents": None,
        "noise": initial_noise(7, 32, 48, channels, 8),
        "features": text.features,
        "conditions": pictures.conditions,
    }
    return Paint(**HEAD, weights=weights, **(fields | more))


@pytest.mark.parametrize("kind", MADE)
def test_an_edit_goes_on_from_any_step_to_the_same_bytes(
    kind: Made, models: dict[Made, Path]
) -> None:
    worker = Worker()
    work = units(worker, models[kind])
    assert work.conditions is not None
    assert worker.counters.pictures == len(work.conditions) == (1 if kind == "kontext" else 2)
    assert {array.shape for array in work.conditions.values()} == {(1, 4, 5, 16)} or (
        kind == "kontext"
    )
    whole = latents(worker, work)
    going = replace(work, first=1, latents=whole[0], low_memory=True)
    rest = latents(Worker(), going)  # as after a death: nothing is warm, nothing encoded
    assert np.array_equal(rest[-1], whole[-1])
    without = latents(worker, replace(work, conditions=None))
    assert not np.allclose(without[-1], whole[-1], atol=1e-3)
    assert worker.counters.encodes == 1


def remembered(worker: Worker) -> Any:
    """Keys and values of references that an engine keeps."""
    assert worker.plan is not None
    return worker.plan[1].memory  # type: ignore[attr-defined]


def test_images_of_a_job_remember_their_references_once(models: dict[Made, Path]) -> None:
    worker = Worker()
    work = units(worker, models["klein KV"])
    latents(worker, work)
    memory = remembered(worker)
    assert memory is not None
    latents(worker, replace(work, image=1, noise=initial_noise(8, 32, 48, 4, 8)))
    assert remembered(worker) is memory


def plans_made(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each plan that is made from now on: whether another one was kept meanwhile."""
    made: list[bool] = []
    plan = worker.model.plan

    def counted(*args: Any, **keys: Any) -> Any:
        made.append(worker.plan is not None)
        return plan(*args, **keys)

    monkeypatch.setattr(worker.model, "plan", counted)
    return made


def test_an_engine_keeps_the_keys_of_references_once_whatever_the_placement(
    models: dict[Made, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that falls back from a ring to whole images, or is in a ring for the last ones."""
    worker = Worker()
    worker.join(Ranks(mx.distributed.init()))  # a group of one
    work = units(worker, models["klein KV"])
    made = plans_made(worker, monkeypatch)
    spread, alone = (latents(worker, replace(work, placement=p)) for p in ("sequence", "data"))
    assert np.allclose(spread[-1], alone[-1], atol=1e-5)
    latents(worker, replace(work, placement="sequence"))
    assert made == [False, False, False]


def test_all_ranks_make_a_plan_anew_where_one_has_it_no_more(
    models: dict[Made, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made with collectives, in which ranks that had kept it would be missing."""

    class OfTwo(Ranks):
        other = GOES_ON  # what the other rank would do, once

        def most(self, value: int) -> int:
            other, self.other = self.other, GOES_ON
            return max(super().most(value), other)

    worker, ranks = Worker(), OfTwo(mx.distributed.init())
    worker.join(ranks)
    work = replace(units(worker, models["klein KV"]), placement="sequence", low_memory=True)
    made = plans_made(worker, monkeypatch)
    first = latents(worker, work)
    again = latents(worker, work)
    assert len(made) == 1
    ranks.other = PLANS
    third = latents(worker, work)
    assert len(made) == 2
    assert np.array_equal(first[-1], again[-1]) and np.array_equal(first[-1], third[-1])


def test_keys_of_references_leave_before_a_decode_in_low_memory(models: dict[Made, Path]) -> None:
    worker = Worker()
    work = units(worker, models["klein KV"], low_memory=True)
    made = latents(worker, work)[-1]
    size = {"height": work.height, "width": work.width}
    assert remembered(worker) is not None
    unit = Decode(**HEAD, weights=work.weights, images=(0,), latents=made, **size)
    only(worker, unit, messages.Pictured)
    assert worker.plan is None


@pytest.mark.parametrize("is_source", [False, True])
def test_what_is_not_to_be_there_leaves_before_pictures_are_encoded(
    is_source: bool, models: dict[Made, Path]
) -> None:
    worker = Worker()
    work = units(worker, models["klein"])
    latents(worker, work)
    assert loaded(worker) == ["text_encoder", "flow", "ae"]
    common: dict[str, Any] = {**HEAD, "weights": work.weights}
    unit: Any = EncodePictures(**common, named=named_references(PICTURES))
    if is_source:
        unit = EncodeSource(**common, pixels=PICTURES[0])
    list(worker.do(unit))
    assert loaded(worker) == ["text_encoder", "flow", "ae"]
    list(worker.do(replace(unit, text_stays=False)))
    assert loaded(worker) == ["flow", "ae"]
    list(worker.do(replace(unit, makes_room=True)))
    assert loaded(worker) == ["ae"]


@pytest.mark.parametrize(
    ("name", "shape", "sentence"),
    [
        ("reference_1", (1, 4, 16), "reads references of"),
        ("reference_1", (1, 2, 2, 12), "reads references of"),
        ("reference_x", (1, 2, 2, 16), "'reference_x' came as"),
        ("control", (1, 2, 2, 16), "'control' came as"),
        ("reference_1", (2, 2, 2, 16), "of which the first is 1"),
    ],
)
def test_conditions_that_are_of_another_model_are_refused(
    models: dict[Made, Path], name: str, shape: tuple[int, ...], sentence: str
) -> None:
    worker = Worker()
    work = units(worker, models["klein"])
    with pytest.raises(UsageError, match=sentence):
        latents(worker, replace(work, conditions={name: np.zeros(shape, np.float32)}))


def test_pixels_that_are_none_are_refused(models: dict[Made, Path]) -> None:
    weights = ModelVariant(str(models["klein"]), "float32")
    flat = {"reference_1": np.zeros((64, 64), np.uint8)}
    with pytest.raises(UsageError, match="that is no picture"):
        EncodePictures(**HEAD, weights=weights, named=flat)
    for name, shape, sentence in (
        ("reference_1", (64, 64, 1), r"'reference_1' came as \[64, 64, 1\]; this model reads \["),
        ("reference_1", (64, 72, 3), "both sides multiples of 16"),
        ("control", (64, 64, 3), "'control' came, which this model does not read"),
    ):
        named = {name: np.zeros(shape, np.uint8)}
        with pytest.raises(UsageError, match=sentence):
            list(Worker().do(EncodePictures(**HEAD, weights=weights, named=named)))
    with pytest.raises(UsageError, match="'source' came as"):
        pixels = np.zeros((64, 72, 3), np.uint8)
        list(Worker().do(EncodeSource(**HEAD, weights=weights, pixels=pixels)))


@pytest.mark.parametrize("shape", [(1, 5, 16), (1, 6, 12)])
def test_latents_that_are_of_another_size_or_model_are_refused(
    models: dict[Made, Path], shape: tuple[int, ...]
) -> None:
    worker, wrong = Worker(), np.zeros(shape, np.float32)
    work = units(worker, models["klein"])
    sentence = r"latents of 32x48 pixels came as .*; this model's are \[6, 16\]"
    with pytest.raises(UsageError, match=sentence):
        list(worker.do(replace(work, noise=wrong)))
    size = {"height": work.height, "width": work.width}
    with pytest.raises(UsageError, match=sentence):
        unit = Decode(**HEAD, weights=work.weights, images=(0,), latents=wrong, **size)
        list(worker.do(unit))


def test_a_step_counts_the_tokens_of_references_for_the_room_that_it_has(
    models: dict[Made, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    bounded = PipelineStages.bounded_steps

    def spy(flux: PipelineStages, latent_size: tuple[int, int], added: int = 0) -> Any:
        counted.append(added)
        return bounded(flux, latent_size, added)

    monkeypatch.setattr(PipelineStages, "bounded_steps", spy)
    worker = Worker()
    latents(worker, units(worker, models["klein"]))
    edit(models["klein"], PICTURES, num_steps=1)
    assert counted == [40, 40]
    mx.clear_cache()
