"""What a checkpoint on this machine is: which files, which sizes, which defaults. Imports no mlx.

Three kinds are understood: a diffusers folder, BFL's single files, and fluxmesh's own quantized
folder (a diffusers folder whose weights carry fluxmesh's names, with a `fluxmesh.json`).
`hub.py` turns the name that a user gives into one of these; `loading.py` reads them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

from fluxmesh.errors import ModelNotFoundError, WeightsError
from fluxmesh.models.flux1.config import (
    AutoencoderConfig,
    ClipConfig,
    FluxConfig,
    ScheduleConfig,
    T5Config,
)
from fluxmesh.models.flux1.single_file import autoencoder_config_of, flux_config_of
from fluxmesh.storage import apple_double
from fluxmesh.storage.safetensors import read_index, read_json

COMPONENTS = ("transformer", "text_encoder", "text_encoder_2", "vae")
FORMAT = 1  # of a quantized folder's fluxmesh.json
MANIFEST = "fluxmesh.json"

T = TypeVar("T")


@dataclass(frozen=True)
class ModelDefaults:
    """What a request takes where the user says nothing."""

    steps: int
    guidance: float
    height: int  # pixels
    width: int  # pixels
    t5_max_length: int  # tokens that a prompt is padded and cut to


@dataclass(frozen=True)
class Quantization:
    """How a quantized folder's linears are stored."""

    bits: int


@dataclass(frozen=True)
class Component:
    """One model's weight files and the names that its tensors have in them."""

    files: tuple[Path, ...]
    layout: str  # "diffusers" (and transformers), "bfl", or "fluxmesh" for a quantized folder

    @property
    def nbytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


@dataclass(frozen=True)
class Checkpoint:
    """A whole model that lies on this machine."""

    name: str  # as the user may say it again: an alias, a Hub id or a path
    revision: str  # the Hub's commit, or `local-` and a fingerprint of the files
    kind: str  # "diffusers", "bfl" or "quantized"
    components: Mapping[str, Component]  # by the names in COMPONENTS
    tokenizer: Path  # folder with CLIP's vocab.json and merges.txt
    tokenizer_2: Path  # folder with T5's spiece.model
    transformer: FluxConfig
    t5: T5Config
    clip: ClipConfig
    autoencoder: AutoencoderConfig
    schedule: ScheduleConfig
    defaults: ModelDefaults
    quantization: Quantization | None = None

    @property
    def bits(self) -> int | None:
        return self.quantization.bits if self.quantization else None

    @cached_property
    def content(self) -> str:
        """16 hex digits, the same wherever this model lies, in the Hub's cache or in a folder.

        Two hosts with the same content paint the same pictures: it covers the weights (sampled as
        in `fingerprint`), the tokenizers, and all that the JSON files tell.
        """
        digest = hashlib.sha256()
        for part in COMPONENTS:
            component = self.components[part]
            digest.update(f"{part} {component.layout}\n".encode())
            for file in sorted(component.files):
                _sample(digest, file)
        for file in (
            *(self.tokenizer / name for name in ("vocab.json", "merges.txt")),
            self.tokenizer_2 / "spiece.model",
        ):
            _sample(digest, file)
        configs = (self.transformer, self.t5, self.clip, self.autoencoder, self.schedule)
        digest.update(repr((*configs, self.defaults.t5_max_length, self.bits)).encode())
        return digest.hexdigest()[:16]


def from_folder(folder: Path, name: str, revision: str | None = None) -> Checkpoint:
    """A diffusers folder, or fluxmesh's quantized one.

    Raises `ModelNotFoundError` for a folder that lacks a part, `WeightsError` for a broken one.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise ModelNotFoundError(
            f"{folder} holds no model_index.json, so it is no diffusers folder; name a folder "
            "that has one, or a single .safetensors file."
        )
    pipeline = str(read_json(index).get("_class_name"))
    if not pipeline.startswith("Flux") or pipeline.startswith("Flux2"):
        raise ModelNotFoundError(f"{folder} holds a {pipeline}; fluxmesh runs FLUX.1 only.")
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    quantization = _quantization(folder, manifest)
    layout = "fluxmesh" if quantization else "diffusers"
    transformer = _config(folder / "transformer" / "config.json", FluxConfig.from_dict)
    autoencoder = _config(folder / "vae" / "config.json", AutoencoderConfig.from_dict)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    _check_is_text_to_image(transformer, autoencoder, folder)
    components = {part: Component(weight_files(folder / part), layout) for part in COMPONENTS}
    tokenizers = _tokenizer_folders(folder)
    if revision is None:
        revision = fingerprint(
            [*_parts(components), *apple_double.without(folder.glob("*/*.json"))]
        )
    return Checkpoint(
        name=name,
        revision=revision,
        kind="quantized" if quantization else "diffusers",
        components=components,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        transformer=transformer,
        t5=_config(folder / "text_encoder_2" / "config.json", T5Config.from_dict),
        clip=_config(folder / "text_encoder" / "config.json", ClipConfig.from_dict),
        autoencoder=autoencoder,
        schedule=_config(scheduler, ScheduleConfig.from_dict),
        defaults=_defaults(transformer, tokenizers[1], manifest),
        quantization=quantization,
    )


def from_single_files(
    transformer: Path,
    autoencoder: Path | None,
    text: Path,
    name: str,
    revision: str | None = None,
) -> Checkpoint:
    """BFL's files, with `text` the folder whose text encoders and tokenizers serve them.

    Without an `autoencoder` file, the `vae/` of that folder serves too.

    Sizes are read from the tensors' shapes. What shapes do not tell is BFL's own: a head's
    channels go 1/8, 7/16 and 7/16 to the three axes, the autoencoder norms in 32 groups, and a
    model with a guidance embedding shifts its time steps by the image's length.
    """
    flux = flux_config_of(transformer)
    ae = (
        autoencoder_config_of(autoencoder)
        if autoencoder
        else _config(text / "vae" / "config.json", AutoencoderConfig.from_dict)
    )
    _check_is_text_to_image(flux, ae, transformer)
    components = {
        "transformer": Component((transformer,), "bfl"),
        "text_encoder": Component(weight_files(text / "text_encoder"), "diffusers"),
        "text_encoder_2": Component(weight_files(text / "text_encoder_2"), "diffusers"),
        "vae": (
            Component((autoencoder,), "bfl")
            if autoencoder
            else Component(weight_files(text / "vae"), "diffusers")
        ),
    }
    tokenizers = _tokenizer_folders(text)
    return Checkpoint(
        name=name,
        revision=revision or fingerprint(_parts(components)),
        kind="bfl",
        components=components,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        transformer=flux,
        t5=_config(text / "text_encoder_2" / "config.json", T5Config.from_dict),
        clip=_config(text / "text_encoder" / "config.json", ClipConfig.from_dict),
        autoencoder=ae,
        schedule=ScheduleConfig(use_dynamic_shifting=flux.guidance_embed),
        defaults=_defaults(flux, tokenizers[1], {}),
    )


def has_text_encoders(folder: Path) -> bool:
    """Whether a folder has the text encoders and tokenizers that single files lack."""
    needed = ("text_encoder/config.json", "text_encoder_2/config.json", "tokenizer/vocab.json")
    return all((folder / path).is_file() for path in (*needed, "tokenizer_2/spiece.model"))


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a component's folder: those of its index, or the only one."""
    for stem in ("diffusion_pytorch_model", "model"):
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            return read_index(index)
        if (folder / f"{stem}.safetensors").is_file():
            return (folder / f"{stem}.safetensors",)
    raise ModelNotFoundError(
        f"{folder} holds no weights (model.safetensors or its index); complete the checkpoint "
        "with `fluxmesh models pull`, or name another."
    )


def _tokenizer_folders(folder: Path) -> tuple[Path, Path]:
    for path in ("tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer_2/spiece.model"):
        if not (folder / path).is_file():
            raise ModelNotFoundError(
                f"{folder / path} is missing; complete the checkpoint with `fluxmesh models pull`."
            )
    return folder / "tokenizer", folder / "tokenizer_2"


def _parts(components: Mapping[str, Component]) -> list[Path]:
    return [file for part in COMPONENTS for file in components[part].files]


def _config(path: Path, read: Callable[[Mapping[str, Any]], T]) -> T:
    if not path.is_file():
        raise ModelNotFoundError(
            f"{path} is missing; complete the checkpoint with `fluxmesh models pull`."
        )
    values = read_json(path)
    try:
        config = read(values)
    except KeyError as error:
        raise WeightsError(f"{path} lacks {error.args[0]!r}; download it again.") from error
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{path} has a value of the wrong type; download it again.") from error
    for field, kind in get_type_hints(type(config)).items():
        value = getattr(config, field)
        if not _is_of(kind, value):
            raise WeightsError(
                f"{path} gives {field} the value {str(value)[:40]!r}, which is of the wrong type; "
                "download it again."
            )
    return config


def _is_of(kind: Any, value: Any) -> bool:
    """Whether a value out of a JSON file has the type that the config's field declares."""
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(type(item) is int for item in value)
    if kind is float:
        return type(value) in (int, float) and abs(value) < 1e30  # false for nan and infinity
    return type(value) is kind  # not isinstance: True is no number of layers


def _quantization(folder: Path, manifest: Mapping[str, Any]) -> Quantization | None:
    entry = manifest.get("quantization")
    if entry is None:
        return None
    if manifest.get("format") != FORMAT or not isinstance(entry, dict):
        raise WeightsError(
            f"{folder / MANIFEST} has format {manifest.get('format')!r}, not {FORMAT}; quantize "
            "the model again with this version of fluxmesh."
        )
    bits = entry.get("bits")
    if bits not in (3, 4, 5, 6, 8):
        raise WeightsError(f"{folder / MANIFEST} says {bits!r} bits; quantize the model again.")
    return Quantization(bits)


def _check_is_text_to_image(flux: FluxConfig, ae: AutoencoderConfig, where: Path) -> None:
    """Fill, Canny and Depth take a picture beside the latents, which fluxmesh doesn't give."""
    latents = 4 * ae.z_channels  # a token covers two by two of them
    if flux.in_channels != latents:
        raise WeightsError(
            f"The transformer of {where} takes {flux.in_channels} channels where text-to-image "
            f"takes {latents}; fluxmesh runs FLUX.1 schnell, dev and models shaped like them."
        )


def _defaults(flux: FluxConfig, tokenizer_2: Path, manifest: Mapping[str, Any]) -> ModelDefaults:
    guided = flux.guidance_embed
    values: dict[str, Any] = {"steps": 50 if guided else 4, "guidance": 4.0}
    values |= {"height": 512, "width": 512}
    declared = manifest.get("defaults")
    if isinstance(declared, dict):
        kinds = get_type_hints(ModelDefaults)
        values |= {key: declared[key] for key in values if _is_of(kinds[key], declared.get(key))}
    return ModelDefaults(**values, t5_max_length=_t5_max_length(tokenizer_2, guided))


def _t5_max_length(tokenizer_2: Path, guided: bool) -> int:
    """What the tokenizer declares; models without guidance (schnell) saw 256 at most."""
    path = tokenizer_2 / "tokenizer_config.json"
    declared = read_json(path).get("model_max_length") if path.is_file() else None
    length = declared if isinstance(declared, int) and 0 < declared <= 4096 else 512
    return length if guided else min(length, 256)


def fingerprint(files: Iterable[Path]) -> str:
    """`local-` and 16 hex digits of the files' sizes and samples of their bytes.

    A 24 GB file takes a minute to hash whole; 64 places of 4 KiB tell any two trainings apart.
    """
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.name}:".encode())
        _sample(digest, path)
    return f"local-{digest.hexdigest()[:16]}"


def _sample(digest: hashlib._Hash, path: Path) -> None:
    """Adds a file's size and 64 places of its bytes."""
    size = os.path.getsize(path)
    digest.update(f"{size}\n".encode())
    with open(path, "rb") as file:
        for place in range(0, size, max(size // 64, 4096)):
            file.seek(place)
            digest.update(file.read(4096))
