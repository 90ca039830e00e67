"""FLUX.1 as a family: its published models, its folders and files. Pure, no mlx."""

from __future__ import annotations

from fluxmesh.models.files.family import APACHE, Family, Licence, MfluxFolder, PublishedModel
from fluxmesh.models.flux1.adapter_names import MARKS as ADAPTER_MARKS
from fluxmesh.models.flux1.architecture import Flux1Architecture, map_kind_of
from fluxmesh.models.flux1.config import (
    AutoencoderConfig,
    ClipConfig,
    FluxConfig,
    ReduxConfig,
    ScheduleConfig,
    SiglipConfig,
    T5Config,
    input_kind,
)
from fluxmesh.models.flux1.files import mflux_names
from fluxmesh.models.flux1.files.completion import SCHNELL, Flux1Files
from fluxmesh.models.flux1.files.folder import Flux1Folder, defaults_of, kontext_defaults
from fluxmesh.models.flux1.files.redux import redux
from fluxmesh.models.flux1.single_file import MFLUX_PART, clip_config_from

# Schnell's terms are Apache's too, and the Hub asks for an account all the same.
DEV_LICENCE = Licence("FLUX.1 [dev] Non-Commercial", is_commercial=False)
GIGABYTES = 33.7  # transformer 23.8, T5 9.5, CLIP and autoencoder 0.4, as on the Hub


def _published(
    repo: str,
    variable: str = "",
    *,
    guided: bool = True,
    in_channels: int = 64,
    is_kontext: bool = False,
) -> PublishedModel:
    architecture = _architecture(repo, guided, in_channels, is_kontext)
    return PublishedModel(
        repo,
        architecture,
        licence=DEV_LICENCE if guided else APACHE,
        gigabytes=GIGABYTES,
        is_gated=True,
        variable=variable,
    )


def _architecture(
    repo: str, guided: bool = True, in_channels: int = 64, is_kontext: bool = False
) -> Flux1Architecture:
    transformer = FluxConfig(in_channels=in_channels, guidance_embed=guided)
    kind = input_kind(transformer, AutoencoderConfig()) or "text"
    follows = map_kind_of(repo) if kind == "control" else None
    length = 512 if guided else 256
    return Flux1Architecture(
        transformer,
        T5Config(),
        ClipConfig(),
        AutoencoderConfig(),
        kontext_defaults(length) if is_kontext else defaults_of(kind, transformer, length, follows),
        ScheduleConfig(use_dynamic_shifting=guided),
        is_kontext,
        follows=follows,
    )


DEV = "black-forest-labs/FLUX.1-dev"

FLUX1 = Family(
    name="FLUX.1",
    parts=(
        Flux1Architecture,
        *(FluxConfig, T5Config, ClipConfig, AutoencoderConfig, ScheduleConfig),
        *(SiglipConfig, ReduxConfig),
    ),
    runtime="fluxmesh.models.flux1.runtime:Flux1Runtime",
    published={
        "schnell": _published(SCHNELL, "FLUX_SCHNELL", guided=False),
        "dev": _published(DEV, "FLUX_DEV", guided=True),
        "krea-dev": _published("black-forest-labs/FLUX.1-Krea-dev", guided=True),
        "kontext": _published("black-forest-labs/FLUX.1-Kontext-dev", is_kontext=True),
        "fill": _published("black-forest-labs/FLUX.1-Fill-dev", in_channels=384),
        "canny": _published("black-forest-labs/FLUX.1-Canny-dev", in_channels=128),
        "depth": _published("black-forest-labs/FLUX.1-Depth-dev", in_channels=128),
    },
    folder=Flux1Folder(),
    files=Flux1Files(),
    adapter_marks=ADAPTER_MARKS,
    shares_adapter_marks=True,
    mflux=MfluxFolder(
        part=MFLUX_PART,
        configs={
            "transformer": ("FLUX.1 transformer", "", mflux_names.flux_config_of),
            "text_encoder": ("CLIP text encoder", "text_model.", clip_config_from),
            "text_encoder_2": ("T5 encoder", "", mflux_names.t5_config_of),
            "vae": ("FLUX.1 autoencoder", "", mflux_names.autoencoder_config_of),
        },
        renamed=mflux_names.in_mflux_folder,
        left_out=mflux_names.LEFT_OUT,
    ),
    embedded={"tiny": "checkpoint"},
    reader=redux(_architecture(DEV), DEV_LICENCE),
)
