"""Previews by the unit that paints: near the decoded picture, of no cost to it, fitted once."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from fluxmesh.cluster.snapshot import ModelVariant
from fluxmesh.engine import preview
from fluxmesh.engine.stages import PipelineStages
from fluxmesh.engine.worker import Worker
from fluxmesh.models.autoencoder.packing import unpack
from fluxmesh.sampling.latents import initial_noise
from fluxmesh.sampling.preview import colours_of
from fluxmesh.weights import hub
from fluxmesh.wire import messages
from fluxmesh.wire.messages import EncodeSource
from tests.flux2_checkpoint import make_flux2
from tests.numerics.units import HEAD, loaded, only, painting

MIXED = np.array([[1, 0.3, -0.5], [-0.4, 1, 0.2], [0.6, -0.2, 1]], np.float32)


def stepped(worker: Worker, work: messages.Paint) -> list[messages.Stepped]:
    return only(worker, work, messages.Stepped)


def colours_apart(preview_pixels: np.ndarray, decoded: np.ndarray) -> float:
    """Root of the mean square, of 1, by which a preview misses the picture that is decoded."""
    side = len(decoded) // len(preview_pixels)
    shown, wanted = colours_of(preview_pixels, 1), colours_of(decoded, side)
    return float(np.sqrt(np.mean(np.square(shown - wanted))))


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fit that takes a CPU no time, good for little."""
    monkeypatch.setattr(preview, "PICTURES", 2)
    monkeypatch.setattr(preview, "SIDE", 2)


@pytest.fixture(scope="module")
def table() -> Path:
    return hub.tiny_folder() / "vae" / preview.TABLE


def test_previews_show_what_is_expected_and_change_no_byte(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits: list[Any] = []
    monkeypatch.setattr(preview, "fit", lambda *args: fits.append(args))
    tiny = ModelVariant(str(hub.tiny_folder()), "float32")
    work = painting(worker, tiny, steps=2)
    plain = stepped(worker, work)
    both = stepped(worker, replace(work, preview_every=1, preview=True))
    for before, after in zip(plain, both, strict=True):
        assert before.projected is None and after.projected is not None
        assert np.array_equal(before.latents, after.latents)  # type: ignore[arg-type]
        assert after.projected.shape == (4, 6, 3)
        assert after.preview is not None
        assert colours_apart(after.projected, after.preview) < 0.12
        assert colours_apart(255 - after.projected, after.preview) > 0.2  # it could be otherwise
    assert fits == []  # it brings its table
    some = stepped(worker, replace(work, preview_every=2))
    assert [step.projected is not None for step in some] == [False, True]


def test_previews_go_on_where_the_steps_do_and_begin_from_a_picture(worker: Worker) -> None:
    tiny = ModelVariant(str(hub.tiny_folder()), "float32")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    unit = EncodeSource(**HEAD, weights=tiny, pixels=pixels)
    (source,) = only(worker, unit, messages.SourceEncoded)
    mask = np.zeros((32, 48), np.uint8)
    mask[:, 24:] = 255
    more = {"steps": 4, "source": source.latents, "strength": 0.7, "mask": mask}
    work = painting(worker, tiny, preview_every=1, **more)
    whole = stepped(worker, work)
    left = [step.projected[:, :3] for step in whole]  # type: ignore[index]
    # What the mask keeps is the picture from the first preview on, in the middle of the noise.
    assert all(np.abs(left[0].astype(int) - each).max() <= 1 for each in left)
    rest = stepped(worker, replace(work, first=1, latents=whole[0].latents))
    assert [step.step for step in rest] == [2, 3]
    for again, before in zip(rest, whole[1:], strict=True):
        assert np.array_equal(again.projected, before.projected)  # type: ignore[arg-type]


def test_a_model_that_brings_no_table_is_fitted_once_for_an_engine(
    worker: Worker, weights: ModelVariant, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits: list[Any] = []
    real = preview.fit

    def counted(*args: Any) -> Any:
        fits.append(args)
        return real(*args)

    monkeypatch.setattr(preview, "fit", counted)
    small(monkeypatch)
    work = painting(worker, weights)
    plain = stepped(worker, work)
    assert "ae" not in loaded(worker)
    for _ in range(2):
        steps = stepped(worker, replace(work, preview_every=1))
        assert all(step.projected is not None for step in steps)
        for before, after in zip(plain, steps, strict=True):
            assert np.array_equal(before.latents, after.latents)  # type: ignore[arg-type]
    assert len(fits) == 1 and "ae" in loaded(worker)


def test_a_table_that_is_broken_is_fitted_anew(
    weights: ModelVariant, tmp_path: Path, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch)
    folder = tmp_path / "model"
    shutil.copytree(weights.model, folder)
    shutil.copy(table, folder / "vae" / preview.TABLE)
    worker = Worker()
    work = painting(worker, ModelVariant(str(folder), "float32"), preview_every=1)
    brought = stepped(worker, work)[-1].projected
    file = folder / "vae" / preview.TABLE
    numbers = np.load(file)
    no_numbers = np.full_like(numbers, np.nan), numbers.astype(str), numbers[:, 0]
    of_another = numbers[3:]  # an autoencoder with fewer channels
    file.write_bytes(b"nothing")
    fitted = stepped(Worker(), work)[-1].projected
    assert brought is not None and fitted is not None
    assert not np.array_equal(brought, fitted)
    for content in (*no_numbers, of_another):
        np.save(file, content)
        assert preview.shipped(worker.model.checkpoint) is None


def test_another_family_is_fitted_in_its_own_latents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FLUX.2, with an autoencoder whose colours are a linear function of its latents."""

    def linear(_pipeline: PipelineStages, x: mx.array, latent_size: tuple[int, int]) -> np.ndarray:
        colours = 0.5 + 0.1 * (unpack(np.array(x), latent_size)[..., :3] @ MIXED)
        return np.clip(colours * 255, 0, 255).round().astype(np.uint8).repeat(8, 1).repeat(8, 2)

    small(monkeypatch)
    monkeypatch.setattr(preview, "SIDE", 4)
    monkeypatch.setattr(PipelineStages, "pixels", linear)
    model = make_flux2(tmp_path / "klein")
    channels = hub.resolve(str(model)).architecture.latent_channels
    noise = initial_noise(7, 32, 48, channels, 8)
    worker = Worker()
    variant = ModelVariant(str(model), "float32")
    work = painting(worker, variant, noise=noise, latents=noise)
    plain = stepped(worker, work)
    steps = stepped(worker, replace(work, preview_every=1, preview=True))
    for before, after in zip(plain, steps, strict=True):
        assert np.array_equal(before.latents, after.latents)  # type: ignore[arg-type]
        assert after.projected is not None and after.projected.shape == (4, 6, 3)
        assert after.preview is not None and after.preview.std() > 10
        assert colours_apart(after.projected, after.preview) < 0.02
