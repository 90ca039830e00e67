"""What a checkpoint on this machine is: which files, which sizes, which defaults. Imports no mlx.

A folder is diffusers', or fluxmesh's own quantized one (a diffusers folder whose weights carry
fluxmesh's names, with a `fluxmesh.json`); `folder_files.py` knows what it must hold, and
`single_files.py` makes a checkpoint of files that are no folder. `hub.py` turns the name that a
user gives into one of these; `loading.py` reads them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_type_hints

from fluxmesh.errors import IncompleteModelError, ModelNotFoundError, UsageError, WeightsError
from fluxmesh.models.base import Architecture, ModelDefaults
from fluxmesh.models.files.family import Family, FolderDescription
from fluxmesh.models.registry import FAMILIES, NAMES, READERS, family_of
from fluxmesh.request import BITS
from fluxmesh.storage import apple_double
from fluxmesh.storage.file_stamps import FileStamps
from fluxmesh.storage.numbers import affine
from fluxmesh.storage.safetensors import read_index, read_json
from fluxmesh.storage.tensor_files import read_headers
from fluxmesh.weights.configs import config_in, is_of, schedule_in
from fluxmesh.weights.folder_files import (
    INDEX,
    MANIFEST,
    files_of,
    vocabulary_in,
    weight_names,
)

__all__ = ["MANIFEST", "Checkpoint", "Component", "ModelDefaults", "from_folder"]

FORMAT = 1  # of a quantized folder's fluxmesh.json
LOOKS = 4  # at files that are being changed, before their reader is told so


@dataclass(frozen=True)
class Quantization:
    """How a quantized folder's linears are stored."""

    bits: int
    text_bits: int | None = None  # of the text encoders, where those have others


@dataclass(frozen=True)
class Component:
    """One model's weight files and the names that its tensors have in them."""

    files: tuple[Path, ...]
    layout: str  # whose names: "diffusers" (and transformers), "bfl", "mflux" or "fluxmesh"
    prefix: str = ""  # before the names, in a file that holds other models too

    @property
    def nbytes(self) -> int:
        """Bytes of the files; of one that holds other models too, those of this one's tensors."""
        if not self.prefix:
            return sum(file.stat().st_size for file in self.files)
        entries = read_headers(self.files).entries
        return sum(entry.nbytes for key, entry in entries.items() if key.startswith(self.prefix))


@dataclass(frozen=True)
class Checkpoint:
    """A whole model that lies on this machine."""

    name: str  # as the user may say it again: an alias, a Hub id or a path
    revision: str  # the Hub's commit, or `local-` and a fingerprint of the files
    kind: str  # "diffusers", "bfl" (single files), "mflux", "quantized" or "reader"
    components: Mapping[str, Component]  # by the folders that they have in a diffusers folder
    tokenizers: Mapping[str, Path]  # folders with a vocabulary, by the text encoder that it is of
    architecture: Architecture
    quantization: Quantization | None = None

    @property
    def bits(self) -> int | None:
        return self.quantization.bits if self.quantization else None

    @property
    def text_bits(self) -> int | None:
        """Of the text encoders, where they are stored in others than `bits`."""
        return self.quantization.text_bits if self.quantization else None

    def bits_of(self, folder: str) -> int | None:
        """Bits that a component's matrices are stored in, by the folder that it has."""
        texts = {part.folder for part in self.architecture.of_role("text")}
        return (self.text_bits if folder in texts else None) or self.bits

    @property
    def family(self) -> Family:
        return family_of(self.architecture)

    @property
    def defaults(self) -> ModelDefaults:
        return self.architecture.defaults

    @cached_property
    def stamps(self) -> FileStamps:
        """All files that it was read from, as they were when this was first asked for."""
        return FileStamps.of(self._sources())

    def check_files(self) -> None:
        """Raises `WeightsError` where the files are no longer those that it was read from.

        What would be read of them now belongs to another revision, and not to what is in memory.
        """
        if self.stamps.changed is not None:
            raise WeightsError(
                f"The files of {self.name} were changed while they were in use; send the request "
                "again, and they are read anew."
            )

    def _sources(self) -> Iterator[Path]:
        weights = [file for part in self.components.values() for file in part.files]
        yield from weights
        for folder in self.tokenizers.values():
            yield from (folder / name for name in _names_in(folder))
        if self.kind != "bfl":  # single files have none of their own
            for root in {file.parent.parent for file in weights}:
                yield from (*root.glob("*.json"), *root.glob("*/*.json"))
        for file in weights:  # which revision the name means in the Hub's cache
            for folder in file.parents:
                if folder.name == "snapshots":
                    yield folder.parent / "refs" / "main"

    @cached_property
    def content(self) -> str:
        """16 hex digits, the same wherever this model lies, in the Hub's cache or in a folder.

        Two hosts with the same content paint the same pictures: it covers the weights (sampled as
        in `fingerprint`), the tokenizers, and all that the JSON files tell.
        """
        digest = hashlib.sha256()
        for part, component in self.components.items():
            digest.update(f"{part} {component.layout}{component.prefix}\n".encode())
            for file in sorted(component.files):
                _sample(digest, file)
        for tokenizer in self.family.folder.tokenizers.values():
            if tokenizer.component not in self.tokenizers:
                continue  # of what reads no words
            folder, choices = self.tokenizers[tokenizer.component], tokenizer.choices
            for name in vocabulary_in(_names_in(folder), choices) or choices[0]:
                _sample(digest, folder / name)
        bits = (self.bits,) if self.text_bits is None else (self.bits, self.text_bits)
        digest.update(repr((*self.architecture.identity, *bits)).encode())
        return digest.hexdigest()[:16]


def other_bits(name: str, stored: int, setting: str = "bits") -> UsageError:
    """That a model which is stored in so many bits can't be had in others."""
    return UsageError(
        f"{name} is stored in {stored} bits; leave `{setting}` out, or name the model that it was "
        "made from.",
        setting=setting,
    )


def of_one_moment(read: Callable[[], Checkpoint]) -> Checkpoint:
    """What `read` makes of files that are not changed meanwhile, which takes a second look.

    Else its revision could be of the files before and its `stamps` of those after, and nobody would
    see that they have changed. Raises what `read` does, and `WeightsError` where they go on so.
    """
    before = read().stamps
    for _ in range(LOOKS):
        checkpoint = read()
        if checkpoint.stamps == before:
            return checkpoint
        before = checkpoint.stamps
    raise WeightsError(f"The files of {checkpoint.name} change while they are read; ask again.")


def from_folder(folder: Path, name: str, revision: str | None = None) -> Checkpoint:
    """A diffusers folder, or fluxmesh's quantized one.

    Raises `IncompleteModelError` that names all that a folder lacks, `ModelNotFoundError` for one
    of another family, `WeightsError` for a broken one.
    """
    family = family_in(folder)
    _check_complete(folder, family)
    files = {part: weight_files(folder / part) for part in family.folder.components}
    if revision is None:
        weights = [file for part in files.values() for file in part]
        revision = fingerprint([*weights, *apple_double.without(folder.glob("*/*.json"))])
    return described(folder, files, name, revision)


def described(
    folder: Path, files: Mapping[str, tuple[Path, ...]], name: str, revision: str
) -> Checkpoint:
    """What the JSON files of a folder say of these weights, which need not be here yet.

    Raises as `from_folder`.
    """
    form = family_in(folder).folder
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    quantization = _quantization(folder, manifest)
    layout = "fluxmesh" if quantization else "diffusers"
    description = FolderDescription(
        configs={part: config_in(folder, part, form) for part in form.components},
        schedule=schedule_in(folder, form),
        index=read_json(folder / INDEX),
        tokenizers={
            tokenizer.component: folder / place for place, tokenizer in form.tokenizers.items()
        },
    )
    return Checkpoint(
        name=name,
        revision=revision,
        kind="quantized" if quantization else "diffusers",
        components={part: Component(files[part], layout) for part in form.components},
        tokenizers=description.tokenizers,
        architecture=with_defaults(
            form.architecture(description, folder), _declared_defaults(manifest)
        ),
        quantization=quantization,
    )


def from_components(
    family: Family,
    components: Mapping[str, Component],
    description: FolderDescription,
    name: str,
    revision: str | None = None,
    kind: str = "bfl",
) -> Checkpoint:
    """A checkpoint without a folder of diffusers.

    Raises `WeightsError` where the parts don't go together, or the transformer takes more than
    latents.
    """
    form = family.folder
    transformer = components["transformer"].files
    bits = affine.bits_of(read_headers(transformer))
    return Checkpoint(
        name=name,
        architecture=form.architecture(description, transformer[0]),
        revision=revision or fingerprint(_parts(components)),
        kind=kind,
        components={part: components[part] for part in form.components},
        tokenizers=description.tokenizers,
        quantization=Quantization(bits) if bits else None,
    )


def with_defaults(architecture: Architecture, values: Mapping[str, Any]) -> Architecture:
    """The same, painting as `values` say where a request says nothing."""
    defaults = dataclasses.replace(architecture.defaults, **values)
    same: Architecture = dataclasses.replace(architecture, defaults=defaults)  # type: ignore[type-var]
    return same


def family_in(folder: Path, where: object = None) -> Family:
    """Whose model a diffusers folder is, by its model_index.json.

    `where` is what the sentence calls it, if not by its path. Raises `ModelNotFoundError` for a
    folder of another family, or of no model.
    """
    index = folder / INDEX
    if not index.is_file() and (folder.parent / INDEX).is_file():
        raise ModelNotFoundError(
            f"{folder} is one part of a diffusers folder; name the folder above it."
        )
    if not index.is_file():
        raise ModelNotFoundError(
            f"{folder} holds no {INDEX}, so it is no diffusers folder; name a folder that has "
            "one, or a single .safetensors file."
        )
    pipeline = str(read_json(index).get("_class_name"))
    for reader in READERS.values():
        if pipeline == reader.pipeline:
            raise ModelNotFoundError(
                f"{where or folder} holds {reader.name}, which paints nothing by itself; give it "
                f"as `{reader.alias}` beside a model that paints, whose `reference` it reads."
            )
    for family in FAMILIES:
        if family.folder.is_of(pipeline):
            return family
    raise ModelNotFoundError(f"{where or folder} holds a {pipeline}; fluxmesh runs {NAMES} only.")


def _check_complete(folder: Path, family: Family) -> None:
    below = (path for path in folder.glob("*/*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in below]
    missing = files_of([*names, *_names_in(folder)], family.folder).missing
    if missing:
        raise IncompleteModelError.of(folder, ", ".join(missing))


def _names_in(folder: Path) -> list[str]:
    """The names of the files right inside of a folder; none where it is not there."""
    return [path.name for path in folder.glob("*") if path.is_file()]


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a component's folder: those of its index, or the only one.

    Raises `IncompleteModelError` where there are none, or one of the index is missing.
    """
    names = weight_names(_names_in(folder))
    if names is None:
        raise IncompleteModelError.of(folder, "weights as .safetensors")
    if names.index is not None:
        return read_index(folder / names.index)
    return tuple(folder / name for name in names.files)


def _parts(components: Mapping[str, Component]) -> list[Path]:
    return [file for component in components.values() for file in component.files]


def _quantization(folder: Path, manifest: Mapping[str, Any]) -> Quantization | None:
    entry = manifest.get("quantization")
    if entry is None:
        return None
    if manifest.get("format") != FORMAT or not isinstance(entry, dict):
        raise WeightsError(
            f"{folder / MANIFEST} has format {manifest.get('format')!r}, not {FORMAT}; quantize "
            "the model again with this version of fluxmesh."
        )
    bits, text_bits = entry.get("bits"), entry.get("text_bits")
    for number in (bits, bits if text_bits is None else text_bits):
        if type(number) is not int or number not in BITS:
            raise WeightsError(
                f"{folder / MANIFEST} says {number!r} bits; quantize the model again."
            )
    assert isinstance(bits, int)
    return Quantization(bits, text_bits)


def _declared_defaults(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a folder's fluxmesh.json says that a request takes; the tokenizer's length is not."""
    declared = manifest.get("defaults")
    if not isinstance(declared, dict):
        return {}
    kinds = get_type_hints(ModelDefaults)
    names = ("steps", "guidance", "height", "width", "reference_area")
    return {name: declared[name] for name in names if is_of(kinds[name], declared.get(name))}


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
    """Adds a file's size and 64 places of its bytes. Raises `WeightsError`."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{size}\n".encode())
            for place in range(0, size, max(size // 64, 4096)):
                file.seek(place)
                digest.update(file.read(4096))
    except OSError as error:
        raise WeightsError(f"Can't read {path}: {error.strerror or error}.") from error
