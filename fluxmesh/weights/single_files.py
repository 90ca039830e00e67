"""A checkpoint out of single files: a transformer, and what it lacks, from wherever that lies.

Between `hub.py`, which knows names and the cache, and `checkpoint.py`. People have FLUX.1 as BFL's
`flux1-….safetensors` beside `ae.safetensors`, as ComfyUI's set (`clip_l`, `t5xxl_fp16` and so on,
side by side or in folders of its own), or whole in one file. What a file is its header says, never
its name. What no file holds, the tokenizers, comes from a folder that has them: beside the file, in
the Hub's cache, or in the package. Imports no mlx.
"""

from __future__ import annotations

import contextlib
import functools
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from fluxmesh.errors import FluxmeshError, ModelNotFoundError, NotFetchedError, WeightsError
from fluxmesh.models.files.family import Family, FolderDescription
from fluxmesh.models.files.kinds import FileContents
from fluxmesh.models.registry import FAMILIES
from fluxmesh.storage.other_formats import ENDINGS
from fluxmesh.storage.tensor_files import read_header
from fluxmesh.weights import identify
from fluxmesh.weights.checkpoint import (
    Checkpoint,
    Component,
    from_components,
    weight_files,
)
from fluxmesh.weights.configs import config_in
from fluxmesh.weights.lenders import Lenders

# ComfyUI's folders below `models/`; the older name of each still works there.
TRANSFORMER_FOLDERS = ("diffusion_models", "unet", "checkpoints")
PART_FOLDERS = ("text_encoders", "clip", "vae")
LendersOf = Callable[[Family], Lenders]


class MissingPartsError(NotFetchedError):
    """A transformer is here, and some of what it needs is nowhere on this machine."""

    def __init__(
        self, file: FileContents, prefix: str, name: str, parts: Sequence[str], family: Family
    ) -> None:
        self.family = family
        # (repository, folders of it that are lacking)
        self.sources = family.files.sources(parts, file, prefix)
        super().__init__(
            f"No {_listed(parts, family)} for {file.path}, neither beside it nor in ComfyUI's "
            f"folders ({', '.join(PART_FOLDERS)}) nor in the Hub's cache; put what is missing "
            f"beside it, or fetch it with `fluxmesh models pull {shlex.quote(name)}` "
            f"({size_of(parts, family)})."
        )


def _listed(parts: Sequence[str], family: Family) -> str:
    """What is missing, in words."""
    words = []
    for noun, names in family.files.nouns:
        which = [word for part, word in names.items() if part in parts]
        if which:
            named = f" ({' and '.join(which)})" if any(which) else ""
            words.append(f"{noun}{'s' if len(which) > 1 else ''}{named}")
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def size_of(parts: Sequence[str], family: Family) -> str:
    """About what a download of these parts takes; a tokenizer is 3 MB at most."""
    total = sum(family.files.megabytes.get(part, 3) for part in parts)
    return f"{total / 1000:.1f} GB" if total >= 1000 else f"{total} MB"


def from_file(file: Path, name: str, lenders: LendersOf, revision: str | None = None) -> Checkpoint:
    """The checkpoint whose transformer is in `file`, read from headers alone.

    Raises `ModelNotFoundError` that says what the file is where it is no transformer,
    `MissingPartsError` for what it needs and nothing here has, `WeightsError` for broken files.
    """
    family = identify.family_of(identify.contents(file))
    return _Assembly(file, family, lenders(family)).checkpoint(name, revision)


def from_files_in(
    folder: Path, name: str, lenders: LendersOf, revision: str | None = None
) -> Checkpoint | None:
    """The same, of the one transformer in a folder of single files, or in ComfyUI's `models`.

    None where the folder holds none. Raises `ModelNotFoundError` where it holds several, or a
    single file of another kind, by what that is.
    """
    files = transformers_in(folder)
    if not files:
        parts = {path for _, path, _ in _by_component(_files(folder))}
        files = [path for path in sorted(folder.glob("*")) if _is_weights(path)]
        files = [path for path in files if path not in parts] or files
        if len(files) != 1:
            return None
    if len(files) > 1:
        listed = ", ".join(str(file.relative_to(folder)) for file in files)
        raise ModelNotFoundError(
            f"{folder} holds {len(files)} transformers ({listed}); name one of these files."
        )
    return from_file(files[0], name, lenders, revision)


def transformers_in(folder: Path) -> list[Path]:
    """The files with a transformer of FLUX in a folder, or in ComfyUI's folders below it."""
    places = [folder]
    for root in (folder, folder / "models"):
        places += [root / inner for inner in TRANSFORMER_FOLDERS]
    return sorted(
        {
            path
            for place in places
            for component, path, _ in _by_component(_files(place, is_deep=place != folder))
            if component == "transformer"
        }
    )


def _by_component(paths: Sequence[Path]) -> Iterator[tuple[str, Path, str]]:
    """`identify.by_component`, of all families."""
    for family in FAMILIES:
        yield from identify.by_component(paths, family.files.name)


class _Assembly:
    """Finds the parts of one checkpoint."""

    def __init__(self, file: Path, family: Family, lenders: Lenders) -> None:
        self.file, self.family, self.files = file, family, family.files
        self.lenders = lenders.near(file.parent)
        self.inside = identify.parts(identify.contents(file), self.files.name)
        if "transformer" not in self.inside:
            kind = next(identify.identities(identify.contents(file))).kind
            raise identify.refusal(file, kind)
        prefix = self.inside["transformer"]
        sizes = self.files.configs["transformer"](file, prefix)
        self.transformer = self.lenders.completed("transformer", sizes)

    def checkpoint(self, name: str, revision: str | None) -> Checkpoint:
        prefix = self.inside["transformer"]
        components = {"transformer": Component((self.file,), "bfl", prefix)}
        configs: dict[str, Any] = {"transformer": self.transformer}
        missing = []
        for part in self.files.configs:
            if part in components:
                continue
            choice = next(self._choices(part), None)
            if choice is None:
                missing.append(part)
            else:
                components[part], configs[part] = choice
        tokenizers = {}
        for part, tokenizer in self.family.folder.tokenizers.items():
            # it comes with its encoder
            config = configs.get(tokenizer.encoder)
            folder = self.lenders.tokenizer(part, config) if config else None
            if folder is None:
                missing.append(part)
            else:
                tokenizers[tokenizer.component] = folder
        if missing:
            self._refuse_damaged(missing)
            contents = identify.contents(self.file)
            raise MissingPartsError(contents, prefix, name, missing, self.family)
        description = FolderDescription(
            configs=configs,
            schedule=self.lenders.schedule(self.transformer),
            index=self.files.index(self.file),
            tokenizers=tokenizers,
        )
        return from_components(self.family, components, description, name, revision)

    def _refuse_damaged(self, parts: Sequence[str]) -> None:
        """Raises what is wrong with a file beside that is called as one of the parts is."""
        for part in set(parts) & self.files.usual.keys():
            name = self.files.usual[part]
            usual = re.compile(rf"{name}(?![a-z])")  # not `aesthetic`
            for file in self._others:
                if usual.match(file.name.lower()):
                    contents = identify.contents(file)
                    if file.stem.lower() == name:
                        identify.parts(contents, self.files.name)

    def _choices(self, part: str) -> Iterator[tuple[Component, Any]]:
        """A component with its config, wherever one fits the transformer, the nearest first."""
        if part in self.inside:
            yield self._in_file(part, self.file, self.inside[part])
        if part == "vae" and self.lenders.autoencoder is not None:
            file = self.lenders.autoencoder
            contents = identify.contents(file)
            prefixes = identify.parts(contents, identify.family_of(contents).files.name)
            if part not in prefixes:
                raise ModelNotFoundError(
                    f"{file} holds no autoencoder of {self.family.name}; name another."
                )
            # One of another family says nothing of this one.
            if identify.family_of(contents) is self.family:
                yield self._in_file(part, file, prefixes[part])
        for file, prefix in self._beside.get(part, ()):
            with contextlib.suppress(WeightsError):  # a neighbour that is broken is none
                component, config = self._in_file(part, file, prefix)
                if self.files.fits(part, config, self.transformer):
                    yield component, config
        for folder in self.lenders.folders:
            try:
                config = config_in(folder, part, self.family.folder)
                component = Component(weight_files(folder / part), "diffusers")
            except FluxmeshError:
                continue
            if self.files.fits(part, config, self.transformer):
                yield component, config

    def _in_file(self, part: str, file: Path, prefix: str) -> tuple[Component, Any]:
        config = self.lenders.completed(part, self.files.configs[part](file, prefix))
        return Component((file,), "bfl", prefix), config

    @cached_property
    def _others(self) -> list[Path]:
        """The weights files beside the transformer, and in ComfyUI's folders."""
        roots = [self.file.parent]
        roots += [above.parent for above in self.file.parents if above.name in TRANSFORMER_FOLDERS]
        files = _files(self.file.parent)
        for place in (root / inner for root in roots for inner in PART_FOLDERS):
            files += _files(place, is_deep=True)
        return list(dict.fromkeys(path for path in files if path != self.file))

    @cached_property
    def _beside(self) -> dict[str, list[tuple[Path, str]]]:
        """Files by component, with their prefixes: beside the transformer, in ComfyUI's folders."""
        by_component: dict[str, list[tuple[Path, str]]] = {}
        for component, path, prefix in identify.by_component(self._others, self.files.name):
            by_component.setdefault(component, []).append((path, prefix))
        for component, candidates in by_component.items():
            candidates.sort(key=functools.partial(_rank_of, self.files.usual.get(component, "")))
        return by_component


def _files(folder: Path, is_deep: bool = False) -> list[Path]:
    """The weights files in a folder, and where `is_deep` in those right below it, by name."""
    patterns = ("*", "*/*") if is_deep else ("*",)
    paths = (path for pattern in patterns for path in folder.glob(pattern))
    return sorted(path for path in paths if path.suffix.lower() in identify.READ and path.is_file())


def _rank_of(usual: str, candidate: tuple[Path, str]) -> tuple[bool, bool, str]:
    """The usual names first, then files that are not rounded to 8 bits."""
    path, _ = candidate
    dtypes = {entry.dtype for entry in read_header(path).entries.values()}
    is_rounded = any(dtype.startswith(("F8", "I8", "U8")) for dtype in dtypes)
    is_unusual, name = by_name(usual)(path.name)
    return (is_unusual, is_rounded, name)


def _is_weights(path: Path) -> bool:
    is_named_so = path.suffix.lower() in (*identify.READ, *ENDINGS)
    return is_named_so and path.is_file() and not path.name.startswith("._")


def by_name(usual: str) -> Callable[[str], tuple[bool, str]]:
    """A key that sorts names of files: those that begin as the usual ones come first."""
    return lambda name: (not name.lower().startswith(usual), name)
