"""A checkpoint out of a folder that mflux saved. Imports no mlx.

Beside `single_files.py`: such a folder has the weights where diffusers has them, numbered,
and its tokenizers, but no config, so that sizes are read from shapes (`Family.mflux`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fluxmesh.errors import IncompleteModelError
from fluxmesh.models.files.family import Family, FolderDescription
from fluxmesh.models.files.shapes import FileShapes
from fluxmesh.models.registry import FAMILIES
from fluxmesh.storage.safetensors import Header
from fluxmesh.storage.tensor_files import read_headers
from fluxmesh.weights import identify
from fluxmesh.weights.checkpoint import Checkpoint, Component, from_components, weight_files
from fluxmesh.weights.lenders import Lenders

FIRST = "transformer/0.safetensors"  # by which such a folder is known


def from_mflux_folder(
    folder: Path, name: str, lenders: Callable[[Family], Lenders], revision: str | None = None
) -> Checkpoint:
    """The checkpoint in a folder of mflux, read from headers alone.

    Raises `IncompleteModelError` that names what the folder lacks, `ModelNotFoundError` for one of
    another model, `WeightsError` for broken files.
    """
    family = family_in_mflux(folder)
    near = lenders(family).near(folder)
    form, saved = family.folder, family.mflux
    assert saved is not None
    components, configs = {}, {}
    for part in form.components:
        files = weight_files(folder / part)
        components[part] = Component(files, "mflux")
        what, prefix, read = saved.configs[part]
        shapes = FileShapes(folder / part, f"a {what} of mflux", prefix, read_headers(files))
        configs[part] = near.completed(part, read(shapes))
    tokenizers = {}
    for place, tokenizer in form.tokenizers.items():
        vocabulary = near.tokenizer(place, configs[tokenizer.encoder])
        if vocabulary is None:
            raise IncompleteModelError.of(folder, f"{place}/{' and '.join(tokenizer.choices[0])}")
        tokenizers[tokenizer.component] = vocabulary
    description = FolderDescription(configs, near.schedule(configs["transformer"]), {}, tokenizers)
    return from_components(family, components, description, name, revision, kind="mflux")


def family_in_mflux(folder: Path, header: Header | None = None) -> Family:
    """Whose model the folder is.

    `header` is that of its first file, where that is not here yet. Raises `ModelNotFoundError`
    where the file is another model's.
    """
    saved = {family.mflux.part: family for family in FAMILIES if family.mflux is not None}
    file = identify.contents(folder / FIRST, header)
    first = next(identify.identities(file), None)
    if first is None:
        return next(iter(saved.values()))
    if first.kind.what not in saved:
        raise identify.refusal(file.path, first.kind)
    return saved[first.kind.what]
