"""Models with which others read references (FLUX.1 Redux): from a name to a checkpoint of them.

Beside `hub.py`, which knows the names of whole models, and below `sampling/takes.py`, which says
when such a one is needed. What is found is a `Checkpoint` like any other, of a model that reads
with these parts, though it has no others: no tokenizers, no transformer. A name is an alias
(`redux`), a repository on the Hub, a folder, or the file of one part; the other parts lie in the
same folder, in ComfyUI's folders, or in the Hub's cache. Imports no mlx.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fluxmesh.errors import (
    FluxmeshError,
    IncompleteModelError,
    ModelNotFoundError,
    NoSuchNameError,
    NotFetchedError,
    WeightsError,
)
from fluxmesh.models.files.family import Family, ReaderPart, ReferenceReader
from fluxmesh.models.files.kinds import FileContents
from fluxmesh.models.registry import READERS, reader_alias
from fluxmesh.storage.own_words import in_own_words
from fluxmesh.storage.tensor_files import read_headers
from fluxmesh.weights import identify
from fluxmesh.weights.cache import cached_snapshot, hub_cache, is_hub_id, snapshot_below
from fluxmesh.weights.checkpoint import Checkpoint, Component, fingerprint, weight_files
from fluxmesh.weights.configs import read_config
from fluxmesh.weights.folder_files import inside_of, weight_names

KIND = "reader"  # of the checkpoints here
Progress = Callable[[int, int], None]  # bytes done, bytes in all
LocatedPart = tuple[Component, Any]  # its files, and its sizes


def resolve_reader(
    name: str, family: Family, *, download: bool = True, progress: Progress | None = None
) -> Checkpoint:
    """The models that `name` means, with which this family reads references; "" is its own.

    Raises `NotFetchedError` for what is not here, or not all of it, `NoSuchNameError` for a name
    that leads nowhere, `WeightsError` for broken files, and what a download raises.
    """
    reader = family.reader
    assert reader is not None, "ask a family that has one"
    if not name or reader_alias(name) == reader.alias:
        return _from_hub(reader.published.repo, reader.alias, reader, download, progress)
    path = Path(os.path.expanduser(name))
    with in_own_words(name):
        if name and os.path.isdir(path):
            return _from_folder(snapshot_below(path.resolve()) or path.resolve(), name, reader)
        if os.path.isfile(path):
            return _from_file(path.absolute(), name, reader)
    if is_hub_id(name):
        return _from_hub(name, name, reader, download, progress)
    raise NoSuchNameError(
        f"No {reader.name} is called {name!r}; name {reader.alias}, a Hub id like owner/repo, a "
        f"folder, or the file of {next(iter(reader.parts.values())).what}."
    )


def full_reader_name(name: str, family: Family) -> str:
    """What other processes know it by: its alias, a path from the root, a Hub id; "" is the
    family's own."""
    assert family.reader is not None, "ask a family that has one"
    path = os.path.expanduser(name)
    alias = family.reader.alias if not name else reader_alias(name)
    return alias or (os.path.abspath(path) if os.path.exists(path) else name)


def no_model(alias: str) -> NoSuchNameError:
    """That a reader is no model that paints, and how it is used."""
    return NoSuchNameError(
        f"{READERS[alias].name} paints nothing by itself: it reads references for models that "
        "paint from text; name one of these, such as dev, as `model`, and give `reference`."
    )


def pull_reader(alias: str, progress: Progress | None = None) -> Checkpoint:
    """Fetches the newest revision of what `alias` means. Raises what a download raises."""
    reader = READERS[alias]
    return _fetched(reader.published.repo, alias, reader, progress)


def _from_hub(
    repo: str, name: str, reader: ReferenceReader, download: bool, progress: Progress | None
) -> Checkpoint:
    snapshot = cached_snapshot(repo)
    lacks = ""
    if snapshot is not None:
        try:
            return _from_folder(snapshot, name, reader)
        except NotFetchedError as error:
            lacks = str(error)
    if download:
        return _fetched(repo, name, reader, progress)
    if lacks:
        raise NotFetchedError(lacks)
    # `pull` of somebody's repository is for models that paint.
    fetch = f"hf download {repo}" if name == repo else f"fluxmesh models pull {name}"
    raise NotFetchedError(
        f"{reader.name}, which reads references for others, is not on this machine; fetch it "
        f"with `{fetch}`, or name its folder or file as `{reader.alias}`."
    )


def _fetched(
    repo: str, name: str, reader: ReferenceReader, progress: Progress | None
) -> Checkpoint:
    from fluxmesh.weights.download import download_files

    def choose(names: list[str]) -> list[str]:
        wanted = []
        for folder in reader.parts:
            inside = inside_of(folder, names)
            weights = weight_names(inside)
            if weights is None or weights.missing or "config.json" not in inside:
                raise ModelNotFoundError(
                    f"{repo} has no {folder} with weights and a config.json, so that nothing of it "
                    f"was fetched; name {reader.alias}."
                )
            listed = (*weights.files, *([weights.index] if weights.index else []), "config.json")
            wanted += [f"{folder}/{file}" for file in listed]
        return wanted

    return _from_folder(download_files(repo, hub_cache(), progress, choose), name, reader)


def _from_folder(folder: Path, name: str, reader: ReferenceReader) -> Checkpoint:
    """That of a repository's folder, of single files, or of ComfyUI's `models`."""
    return _Search(reader, folder).checkpoint(name)


def _from_file(file: Path, name: str, reader: ReferenceReader) -> Checkpoint:
    """That of one part's file, with the others from around it."""
    search = _Search(reader, file.parent)
    contents = identify.contents(file)
    for folder, part in reader.parts.items():
        prefix = contents.prefix_of(part.tensors)
        if prefix is not None:
            search.parts[folder] = search.in_file(part, (file,), prefix)
            return search.checkpoint(name)
    kind = next(identify.identities(contents), None)
    what = kind.kind.what if kind else "another model"
    raise ModelNotFoundError(
        f"{file} is {what}, and not {reader.name}; name the file of "
        f"{next(iter(reader.parts.values())).what}."
    )


class _Search:
    """Finds the parts of one reader, the nearest first."""

    def __init__(self, reader: ReferenceReader, folder: Path) -> None:
        self.reader, self.folder = reader, folder
        self.parts: dict[str, LocatedPart] = {}
        self.broken: dict[str, WeightsError] = {}  # a file around that may have been the part

    def checkpoint(self, name: str) -> Checkpoint:
        """What lies in the folder or around it; one part of it at least, and the Hub's cache lends
        the others.

        Raises `NotFetchedError` that says what lacks and what to get, `WeightsError`.
        """
        self._fill(self._near)
        if not self.parts:
            raise next(iter(self.broken.values()), None) or self._is_none(name)
        self._fill(self._lent)
        for folder, part in self.reader.parts.items():
            if folder not in self.parts:
                raise self.broken.get(folder) or self._lacks(name, folder, part)
        components = {folder: self.parts[folder][0] for folder in self.reader.parts}
        files = [file for component in components.values() for file in component.files]
        is_snapshot = snapshot_below(self.folder) == self.folder
        return Checkpoint(
            name=name,
            revision=self.folder.name if is_snapshot else fingerprint(files),
            kind=KIND,
            components=components,
            tokenizers={},
            architecture=self.reader.architecture(
                {folder: sizes for folder, (_, sizes) in self.parts.items()}
            ),
        )

    def in_file(self, part: ReaderPart, files: tuple[Path, ...], prefix: str) -> LocatedPart:
        """A part whose files are known. Its sizes are those of the config beside them, where their
        names are those of a folder that has one.

        Raises `WeightsError` where neither that nor shapes tell them.
        """
        config = files[0].parent / "config.json"
        if config.is_file() and weight_names([file.name for file in files]) is not None:
            sizes = read_config(config, part.config)
        else:
            sizes = part.sizes(_contents(files), prefix)
        return Component(files, "diffusers", prefix), sizes

    def _fill(self, choices: Callable[[str, ReaderPart], Iterator[LocatedPart]]) -> None:
        """The parts that were not found yet, each the first of its choices."""
        for folder, part in self.reader.parts.items():
            if folder not in self.parts and (made := next(choices(folder, part), None)):
                self.parts[folder] = made

    def _near(self, folder: str, part: ReaderPart) -> Iterator[LocatedPart]:
        """A part in its own folder, as a file around, in a folder beside."""
        yield from self._in_folders(self.folder, folder, part)
        for file in self._files_around(part):
            with contextlib.suppress(ModelNotFoundError):
                try:
                    prefix = identify.contents(file).prefix_of(part.tensors)
                    if prefix is not None:
                        yield self.in_file(part, (file,), prefix)
                except WeightsError as error:
                    self.broken.setdefault(folder, error)
        yield from self._elsewhere(self.folder.parent, folder, part)

    def _lent(self, folder: str, part: ReaderPart) -> Iterator[LocatedPart]:
        """A part that the Hub's cache has, of this reader or of another model."""
        for snapshot in map(cached_snapshot, (self.reader.published.repo, *part.lenders)):
            if snapshot is not None:
                yield from self._elsewhere(snapshot, folder, part)

    def _elsewhere(self, place: Path, folder: str, part: ReaderPart) -> Iterator[LocatedPart]:
        with contextlib.suppress(FluxmeshError):  # what is broken there is none of the user's
            yield from self._in_folders(place, folder, part)

    def _in_folders(self, place: Path, folder: str, part: ReaderPart) -> Iterator[LocatedPart]:
        """A part in its own folder of a place, or right there, as its repository has it."""
        for own in (place / folder, place):
            with contextlib.suppress(IncompleteModelError):
                files = weight_files(own)
                prefix = _contents(files).prefix_of(part.tensors)
                if prefix is not None:
                    yield self.in_file(part, files, prefix)

    def _files_around(self, part: ReaderPart) -> list[Path]:
        """Weights files in the folder, and in ComfyUI's folders below it or beside it."""
        roots = (self.folder, self.folder / "models", self.folder.parent, self.folder.parent.parent)
        places = [self.folder, *(root / inner for root in roots for inner in part.places)]
        files = (path for place in places for path in sorted(place.glob("*")))
        return [path for path in dict.fromkeys(files) if path.suffix.lower() in identify.READ]

    def _is_none(self, name: str) -> NotFetchedError:
        return NotFetchedError(
            f"`{self.reader.alias}` {name} has nothing of {self.reader.name}; name a folder or a "
            f"file that has, or {self.reader.alias}.",
            setting=self.reader.alias,
        )

    def _lacks(self, name: str, folder: str, part: ReaderPart) -> NotFetchedError:
        return NotFetchedError(
            f"{name} lacks {part.what} of {self.reader.name} ({part.instead}), and it lies neither "
            f"in {self.folder / folder}, nor beside it, nor in the Hub's cache; put it there, or "
            f"fetch all of it with `fluxmesh models pull {self.reader.alias}`."
        )


def _contents(files: tuple[Path, ...]) -> FileContents:
    """Names and shapes of a part's files, which may be several. Raises `WeightsError`."""
    return identify.contents(files[0], read_headers(files))
