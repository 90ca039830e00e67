"""FLUX.1 Redux: what its files are, and what is known of it before any is read. Imports no mlx.

Behind `models/files/family.py`. People have it as its repository's folders, `image_encoder/`
(SigLIP) and `image_embedder/`; as BFL's `flux1-redux-dev.safetensors` beside a SigLIP; or as
ComfyUI's `style_models/flux1-redux-dev.safetensors` and
`clip_vision/sigclip_vision_patch14_384.safetensors`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fluxmesh.errors import WeightsError
from fluxmesh.models.files.family import Licence, PublishedModel, ReaderPart, ReferenceReader
from fluxmesh.models.files.kinds import FileContents
from fluxmesh.models.flux1.architecture import Flux1Architecture
from fluxmesh.models.flux1.config import ReduxConfig, SiglipConfig

REPO = "black-forest-labs/FLUX.1-Redux-dev"
SIGLIP = "google/siglip-so400m-patch14-384"
GIGABYTES = 1.0  # SigLIP 0.86, the embedder 0.13, as on the Hub


def siglip_sizes(file: FileContents, prefix: str) -> SiglipConfig:
    """Sizes of SigLIP's picture encoder in a file without a config: those of so400m-patch14-384.

    Raises `WeightsError` for others: no shape tells their heads, nor how large a picture is.
    """
    shapes = {key.removeprefix(prefix): shape for key, shape in file.shapes.items()}
    known = SiglipConfig()
    width, _, patch, _ = shapes["embeddings.patch_embedding.weight"]
    layers = 0
    while f"encoder.layers.{layers}.mlp.fc1.weight" in shapes:
        layers += 1
    first = shapes.get("encoder.layers.0.mlp.fc1.weight", (0, 0))
    sizes = dataclasses.replace(
        known,
        hidden_size=width,
        intermediate_size=first[0],
        num_hidden_layers=layers,
        patch_size=patch,
    )
    positions = shapes["embeddings.position_embedding.weight"][0]
    if sizes != known or positions != known.rows**2:
        raise WeightsError(
            f"{file.path} is not the SigLIP with which FLUX.1 Redux sees (so400m-patch14-384); put "
            "the folder image_encoder of its repository in its place."
        )
    return sizes


def redux_sizes(file: FileContents, prefix: str) -> ReduxConfig:
    """Sizes of the embedder in a file, by its tensors' shapes."""
    width = file.shapes[f"{prefix}redux_up.weight"][1]
    return ReduxConfig(width, file.shapes[f"{prefix}redux_down.weight"][0])


PARTS: Mapping[str, ReaderPart] = {
    "image_embedder": ReaderPart(
        "the embedder",
        "flux1-redux-dev.safetensors",
        ("redux_up.weight", "redux_down.weight"),
        ReduxConfig.from_dict,
        redux_sizes,
        ("style_models",),
    ),
    "image_encoder": ReaderPart(
        "the picture encoder",
        "its folder image_encoder, or sigclip_vision_patch14_384.safetensors",
        (
            "embeddings.patch_embedding.bias",  # which CLIP's has none of
            "embeddings.position_embedding.weight",
            "post_layernorm.weight",
        ),
        SiglipConfig.from_dict,
        siglip_sizes,
        ("clip_vision",),
        (SIGLIP,),
    ),
}


def redux(base: Flux1Architecture, licence: Licence) -> ReferenceReader:
    """FLUX.1 Redux; `base` is a model that reads with it."""

    def architecture(configs: Mapping[str, Any]) -> Flux1Architecture:
        return dataclasses.replace(
            base, siglip=configs["image_encoder"], redux=configs["image_embedder"]
        )

    sizes = {"image_encoder": SiglipConfig(), "image_embedder": ReduxConfig()}
    return ReferenceReader(
        name="FLUX.1 Redux",
        alias="redux",
        pipeline="FluxPriorReduxPipeline",
        published=PublishedModel(
            REPO, architecture(sizes), licence=licence, gigabytes=GIGABYTES, is_gated=True
        ),
        parts=PARTS,
        architecture=architecture,
    )
