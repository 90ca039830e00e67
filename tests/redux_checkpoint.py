"""A random tiny FLUX.1 Redux, written with NumPy alone, in each form in which people have it.

Beside `checkpoints.py`, whose T5 is as wide as what comes out of it. Biases and norms are not zero.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from fluxmesh.models.flux1 import tensor_maps
from fluxmesh.models.flux1.config import ReduxConfig, SiglipConfig
from tests.checkpoints import T5, Arrays, random_arrays, write_json, write_safetensors

SIGLIP = SiglipConfig(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=30,  # two whole squares along a side, and two pixels that are cut
    patch_size=14,
)
REDUX = ReduxConfig(SIGLIP.hidden_size, T5.d_model)
Form = Literal["folder", "bfl", "comfy"]


def redux_arrays(seed: int, siglip: SiglipConfig = SIGLIP) -> tuple[Arrays, Arrays]:
    """SigLIP's numbers and the embedder's, by the names that each has in a folder."""
    rng = np.random.default_rng([seed, 7])
    embedder = ReduxConfig(siglip.hidden_size, REDUX.txt_in_features)
    seen = random_arrays(tensor_maps.siglip_tensors(siglip), rng)
    # of the head that pools: it is in every file, and not read
    seen["head.probe"] = np.ones((1, 1, siglip.hidden_size), np.float32)
    return seen, random_arrays(tensor_maps.redux_tensors(embedder), rng)


def make_redux(
    folder: Path, form: Form = "folder", seed: int = 0, siglip: SiglipConfig = SIGLIP
) -> Path:
    """Writes one, and returns what a user would name: the folder, or the embedder's file.

    "folder" is its repository's; "bfl" has `flux1-redux-dev.safetensors` beside `image_encoder/`;
    "comfy" is ComfyUI's folder of models, in which SigLIP has no config.
    """
    seen, embedder = redux_arrays(seed, siglip)
    old = {f"vision_model.{name}": array for name, array in seen.items()}
    if form == "comfy":
        write_safetensors(folder / "clip_vision" / "sigclip_vision_patch14_384.safetensors", old)
        return _written(folder / "style_models" / "flux1-redux-dev.safetensors", embedder)
    write_safetensors(folder / "image_encoder" / "model.safetensors", old)
    write_json(folder / "image_encoder" / "config.json", siglip_json(siglip))
    if form == "bfl":
        return _written(folder / "flux1-redux-dev.safetensors", embedder)
    weights = folder / "image_embedder" / "diffusion_pytorch_model.safetensors"
    _written(weights, embedder)
    sizes = {"redux_dim": siglip.hidden_size, "txt_in_features": REDUX.txt_in_features}
    write_json(weights.parent / "config.json", {"_class_name": "ReduxImageEncoder", **sizes})
    write_json(folder / "model_index.json", {"_class_name": "FluxPriorReduxPipeline"})
    return folder


def siglip_json(config: SiglipConfig) -> dict[str, object]:
    """As transformers writes it: what is as by itself is left out."""
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": config.hidden_size,
        "image_size": config.image_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "patch_size": config.patch_size,
    }


def _written(path: Path, arrays: Arrays) -> Path:
    write_safetensors(path, arrays)
    return path
