"""The Python API: the seed document's own example, lazily loaded models, any size, any seed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from fluxmesh import FluxPipeline
from fluxmesh.errors import UsageError
from fluxmesh.models.flux1.config import AutoencoderConfig
from fluxmesh.request import SourceImage
from fluxmesh.sampling import latents
from tests.checkpoints import make_checkpoint

# From the document that the project began with; the import line alone is changed.
EXAMPLE = """
import mlx.core as mx
from fluxmesh import FluxPipeline

# This will download all the weights from HF hub
flux = FluxPipeline("flux-schnell")

# Make a generator that returns the latent variables from the reverse diffusion
# process
latent_generator = flux.generate_latents(
    "A photo of an astronaut riding a horse on Mars",
    num_steps=4,
    latent_size=(32, 64),  # 256x512 image
)

# The first return value of the generator contains the conditioning and the
# random noise at the beginning of the diffusion process.
conditioning = next(latent_generator)
(
    x_T,                # The initial noise
    x_positions,        # The integer positions used for image positional encoding
    t5_conditioning,    # The T5 features from the text prompt
    t5_positions,       # Integer positions for text (normally all 0s)
    clip_conditioning,  # The clip text features from the text prompt
) = conditioning

# Returning the conditioning as the first output from the generator allows us
# to unload T5 and clip before running the diffusion transformer.
mx.eval(conditioning)

# Evaluate each diffusion step
for x_t in latent_generator:
    mx.eval(x_t)

# Note that we need to pass the latent size because it is collapsed and
# patchified in x_t and we need to unwrap it.
img = flux.decode(x_t, latent_size=(32, 64))
"""


def test_the_seed_documents_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A Hub cache that holds schnell: tiny and random, but under its name and layout.
    repo = tmp_path / "hub" / "models--black-forest-labs--FLUX.1-schnell"
    small = AutoencoderConfig(widths=(8, 8, 8, 8), num_res_blocks=1, norm_groups=4)
    make_checkpoint(repo / "snapshots" / "0123abcd", autoencoder=small)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123abcd")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("FLUX_SCHNELL", raising=False)

    names: dict[str, Any] = {}
    exec(EXAMPLE, names)

    assert names["x_T"].shape == names["x_t"].shape == (1, 16 * 32, 64)
    assert names["x_positions"].shape == (1, 16 * 32, 3)
    assert names["t5_conditioning"].shape == (1, 16, 32)
    assert names["t5_positions"].shape == (1, 16, 3)
    assert names["clip_conditioning"].shape == (1, 32)
    image = np.array(names["img"])
    assert image.shape == (1, 256, 512, 3)
    assert 0 <= image.min() < image.max() <= 1
    assert image.std() > 0.02


@pytest.fixture
def flux(checkpoint: Path) -> FluxPipeline:
    return FluxPipeline(str(checkpoint))


def test_models_load_when_used_and_leave_with_del(flux: FluxPipeline) -> None:
    assert not any(flux.is_loaded(name) for name in ("t5", "clip", "flow", "ae"))
    steps = flux.generate_latents("a dog", num_steps=2, latent_size=(4, 4), seed=1)
    next(steps)
    assert flux.is_loaded("t5")
    assert not flux.is_loaded("flow")
    del flux.t5, flux.clip
    for x in steps:
        mx.eval(x)
    assert flux.is_loaded("flow")
    assert not flux.is_loaded("t5")
    assert not flux.is_loaded("ae")
    del flux.t5  # never an error


def test_a_prompt_seen_before_runs_no_encoder(flux: FluxPipeline) -> None:
    first = flux.encode("a dog")
    flux.reload_text_encoders()
    assert flux.encode("a dog") is first
    assert not flux.is_loaded("t5")
    flux.encode("a cat")
    assert flux.is_loaded("t5")


def test_a_prompt_that_is_cut_warns_and_one_that_fits_does_not(flux: FluxPipeline) -> None:
    prompt = "one two three four five six seven eight nine ten eleven"
    with pytest.warns(UserWarning, match="reads 16 of the .* left out is all from “"):
        next(flux.generate_latents(prompt, num_steps=1, latent_size=(4, 4), seed=1))
    cut = flux.cut(prompt)
    assert cut is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        next(flux.generate_latents(prompt[: cut.start], num_steps=1, latent_size=(4, 4), seed=1))


def test_ensure_models_are_loaded_loads_all(flux: FluxPipeline) -> None:
    flux.ensure_models_are_loaded()
    assert all(flux.is_loaded(name) for name in ("t5", "clip", "flow", "ae"))


@pytest.mark.parametrize("latent_size", [(2, 2), (4, 6), (10, 4)])
def test_images_come_at_every_size(flux: FluxPipeline, latent_size: tuple[int, int]) -> None:
    images = flux.generate_images("a dog", 2, num_steps=1, latent_size=latent_size, seed=0)
    assert images.shape == (2, 8 * latent_size[0], 8 * latent_size[1], 3)
    assert images.dtype == mx.float32
    assert float(images.min()) >= 0
    assert float(images.max()) <= 1


def test_a_batch_of_latents_is_its_images_one_by_one(flux: FluxPipeline) -> None:
    *_, batch = flux.generate_latents("a dog", n_images=3, num_steps=2, latent_size=(4, 6), seed=8)
    *_, alone = flux.generate_latents("a dog", num_steps=2, latent_size=(4, 6), seed=10)
    assert batch.shape == (3, 6, 64)
    assert mx.array_equal(batch[2:], alone)


def test_noise_is_numpys_philox_keyed_by_the_seed(flux: FluxPipeline) -> None:
    x_T, *_ = next(flux.generate_latents("a dog", n_images=2, latent_size=(4, 6), seed=8))
    expected = [latents.initial_noise(seed, 32, 48) for seed in (8, 9)]
    assert np.array_equal(np.array(x_T), np.concatenate(expected))


def test_a_seed_that_was_not_given_is_kept(flux: FluxPipeline) -> None:
    picture = flux.generate_images("a dog", num_steps=1, latent_size=(4, 4))
    seed = flux.seed
    assert seed is not None
    other = flux.generate_images("a dog", num_steps=1, latent_size=(4, 4))
    assert flux.seed != seed
    again = flux.generate_images("a dog", num_steps=1, latent_size=(4, 4), seed=seed)
    assert mx.array_equal(picture, again)
    assert not mx.array_equal(picture, other)


def test_unpadded_prompts_are_shorter(checkpoint: Path) -> None:
    flux = FluxPipeline(str(checkpoint), t5_padding=False)
    tokens, _ = flux.tokenize("a dog")
    assert tokens.shape[1] < flux.checkpoint.defaults.t5_max_length
    image = flux.generate_images("a dog", num_steps=1, latent_size=(4, 4), seed=0)
    assert image.shape == (1, 32, 32, 3)


def test_low_memory_gives_the_same_picture(checkpoint: Path, flux: FluxPipeline) -> None:
    options: dict[str, Any] = {"num_steps": 2, "latent_size": (4, 4), "seed": 0}
    short = FluxPipeline(str(checkpoint), low_memory=True)
    expected = flux.generate_images("a dog", **options)
    for prompt in ("a dog", "a cat", "a dog"):  # loads its modulation weights again each time
        image = short.generate_images(prompt, **options)
        assert short.flow.modulation_released
    assert mx.array_equal(image, expected)


def test_a_cache_skips_steps_only_where_it_is_asked_for(flux: FluxPipeline) -> None:
    def paint(**more: Any) -> np.ndarray:
        options = {"num_steps": 8, "latent_size": (4, 6), "seed": 5, **more}
        return np.array(flux.generate_images("two dogs", **options))

    plain = paint()
    assert np.array_equal(plain, paint(cache=0.0))
    assert np.array_equal(plain, paint(cache=1e-9))  # a cache that skips nothing
    cached = paint(cache=0.7, n_images=2)
    assert not np.array_equal(plain, cached[:1])
    assert np.array_equal(cached[:1], paint(cache=0.7))  # image k shares no cache with another
    with pytest.raises(UsageError, match="`cache` is 2"):
        paint(cache=2.0)


def test_inpainting_keeps_what_the_mask_keeps(flux: FluxPipeline) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    mask = np.zeros((32, 48), np.uint8)
    mask[:, 24:] = 255
    source = SourceImage(pixels, 1.0, mask)
    image = flux.generate_images("a dog", num_steps=2, latent_size=(4, 6), seed=0, source=source)
    painted = np.round(np.array(image[0]) * 255).astype(np.uint8)
    assert np.array_equal(painted[:, :24], pixels[:, :24])
    assert not np.array_equal(painted[:, 24:], pixels[:, 24:])


@pytest.mark.parametrize("latent_size", [(3, 4), (0, 4), (4, -2)])
def test_odd_sizes_are_refused(flux: FluxPipeline, latent_size: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="even numbers"):
        next(flux.generate_latents("a dog", latent_size=latent_size))


@pytest.mark.parametrize(
    ("options", "name"),
    [({"n_images": 0}, "n_images"), ({"num_steps": 0}, "steps"), ({"seed": -1}, "seed")],
)
def test_numbers_out_of_range_are_refused(
    flux: FluxPipeline, options: dict[str, int], name: str
) -> None:
    with pytest.raises(UsageError, match=name):
        next(flux.generate_latents("a dog", latent_size=(4, 4), **options))


def test_an_unknown_dtype_or_number_of_bits_is_refused(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="float8.*choose bfloat16, float16, float32"):
        FluxPipeline(str(checkpoint), dtype="float8")
    with pytest.raises(UsageError, match="bits is 7"):
        FluxPipeline(str(checkpoint), bits=7)
