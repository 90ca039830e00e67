"""What a file is, told by its first bytes and its header, before anything is loaded or fetched.

Below `hub.py`. Formats that are no safetensors are known by their first bytes, or their ending;
safetensors by the names of their tensors, which the families' kinds and those of `foreign_files.py`
are asked for in order. A family of the registry is recognised wherever a file is named.
Imports no mlx.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fluxmesh.errors import ModelNotFoundError, WeightsError
from fluxmesh.models.files.family import Family
from fluxmesh.models.files.kinds import FileContents, FileKind
from fluxmesh.models.registry import FAMILIES, NAMES
from fluxmesh.models.tensor_map import Shape
from fluxmesh.storage import apple_double, gguf, other_formats
from fluxmesh.storage.numbers import affine, foreign
from fluxmesh.storage.safetensors import SUFFIXES, Header
from fluxmesh.storage.tensor_files import read_header
from fluxmesh.weights.foreign_files import BESIDE, MODELS, PARTS

# The newest family first: names that an older one shares with it tell less.
OWN = tuple(kind for family in reversed(FAMILIES) for kind in family.files.kinds)
KINDS = (*BESIDE, *MODELS, *OWN, *PARTS)

READ = (*SUFFIXES, ".gguf")  # the endings of files that are looked at


@dataclass(frozen=True)
class Identity:
    """What a file is, and what stands before the names of the tensors that say so."""

    kind: FileKind
    prefix: str


def contents(path: Path, header: Header | None = None) -> FileContents:
    """The names and shapes in a file of safetensors, or in its `header` alone.

    Raises `ModelNotFoundError` for another format, by its name; `WeightsError` for a broken file.
    """
    if header is None:
        _check_format(path)
        header = read_header(path)
    foreign.refuse(header)
    shapes = {key: _shape(header, key) for key in header.entries}
    return FileContents(path, shapes, header.metadata)


def _shape(header: Header, key: str) -> Shape:
    """Of a packed matrix, that of its numbers, unless its scales are in another file."""
    try:
        return affine.shape_of(header, key)
    except WeightsError:
        return header.entries[key].shape


def identities(file: FileContents) -> Iterator[Identity]:
    """Everything that a file is, first what it is called: an all-in-one file is several things."""
    for kind in KINDS:
        prefix = kind.prefix_in(file)
        if prefix is not None:
            yield Identity(kind, prefix)


def family_of(file: FileContents) -> Family:
    """Whose model, or part of one, a file is: the family of the first thing that it is.

    Raises as `parts`.
    """
    for identity in identities(file):
        for family in FAMILIES:
            if identity.kind.component and identity.kind.family == family.files.name:
                return family
        raise refusal(file.path, identity.kind)
    raise _unknown(file)


def parts(file: FileContents, family: str) -> dict[str, str]:
    """The components of a family that a file holds, each with what stands before its names.

    Raises `ModelNotFoundError` that says what the file is, where it is no model of any family.
    """
    prefixes: dict[str, str] = {}
    for identity in identities(file):
        kind = identity.kind
        if not prefixes and (not kind.component or kind.family != family):
            raise refusal(file.path, kind)
        if kind.component and kind.family == family:
            prefixes.setdefault(kind.component, identity.prefix)
    if not prefixes:
        raise _unknown(file)
    return prefixes


def _unknown(file: FileContents) -> WeightsError:
    names = sorted(file.shapes, key=lambda name: (name.count("."), name))[:3]
    listed = ", ".join(names) if names else "nothing"
    return WeightsError(
        f"{file.path} is not a FLUX transformer, nor any model that fluxmesh knows: it holds "
        f"{listed}; name another file."
    )


def refusal(path: Path, kind: FileKind) -> ModelNotFoundError:
    """That a file is no model, by what it is."""
    return ModelNotFoundError(f"{path} is {kind.what}; {kind.remedy.format(families=NAMES)}.")


def by_component(paths: Iterable[Path], family: str) -> Iterator[tuple[str, Path, str]]:
    """(component, file, prefix) of whatever of a family the files hold; others are passed over."""
    for path in apple_double.without(paths):
        if path.suffix.lower() in READ:
            with contextlib.suppress(ModelNotFoundError, WeightsError):
                for component, prefix in parts(contents(path), family).items():
                    yield component, path, prefix


def _check_format(path: Path) -> None:
    try:
        with open(path, "rb") as file:
            first = file.read(other_formats.FIRST)
    except OSError as error:
        raise WeightsError(f"Can't read {path}: {error.strerror}.") from error
    # A header of safetensors stands behind its length, which may look like anything.
    if first[8:9] == b"{" or first.startswith(gguf.MAGIC):
        return
    form = other_formats.what(path, first)
    if form is not None:
        raise ModelNotFoundError(f"{path} is {form}.")
