"""Models that adapters are read for, a small FLUX.1 above all: its modules as (component, name,
out, in)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from fluxmesh.adapters.reading import AdapterFile, open_adapter
from fluxmesh.adapters.targets import AdapterTargets
from fluxmesh.errors import AdapterError
from fluxmesh.models.flux1.adapter_names import components
from fluxmesh.models.flux2.adapter_names import components as flux2_components
from fluxmesh.models.flux2.config import KLEIN_4B
from tests import checkpoints
from tests.adapter_files import normal, write

CONFIG = dataclasses.replace(checkpoints.TRANSFORMER, guidance_embed=True)
CLIP = dataclasses.replace(checkpoints.CLIP, vocab_size=64)
TARGETS = AdapterTargets(components(CONFIG, CLIP, checkpoints.T5))
FLUX2_4B = AdapterTargets(flux2_components(KLEIN_4B), "FLUX.2")
D, MLP, TEXT = 64, 256, 32
CLIP_FC1 = ("text_encoder", "encoder.layers.1.mlp.fc1", 64, TEXT)
IMG_QKV = ("transformer", "double_blocks.1.img_attn.qkv", 3 * D, D)


def pair(out: int, into: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return normal(rng, 4, into), normal(rng, out, 4)


def opened(path: Path, targets: AdapterTargets = TARGETS) -> AdapterFile:
    return open_adapter(path, targets)


def refusal(path: Path, arrays: dict[str, np.ndarray], **how) -> str:
    write(path, arrays, **how)
    with pytest.raises(AdapterError) as caught:
        opened(path).check_values()
    text = str(caught.value)
    assert str(path) in text and "\n" not in text and text.endswith(".")
    return text
