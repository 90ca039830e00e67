"""A picture to read with FLUX.1 Redux, models without and with it, where its files are cached."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from fluxmesh.models.flux1.config import ReduxConfig
from fluxmesh.planning.workload import ModelSizes
from tests.redux_checkpoint import SIGLIP as SMALL
from tests.unit.meshes import small

SIZES = ModelSizes(
    replace(
        small().architecture,
        transformer=replace(small().architecture.transformer, in_channels=64),  # from text
    )
)
SEEING = replace(SIZES.architecture, siglip=SMALL, redux=ReduxConfig(24, 32))
PICTURE = np.random.default_rng(1).integers(0, 256, (30, 44, 3), dtype=np.uint8)


def cached(cache: Path, repo: str) -> Path:
    """The folder of a snapshot that was fetched."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / "abcdef0123"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(snapshot.name)
    return snapshot
