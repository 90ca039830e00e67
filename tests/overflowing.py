"""Checkpoints whose files hold finite numbers alone, and whose models give NaN or infinity."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.checkpoints import TRANSFORMER, make_checkpoint
from tests.flux1_adapters import LowRank, write_adapter
from tests.numerics.loading import FILES, rewrite

LARGE = 3e38  # the largest number of float32 is 3.4e38
# Where it arises -> (the file, the tensor whose numbers become large)
PLACES = {
    "step": ("transformer", "transformer_blocks.0.ff.net.2.weight"),
    "value": ("transformer", "transformer_blocks.0.attn.to_v.weight"),
    "T5": ("text_encoder_2", "encoder.final_layer_norm.weight"),
    "CLIP": ("text_encoder", "final_layer_norm.weight"),
    "encoder": ("vae", "encoder.conv_out.weight"),
    "decoder": ("vae", "decoder.conv_out.weight"),
}


def overflowing(folder: Path, place: str, large: float = LARGE) -> Path:
    """A checkpoint that overflows at one of `PLACES`: in every dtype, or with a smaller `large` in
    the narrow ones alone."""
    component, key = PLACES[place]
    made = make_checkpoint(folder)

    def grow(arrays: dict[str, np.ndarray]) -> None:
        arrays[key] = np.where(arrays[key] < 0, -large, large).astype(np.float32)

    rewrite(made.folder / FILES[component], grow)
    return made.path


def write_lora(path: Path, size: float, module: str = "double_blocks.0.img_mlp.0") -> Path:
    """An adapter of rank 2 for the checkpoints of the tests, all of whose numbers are `size`."""
    hidden, mlp = TRANSFORMER.hidden_size, TRANSFORMER.mlp_hidden_dim
    low = LowRank(
        np.full((2, hidden), size, np.float32), np.full((mlp, 2), size, np.float32), scale=1.0
    )
    write_adapter(path, {module: low}, TRANSFORMER)
    return path
