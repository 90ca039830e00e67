"""FLUX.1 Redux in an engine and in a program: what it changes, what must not, and what it holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from fluxmesh import FluxPipeline
from fluxmesh.cluster.snapshot import ModelVariant
from fluxmesh.engine.worker import Worker
from fluxmesh.errors import NotFetchedError, UsageError
from fluxmesh.models.base import named_references
from fluxmesh.models.flux1.family import FLUX1
from fluxmesh.sampling.latents import initial_noise
from fluxmesh.weights.reference_readers import resolve_reader
from fluxmesh.wire import messages
from fluxmesh.wire.messages import Encode, EncodePictures, Paint
from tests.checkpoints import make_checkpoint
from tests.numerics.units import HEAD, latents, only
from tests.redux_checkpoint import SIGLIP, make_redux

SIDE = SIGLIP.image_size
PICTURES = [
    np.random.default_rng(k).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) for k in range(2)
]
CHANGED = 1e-4  # of a picture's values: far more than two ways to compute the same differ


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A checkpoint as dev is, and a Redux for it."""
    place = tmp_path_factory.mktemp("models")
    yield make_checkpoint(place / "dev", seed=1, guidance=True).path, make_redux(place / "redux")
    mx.clear_cache()


# A program


def test_a_program_gives_pictures_with_strengths_or_without(folders: tuple[Path, Path]) -> None:
    dev, redux = folders
    flux = FluxPipeline(str(dev), dtype="float32", redux=str(redux))

    def paint(references: list[Any], **options: Any) -> np.ndarray:
        flux.low_memory = options.pop("low_memory", False)
        options = {"num_steps": 2, "seed": 3, "reload_text_encoders": False, **options}
        size = options.pop("latent_size", (4, 6))
        return np.array(
            flux.generate_images("a cat", references=references, latent_size=size, **options)
        )

    plain, both = paint([]), paint(PICTURES)
    assert np.array_equal(both, paint([(picture, 1.0) for picture in PICTURES]))
    assert np.array_equal(both, paint(PICTURES, low_memory=True))
    assert np.array_equal(both, paint(PICTURES, n_images=2)[:1])
    assert np.array_equal(plain, paint([]))  # a model that has read references reads none
    others = {
        "none": plain,
        "weaker": paint([(PICTURES[0], 0.5), PICTURES[1]]),
        "one": paint(PICTURES[:1]),
        "guided": paint(PICTURES, negative="dogs", cfg=3.0),
    }
    for name, other in others.items():
        assert not np.allclose(both, other, atol=CHANGED), name
    cached = [paint(PICTURES, num_steps=5, cache=cache) for cache in (0.0, 1.0)]
    assert CHANGED < np.abs(cached[0] - cached[1]).mean() < 0.1


def test_half_precision_and_few_bits_stay_near(folders: tuple[Path, Path]) -> None:
    """Of 8 bits, Redux is in none: what it saw is the same."""
    dev, redux = folders
    made = {}
    for name, how in {
        "exact": {"dtype": "float32"},
        "half": {"dtype": "bfloat16"},
        "bits": {"dtype": "float32", "bits": 8},
    }.items():
        flux = FluxPipeline(str(dev), redux=str(redux), **how)  # type: ignore[arg-type]
        flux.read_references_with(flux.redux)
        seen = flux.encode_pictures(named_references(PICTURES), [1.0, 0.5])
        assert seen["redux"].dtype == flux.dtype and seen["redux"].shape == (1, 2, 2, 32)
        made[name] = np.array(seen["redux"].astype(mx.float32))
    assert np.array_equal(made["bits"], made["exact"])
    error = np.linalg.norm(made["half"] - made["exact"]) / np.linalg.norm(made["exact"])
    assert 1e-4 < error < 0.05


def test_without_redux_a_program_is_told_what_to_get(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    flux = FluxPipeline(str(folders[0]), redux="redux", download=False)
    with pytest.raises(NotFetchedError, match="fluxmesh models pull redux"):
        next(flux.generate_latents("a cat", references=PICTURES, latent_size=(4, 6)))


# An engine's units


def seeing(folders: tuple[Path, Path], **more: Any) -> EncodePictures:
    weights = ModelVariant(str(folders[0]), "float32")
    fields = {"named": named_references(PICTURES), "strengths": (0.7, 0.4)}
    return EncodePictures(**HEAD, weights=weights, **fields, reader=str(folders[1]), **more)


def painting(worker: Worker, folders: tuple[Path, Path], **more: Any) -> Paint:
    work = seeing(folders)
    (seen,) = only(worker, work, messages.PicturesEncoded)
    weights = work.weights
    (text,) = only(worker, Encode(**HEAD, weights=weights, prompt="two dogs"), messages.TextEncoded)
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
        "noise": initial_noise(7, 32, 48, 16, 8),
        "features": text.features,
        "conditions": seen.conditions,
    }
    return Paint(**HEAD, weights=weights, **(fields | more))


def test_what_was_seen_goes_on_from_any_step_to_the_same_bytes(folders: tuple[Path, Path]) -> None:
    worker = Worker()
    work = painting(worker, folders)
    assert work.conditions is not None and work.added_tokens == 4
    assert {name: array.shape for name, array in work.conditions.items()} == {
        "redux": (1, 2, 2, 32),
        "redux_weight": (1, 1),
    }
    assert worker.counters.pictures == 2
    whole = latents(worker, work)
    going = replace(work, first=1, latents=whole[0], low_memory=True)
    fresh = Worker()  # as after a death: nothing is warm, and Redux need not come again
    assert np.array_equal(latents(fresh, going)[-1], whole[-1])
    assert fresh.counters.pictures == 0 and not fresh.model.is_loaded("vision")
    without = latents(worker, replace(work, conditions=None))
    assert not np.allclose(without[-1], whole[-1], atol=1e-3)


def test_redux_stays_as_text_encoders_do_and_leaves_where_it_may_not(
    folders: tuple[Path, Path],
) -> None:
    worker = Worker()
    latents(worker, painting(worker, folders))
    holding = worker.text_holding
    assert holding is not None and worker.model.is_loaded("vision")
    with_redux = holding.nbytes
    list(worker.do(seeing(folders, makes_room=True)))  # which is there, and takes no room
    assert worker.model.is_loaded("flow")
    list(worker.do(seeing(folders, stay=False)))
    assert not worker.model.is_loaded("vision") and worker.text_holding is not None
    tensors = worker.model.architecture.nbytes(("vision",), "float32", None)
    assert with_redux - worker.text_holding.nbytes == tensors > 0
    list(worker.do(seeing(folders, makes_room=True)))
    assert worker.model.is_loaded("vision") and not worker.model.is_loaded("flow")
    worker.model.reload_text_encoders()
    assert not worker.model.is_loaded("vision")


def test_another_redux_takes_the_place_of_the_one_that_is_there(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    worker = Worker()
    (first,) = only(worker, seeing(folders), messages.PicturesEncoded)
    latents(worker, painting(worker, folders))
    other = (folders[0], make_redux(tmp_path / "other", seed=5))
    (second,) = only(worker, seeing(other), messages.PicturesEncoded)
    assert worker.model.is_loaded("flow")  # which is the same
    assert not np.allclose(first.conditions["redux"], second.conditions["redux"], atol=1e-3)
    assert first.reader != second.reader == resolve_reader(str(other[1]), FLUX1).content
    make_redux(other[1])  # the first one's numbers, under the same name
    (third,) = only(worker, seeing(other), messages.PicturesEncoded)
    assert np.array_equal(first.conditions["redux"], third.conditions["redux"])
    assert third.reader == first.reader


@pytest.mark.parametrize(
    ("conditions", "sentence"),
    [
        ({"redux": np.zeros((1, 2, 2, 24), np.float32)}, r"came as \[1, 2, 2, 24\]"),
        ({"redux": np.zeros((1, 4, 32), np.float32)}, r"reads \[1, rows, rows, 32\]"),
        ({"redux": np.zeros((1, 2, 2, 32), np.float32)}, "and a weight"),
    ],
)
def test_what_another_redux_saw_is_refused(
    folders: tuple[Path, Path], conditions: dict[str, np.ndarray], sentence: str
) -> None:
    worker = Worker()
    if "weight" not in sentence:
        conditions = conditions | {"redux_weight": np.ones((1, 1), np.float32)}
    with pytest.raises(UsageError, match=sentence):
        latents(worker, replace(painting(worker, folders), conditions=conditions))


def test_strengths_that_are_not_as_many_as_pictures_are_refused(
    folders: tuple[Path, Path],
) -> None:
    with pytest.raises(UsageError, match="are 1 for 2 references"):
        replace(seeing(folders), strengths=(0.5,))
