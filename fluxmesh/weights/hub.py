"""From the name that a user gives to a checkpoint on this machine. Imports no mlx.

A name is an alias (`tiny`, `schnell`, `klein-4b` …), a Hub id (`owner/repo`), a folder of
diffusers, of `fluxmesh models quantize`, of single files or in a cache of the Hub, or a
`.safetensors` file with a transformer (`single_files.py` finds what else it needs). What already
lies in the Hub's cache is used without asking the network; `download.py` fetches the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fluxmesh.errors import (
    FluxmeshError,
    IncompleteModelError,
    ModelNotFoundError,
    NoSuchNameError,
    NotFetchedError,
    about_setting,
)
from fluxmesh.models.base import Architecture
from fluxmesh.models.files.family import Family
from fluxmesh.models.registry import (
    ALIASES,
    BY_PREFERENCE,
    NAMES,
    PUBLISHED,
    READERS,
    REPO_ALIASES,
    TOOLS_BY_PREFERENCE,
    family_of,
    reader_alias,
    spelled,
)
from fluxmesh.spelling import nearest
from fluxmesh.storage import placeholders
from fluxmesh.storage.homes import models_folder
from fluxmesh.storage.own_words import in_own_words
from fluxmesh.weights import mflux_folder, single_files
from fluxmesh.weights.cache import (
    cached_snapshot,
    hub_cache,
    is_hub_id,
    repo_of,
    snapshot_below,
)
from fluxmesh.weights.checkpoint import (
    Checkpoint,
    Component,
    ModelDefaults,
    family_in,
    from_folder,
    of_one_moment,
)
from fluxmesh.weights.embedded.checkpoints import (
    embedded_checkpoint,
    embedded_folders,
    embedded_names,
    folder_of,
)
from fluxmesh.weights.folder_files import INDEX
from fluxmesh.weights.identify import READ
from fluxmesh.weights.lenders import Lenders
from fluxmesh.weights.models_folder import entry_in
from fluxmesh.weights.reference_readers import no_model, pull_reader, resolve_reader

if TYPE_CHECKING:
    from fluxmesh.weights.download import RemoteFiles

__all__ = [
    "Checkpoint",
    "Component",
    "ModelDefaults",
    "ModelInfo",
    "list_models",
    "preferred_here",
    "tools_here",
    "pull",
    "resolve",
]

TINY = "tiny"
NOT_HERE = "not here"  # `ModelInfo.note` of a model of which nothing was ever fetched
REPOS = {alias: model.repo for alias, model in PUBLISHED.items()}
# Of the environment: BFL's single files.
OVERRIDES = {alias: model.variable for alias, model in PUBLISHED.items() if model.variable}
MISSPELT = 0.85  # likeness of two names from which on one is the other with a slip
HUB_PAGE = re.compile(r"(?:https?://)?(?:huggingface\.co|hf\.co)/([^/?#\s]+/[^/?#\s]+)")

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True)
class ModelInfo:
    """A line of `fluxmesh models list`."""

    name: str  # what `--model` takes
    source: str  # Hub id, path, or "embedded"
    revision: str | None  # None when it isn't on this machine
    nbytes: int  # of its files, where it can be used
    note: str = ""  # why it can't be used, when it can't
    architecture: Architecture | None = None  # None: nobody knows what it is made of


@about_setting("model")
def resolve(name: str, *, download: bool = True, progress: Progress | None = None) -> Checkpoint:
    """The checkpoint called `name`, fetched from the Hub when it isn't here.

    `progress` hears (bytes done, bytes in all) of a download. Raises, with the setting `model`,
    `ModelNotFoundError` for a name that leads nowhere, a gated repository, no network, and a file
    of another kind, by what it is, `NotFetchedError` for what only `pull` fetches, `WeightsError`
    for broken files; and `OutputError` when the disk is full.
    """
    alias = alias_of(name)
    if alias in embedded_names():
        return embedded_checkpoint(alias)
    if (reader := reader_alias(name)) is not None:
        raise no_model(reader)
    if alias is not None:
        override = os.environ.get(OVERRIDES.get(alias, ""), "")
        if override:
            file = _named_file(override, OVERRIDES[alias])
            return of_one_moment(lambda: _single_file(file, alias))
        if (pushed := _pushed(alias)) is not None:
            return of_one_moment(lambda: dataclasses.replace(resolve(str(pushed)), name=alias))
        return _from_hub(REPOS[alias], alias, download, progress)
    # os.path, not pathlib: a name too long for a path, or of a user unknown here, is no file.
    path = Path(os.path.expanduser(name))
    with in_own_words(name):
        if name and os.path.isdir(path):
            return of_one_moment(lambda: _folder(path.resolve(), name))
        if os.path.isfile(path):
            return of_one_moment(lambda: _single_file(path.absolute(), name))
    if _is_the_hubs(name):
        return _from_hub(name, name, download, progress)
    raise _no_such_model(name)


def resolve_any(
    name: str, *, download: bool = True, progress: Progress | None = None
) -> Checkpoint:
    """As `resolve`, of a reader of references too: whoever keeps or copies files cares not."""
    alias = reader_alias(name)
    if alias is None:
        return resolve(name, download=download, progress=progress)
    family = family_of(READERS[alias].published.architecture)
    return resolve_reader(alias, family, download=download, progress=progress)


def _pushed(alias: str) -> Path | None:
    """Where a model lies in this host's own folder of models, which its agent prefers too."""
    path = entry_in(models_folder(), alias)
    return path if path.exists() else None


@about_setting("model")
def check_name(name: str) -> None:
    """Raises `NoSuchNameError` where a name can lead nowhere: no path here, no Hub id.

    Asks no network, and reads no file.
    """
    is_known = alias_of(name) is not None or os.path.exists(os.path.expanduser(name))
    if (reader := reader_alias(name)) is not None:
        raise no_model(reader)
    if not is_known and not _is_the_hubs(name):
        raise _no_such_model(name)


def _is_the_hubs(name: str) -> bool:
    """Whether a name that is no path here is for the Hub."""
    is_file = os.path.splitext(name)[1].lower() in READ
    return is_hub_id(name) and not is_file and not _is_misspelt_path(name)


def _is_misspelt_path(name: str) -> bool:
    """Whether `folder/name` means something in a folder that is here, and not a Hub id.

    It does where something there is called nearly so; what was fetched once, or `pull` is told to
    fetch, is the Hub's whatever lies here.
    """
    parent, last = os.path.split(name)
    if not parent or name in REPOS.values() or cached_snapshot(name) is not None:
        return False
    return nearest(last, _names_in(parent), MISSPELT) is not None


def _no_such_model(name: str) -> NoSuchNameError:
    instead = placeholders.instead_of(os.path.expanduser(name))
    if instead is not None:
        return NoSuchNameError(f"{name} is {instead}.")
    parent, last = os.path.split(name.rstrip("/"))
    near = nearest(last, (other for other in _names_in(parent) if other != last))
    names = [*REPOS, *names_here()] if not parent else []
    known = _plainly(name) or nearest(name, names) or (os.path.join(parent, near) if near else None)
    meant = f"did you mean {known}? A model is" if known else "name"
    aliases = ", ".join((*embedded_names(), *REPOS))
    return NoSuchNameError(
        f"No model is called {name!r}; {meant} one of {aliases}, a Hub id like owner/repo, a "
        "folder or a .safetensors file."
    )


def _plainly(name: str) -> str | None:
    """What a name that is none stands for: an address of the Hub or of a file. None for others."""
    page = HUB_PAGE.match(name)
    if page is not None:
        return page[1]
    if name.startswith("file://"):
        return urllib.parse.unquote(name.removeprefix("file://"))
    return name.rstrip("/") if is_hub_id(name.rstrip("/")) and name.endswith("/") else None


def _names_in(folder: str) -> list[str]:
    try:
        return os.listdir(os.path.expanduser(folder) or ".")
    except (OSError, ValueError):  # a NUL in the name
        return []


def full_name(name: str) -> str:
    """What other processes and machines know a model by: as `resolve` reads the name here.

    An alias in its short form (also where a folder is called so), a path from the root, a Hub id.
    """
    path = os.path.expanduser(name)
    return alias_of(name) or (os.path.abspath(path) if os.path.exists(path) else name)


def preferred_here() -> Iterator[Checkpoint]:
    """Every model that may stand in where none is named, the best first; embedded ones are last.

    Those that are on this machine whole: nothing is fetched.
    """
    yield from _whole_ones(BY_PREFERENCE)
    yield from map(resolve, embedded_names())


def tools_here() -> Iterator[Checkpoint]:
    """The same of models that need a picture beside the prompt."""
    return _whole_ones(TOOLS_BY_PREFERENCE)


def _whole_ones(aliases: Iterable[str]) -> Iterator[Checkpoint]:
    for alias in aliases:
        with contextlib.suppress(FluxmeshError):
            yield resolve(alias, download=False)


def pull(name: str, progress: Progress | None = None) -> Checkpoint:
    """Fetches the newest revision of a Hub model and checks it.

    Of a file or a folder here, what it lacks of its family is fetched, such as text encoders; one
    that lacks nothing is only resolved. Raises what `resolve` does.
    """
    reader = reader_alias(name)
    if reader is not None:
        return pull_reader(reader, progress)
    alias = alias_of(name)
    repo = REPOS.get(alias or "", name)
    is_named = bool(os.environ.get(OVERRIDES.get(alias or "", "")))
    is_local = alias in embedded_names() or not is_hub_id(repo) or os.path.isabs(full_name(name))
    if not (is_local or is_named):
        return _fetched(repo, alias or name, progress)
    try:
        return resolve(name, progress=progress)
    except single_files.MissingPartsError as error:
        from fluxmesh.weights.download import download_parts

        download_parts(error.family, error.sources, hub_cache(), progress)
        return resolve(name, progress=progress)


def _fetched(repo: str, name: str, progress: Progress | None) -> Checkpoint:
    from fluxmesh.weights.download import download_model

    return _in_snapshot(download_model(repo, hub_cache(), progress, _lacking), name)


def _lacking(files: RemoteFiles) -> list[tuple[str, tuple[str, ...]]]:
    """What a repository of single files needs from elsewhere, and is not here either."""
    form = files.family.folder
    needed = [part for part in (*form.components, *form.tokenizers) if part not in files.file_of]
    lacks = _lenders(files.family).lacks(needed)
    return files.family.files.sources(lacks, files.transformer, files.prefix)


def names_here() -> Iterator[str]:
    """What `--model` takes and is on this machine, by a look at folders alone: for completion."""
    yield from embedded_names()
    for alias, repo in REPOS.items():
        if os.environ.get(OVERRIDES.get(alias, "")) or cached_snapshot(repo) is not None:
            yield alias
    for repo in _cached_repos():
        if repo not in REPOS.values():
            yield repo


def _cached_repos() -> Iterator[str]:
    """Hub ids of the FLUX in the cache, in the order of their names."""
    for folder in sorted(hub_cache().glob("models--*--*")):
        repo = repo_of(folder)
        snapshot = cached_snapshot(repo)
        if snapshot is not None and _is_flux(snapshot):
            yield repo


def download_bytes(name: str) -> int | None:
    """What `pull` would fetch of a model of which nothing is here; None where nobody can say."""
    if (reader := reader_alias(name)) is not None:
        return round(READERS[reader].published.gigabytes * 1e9)
    repo = REPOS.get(alias_of(name) or "", name)
    if not is_hub_id(repo):
        return None
    from fluxmesh.weights.download import repo_bytes

    try:
        return repo_bytes(repo, hub_cache())
    except FluxmeshError:
        return None


def notice_of(name: str) -> str:
    """What is to be known of a model before it is fetched: licence, and gate; "" of an unknown."""
    if (reader := reader_alias(name)) is not None:
        return READERS[reader].published.notice
    alias = alias_of(name)
    return PUBLISHED[alias].notice if alias in PUBLISHED else ""


def cache_folder() -> Path:
    """Where downloads go."""
    return hub_cache()


def free_bytes() -> int:
    """Room for downloads, on the disk that holds the Hub's cache or will."""
    folder = hub_cache().absolute()
    while not folder.is_dir():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def list_models() -> list[ModelInfo]:
    """The embedded model, the aliases, and every FLUX in the Hub's cache."""
    return list(_list_models())


def _list_models() -> Iterator[ModelInfo]:
    for alias in (*embedded_names(), *REPOS):
        source = REPOS.get(alias, "embedded")
        override = os.environ.get(OVERRIDES.get(alias, ""))
        yield _info(alias, override or source)
    known = set(REPOS.values())
    yield from (_info(repo, repo) for repo in _cached_repos() if repo not in known)


def list_readers() -> list[ModelInfo]:
    """What reads references for others, by alias."""
    return [_reader_info(alias) for alias in READERS]


def _reader_info(alias: str) -> ModelInfo:
    public = READERS[alias].published
    try:
        checkpoint = resolve_any(alias, download=False)
    except FluxmeshError as error:
        note = NOT_HERE if cached_snapshot(public.repo) is None else str(error)
        return ModelInfo(alias, public.repo, None, 0, note, public.architecture)
    total = sum(component.nbytes for component in checkpoint.components.values())
    return ModelInfo(alias, public.repo, checkpoint.revision, total, "", checkpoint.architecture)


def _is_flux(snapshot: Path) -> bool:
    """Whether a snapshot is to be listed: a FLUX in any layout, also one that is not whole."""
    index = snapshot / INDEX
    try:
        if index.is_file():
            family_in(snapshot)
            return True
        if (snapshot / mflux_folder.FIRST).is_file():
            mflux_folder.family_in_mflux(snapshot)
            return True
    except FluxmeshError:
        return False
    return bool(single_files.transformers_in(snapshot))


def _info(name: str, source: str) -> ModelInfo:
    try:
        checkpoint = resolve(name, download=False)
    except FluxmeshError as error:
        untouched = source in REPOS.values() and cached_snapshot(source) is None
        known = PUBLISHED[name].architecture if name in PUBLISHED else None
        note = NOT_HERE if untouched else str(error)
        return ModelInfo(name, source, None, 0, note, known)
    total = sum(component.nbytes for component in checkpoint.components.values())
    return ModelInfo(name, source, checkpoint.revision, total, "", checkpoint.architecture)


def folder_in_cache(name: str) -> Path:
    """The folder of the Hub's cache that a Hub model's files are in, or would be.

    Raises `ModelNotFoundError` for a name that is none of the Hub's.
    """
    reader = reader_alias(name)
    repo = READERS[reader].published.repo if reader else REPOS.get(alias_of(name) or "", name)
    if not is_hub_id(repo):
        raise _no_such_model(name)
    return hub_cache() / f"models--{repo.replace('/', '--')}"


def tiny_folder() -> Path:
    """Where the embedded checkpoint lies in the installed package."""
    return folder_of(TINY)


def alias_of(name: str) -> str | None:
    """The alias that a name means (`FLUX-dev` is `dev`, `FLUX.2-klein-4B` `klein-4b`), or None.

    An alias is one whatever lies here; other spellings give way to a file or folder of that name.
    """
    short = name.lower().removeprefix("flux-")
    if short in embedded_names() or short in REPOS:
        return short
    alias = REPO_ALIASES.get(name.lower()) or ALIASES.get(spelled(name))
    return None if alias is None or os.path.exists(os.path.expanduser(name)) else alias


def _named_file(path: str, variable: str) -> Path:
    file = Path(os.path.expanduser(path))
    if not os.path.isfile(file):
        raise ModelNotFoundError(
            f"The environment variable {variable} names {path}, which is no file; unset it or "
            "mend the path."
        )
    return file.absolute()


def _from_hub(repo: str, name: str, download: bool, progress: Progress | None) -> Checkpoint:
    snapshot = cached_snapshot(repo)
    incomplete = None
    if snapshot is not None:
        try:
            return _in_snapshot(snapshot, name)
        except IncompleteModelError as error:  # some of its files were never fetched
            incomplete = error
    if not download:
        raise NotFetchedError(
            f"{name} is on this machine with files missing ({incomplete.lacks}); complete it with "
            f"`fluxmesh models pull {name}`."
            if incomplete
            else f"{name} is not on this machine; fetch it with `fluxmesh models pull {name}`."
        ) from incomplete
    return _fetched(repo, name, progress)


def _in_snapshot(snapshot: Path, name: str) -> Checkpoint:
    """The checkpoint in a cached snapshot, whose folder is named by the commit."""
    if (snapshot / INDEX).is_file():
        return from_folder(snapshot, name, revision=snapshot.name)
    if (snapshot / mflux_folder.FIRST).is_file():
        return mflux_folder.from_mflux_folder(snapshot, name, _lenders, snapshot.name)
    checkpoint = single_files.from_files_in(snapshot, name, _lenders, revision=snapshot.name)
    if checkpoint is not None:
        return checkpoint
    raise ModelNotFoundError(
        f"{name} holds neither a diffusers folder nor one single .safetensors file of {NAMES}."
    )


def _single_file(file: Path, name: str) -> Checkpoint:
    """A transformer's file, with the autoencoder and text encoders that are found for it."""
    return single_files.from_file(file, name, _lenders)


def _folder(folder: Path, name: str) -> Checkpoint:
    """A diffusers folder, one in the Hub's cache, or a folder of single files."""
    snapshot = snapshot_below(folder)
    if snapshot is not None:
        return _in_snapshot(snapshot, name)
    if not (folder / INDEX).is_file():
        if (folder / mflux_folder.FIRST).is_file():
            return mflux_folder.from_mflux_folder(folder, name, _lenders)
        checkpoint = single_files.from_files_in(folder, name, _lenders)
        if checkpoint is not None:
            return checkpoint
    return from_folder(folder, name)


def _lenders(family: Family) -> Lenders:
    """Where a single file finds what it lacks: whole models in the cache, vocabularies alone."""
    override = os.environ.get("AE")
    repos = [model.repo for model in family.published.values()]
    snapshots = [cached_snapshot(repo) for repo in (*repos, *family.files.vocabularies)]
    here = [snapshot for snapshot in snapshots if snapshot is not None]
    return Lenders(
        family,
        folders=here,
        package=embedded_folders(),
        autoencoder=_named_file(override, "AE") if override else None,
    )
