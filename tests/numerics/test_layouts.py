"""One model in every file layout that fluxmesh reads paints one picture, to the byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fluxmesh import FluxPipeline
from fluxmesh.adapters.changes import LowRank
from fluxmesh.weights import hub
from fluxmesh.weights.quantize import quantize_checkpoint
from tests import flux1_adapters as lora
from tests.checkpoints import make_checkpoint


def picture(path: Path | str, **options) -> np.ndarray:
    """Two steps at 32 by 48 pixels."""
    flux = FluxPipeline(str(path), **options)
    return np.array(
        flux.generate_images("a red dog", num_steps=2, latent_size=(4, 6), seed=3), dtype=np.float32
    )


@pytest.mark.parametrize("guidance", [False, True])
def test_all_layouts_paint_the_same_picture(tmp_path, guidance):
    pictures = []
    for name, options in (
        ("diffusers", {}),
        ("sharded", {"shards": 3}),
        ("bfl", {"layout": "bfl"}),
    ):
        made = make_checkpoint(tmp_path / name, seed=4, guidance=guidance, **options)
        pictures.append(picture(made.path))
    assert pictures[0].std() > 0.01
    for other in pictures[1:]:
        np.testing.assert_array_equal(other, pictures[0])


def test_a_quantized_folder_paints_what_quantizing_on_the_way_paints(tmp_path):
    made = make_checkpoint(tmp_path / "plain", seed=4)
    quantize_checkpoint(hub.resolve(str(made.path)), tmp_path / "small", 4)
    quantized = picture(tmp_path / "small")
    np.testing.assert_array_equal(quantized, picture(made.path, bits=4))
    assert np.abs(quantized - picture(made.path)).max() > 0


def test_an_adapter_of_every_format_paints_the_same_picture(tmp_path):
    made = make_checkpoint(tmp_path / "plain", seed=4)
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((4, 64)), rng.standard_normal((64, 4))
    adapter = {
        "double_blocks.0.img_attn.proj": LowRank(a.astype(np.float32), b.astype(np.float32), 0.1),
        "img_in": LowRank(b.T.astype(np.float32), a.T.astype(np.float32), 0.1),
    }
    plain = picture(made.path)
    pictures = []
    for file_format in lora.FORMATS:
        path = tmp_path / f"{file_format}.safetensors"
        lora.write_adapter(path, adapter, made.transformer, file_format)
        pictures.append(picture(made.path, adapters=[str(path)]))
    assert np.abs(pictures[0] - plain).max() > 0.01
    for other in pictures[1:]:
        np.testing.assert_array_equal(other, pictures[0])
