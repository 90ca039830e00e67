"""A random tiny checkpoint of Patchwork, written with NumPy alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.checkpoints import random_arrays, write_json, write_safetensors
from tests.third_family.architecture import PatchworkArchitecture
from tests.third_family.family import PatchworkFolder


def make_patchwork(folder: Path, seed: int = 0) -> Path:
    """Writes it under `folder`, float32, and returns that."""
    model, form = PatchworkArchitecture(), PatchworkFolder()
    for i, part in enumerate(form.components):
        arrays = random_arrays(model.tensors_in(part), np.random.default_rng([seed, i]))
        write_safetensors(folder / part / "model.safetensors", arrays)
        write_json(folder / part / "config.json", form.config(model, part))
    write_json(folder / "scheduler" / "scheduler_config.json", {"shift": model.schedule.shift})
    write_json(folder / "model_index.json", dict(form.index(model)))
    return folder
