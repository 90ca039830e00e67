"""Every layout of the same numbers paints the same picture, to the last bit."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from fluxmesh.adapters.fuse import fuse_checkpoint
from fluxmesh.engine.pipeline import FluxPipeline
from fluxmesh.storage import bfloat16
from fluxmesh.storage.safetensors import read_header, read_tensor
from fluxmesh.weights import hub
from fluxmesh.weights.hub import tiny_folder
from fluxmesh.weights.quantize import quantize_checkpoint
from fluxmesh.weights.reader import ComponentReader
from tests.wild_layouts import LAYOUTS, mflux, original

PROMPT = "a red apple on a yellow background, naïve café"
SIZE = (8, 8)  # latents: a picture of 64x64


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No FLUX on this machine but the package's, and nobody to fetch from."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for variable in ("AE", "FLUX_DEV", "FLUX_SCHNELL"):
        monkeypatch.delenv(variable, raising=False)


def painted(name: Path) -> np.ndarray:
    pipeline = FluxPipeline(str(name), download=False)
    steps = pipeline.generate_latents(PROMPT, num_steps=2, seed=7, latent_size=SIZE)
    for latents in steps:
        mx.eval(latents)
    return np.array(pipeline.decode(latents, latent_size=SIZE).astype(mx.float32))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    return painted(original(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_paints_what_its_folder_paints(
    layout: str, tmp_path: Path, expected: np.ndarray
) -> None:
    named = LAYOUTS[layout](tmp_path / "model")
    np.testing.assert_array_equal(painted(named), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_that_mflux_quantized_has_the_numbers_of_its_scales(
    bits: int, tmp_path: Path, expected: np.ndarray
) -> None:
    checkpoint = hub.resolve(str(mflux(tmp_path / "model", bits)), download=False)
    assert (checkpoint.kind, checkpoint.bits) == ("mflux", bits)
    (file,) = (tiny_folder() / "text_encoder_2").glob("*.safetensors")
    shared = bfloat16.to_float32(read_tensor(read_header(file).entries["shared.weight"]))
    packed = mx.quantize(mx.array(shared).astype(mx.bfloat16), group_size=64, bits=bits)
    whole = mx.dequantize(packed[0], *(p.astype(mx.float32) for p in packed[1:]), 64, bits)
    rows = ComponentReader(checkpoint, "text_encoder_2").rows("shared.weight", dtype="F32")
    np.testing.assert_allclose(rows.values, np.array(whole), atol=1e-6)
    picture = painted(tmp_path / "model")
    assert picture.shape == expected.shape and np.isfinite(picture).all()
    if bits == 8:
        assert np.abs(picture - expected).mean() < 0.03


@pytest.mark.parametrize("layout", ["a variant in shards", "all in one file"])
def test_a_layout_can_be_fused_into(layout: str, tmp_path: Path, expected: np.ndarray) -> None:
    """What is written is a folder of diffusers, whole, whatever it was written from."""
    source = hub.resolve(str(LAYOUTS[layout](tmp_path / "model")), download=False)
    fuse_checkpoint(source, tmp_path / "fused", [])
    np.testing.assert_array_equal(painted(tmp_path / "fused"), expected)


def test_a_folder_with_a_tokenizer_json_can_be_quantized(
    tmp_path: Path, expected: np.ndarray
) -> None:
    source = hub.resolve(str(LAYOUTS["tokenizer.json alone"](tmp_path / "model")), download=False)
    quantize_checkpoint(source, tmp_path / "small", 8)
    assert np.abs(painted(tmp_path / "small") - expected).mean() < 0.03


def test_the_pictures_are_no_single_colour(expected: np.ndarray) -> None:
    assert expected.std() > 0.01
