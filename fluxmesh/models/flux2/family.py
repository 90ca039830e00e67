"""FLUX.2 as a family: its published models, its folders and files. Pure, no mlx."""

from __future__ import annotations

from fluxmesh.models.files.family import APACHE, Family, Licence, PublishedModel
from fluxmesh.models.flux2.adapter_names import MARKS as ADAPTER_MARKS
from fluxmesh.models.flux2.architecture import Flux2Architecture
from fluxmesh.models.flux2.config import (
    DEV,
    KLEIN_4B,
    KLEIN_9B,
    STATES,
    Flux2AutoencoderConfig,
    Flux2Config,
    Flux2Schedule,
    TextEncoderConfig,
)
from fluxmesh.models.flux2.files.completion import Flux2Files
from fluxmesh.models.flux2.files.folder import Flux2Folder, defaults_of

NON_COMMERCIAL = Licence("FLUX Non-Commercial", is_commercial=False)


def _published(
    repo: str,
    *,
    transformer: Flux2Config,
    text: TextEncoderConfig,
    gigabytes: float,
    licence: Licence = NON_COMMERCIAL,
    distilled: bool = False,
    also: tuple[str, ...] = (),
    remembers_references: bool = False,
) -> PublishedModel:
    architecture = Flux2Architecture(
        transformer,
        text,
        Flux2AutoencoderConfig(),
        defaults_of(transformer, distilled),
        is_distilled=distilled,
        remembers_references=remembers_references,
    )
    return PublishedModel(
        f"black-forest-labs/{repo}",
        architecture,
        licence=licence,
        gigabytes=gigabytes,
        is_gated=licence is NON_COMMERCIAL,
        also=also,
    )


_QWEN_4B = TextEncoderConfig()
_QWEN_8B = TextEncoderConfig(hidden_size=4096, intermediate_size=12288)
_MISTRAL = TextEncoderConfig(
    vocab_size=131072,
    hidden_size=5120,
    intermediate_size=32768,
    rms_norm_eps=1e-5,
    rope_theta=1e9,
    qk_norm=False,
    states=STATES["mistral3"],
)

FLUX2 = Family(
    name="FLUX.2",
    parts=(
        Flux2Architecture,
        *(Flux2Config, TextEncoderConfig, Flux2AutoencoderConfig, Flux2Schedule),
    ),
    runtime="fluxmesh.models.flux2.runtime:Flux2Runtime",
    # Gigabytes on the Hub: a transformer, a text encoder with all of its layers, an autoencoder.
    published={
        "klein-4b": _published(
            "FLUX.2-klein-4B",
            transformer=KLEIN_4B,
            text=_QWEN_4B,
            gigabytes=16.0,
            licence=APACHE,
            distilled=True,
            also=("klein",),
        ),
        "klein-9b": _published(
            "FLUX.2-klein-9B",
            transformer=KLEIN_9B,
            text=_QWEN_8B,
            gigabytes=34.7,
            distilled=True,
        ),
        "klein-9b-kv": _published(
            "FLUX.2-klein-9b-kv",
            transformer=KLEIN_9B,
            text=_QWEN_8B,
            gigabytes=34.7,
            distilled=True,
            remembers_references=True,
        ),
        "klein-base-4b": _published(
            "FLUX.2-klein-base-4B",
            transformer=KLEIN_4B,
            text=_QWEN_4B,
            gigabytes=16.0,
            licence=APACHE,
            also=("klein-base",),
        ),
        "klein-base-9b": _published(
            "FLUX.2-klein-base-9B", transformer=KLEIN_9B, text=_QWEN_8B, gigabytes=34.7
        ),
        "flux2-dev": _published("FLUX.2-dev", transformer=DEV, text=_MISTRAL, gigabytes=112.6),
    },
    folder=Flux2Folder(),
    files=Flux2Files(),
    adapter_marks=ADAPTER_MARKS,
    embedded={"tiny-klein": "klein"},
)
