"""From the name that a user gives to a checkpoint on this machine. Imports no mlx.

A name is an alias (`tiny`, `schnell`, `dev`, `krea-dev`), a Hub id (`owner/repo`), a diffusers
folder, one of BFL's `.safetensors` files, or a folder that `fluxmesh models quantize` wrote. What
already lies in the Hub's cache is used without asking the network; `download.py` fetches the rest.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fluxmesh.errors import FluxmeshError, ModelNotFoundError, WeightsError
from fluxmesh.storage import apple_double
from fluxmesh.weights.checkpoint import (
    MANIFEST,
    Checkpoint,
    Component,
    ModelDefaults,
    from_folder,
    from_single_files,
    has_text_encoders,
)

__all__ = [
    "Checkpoint",
    "Component",
    "ModelDefaults",
    "ModelInfo",
    "default_checkpoint",
    "default_model",
    "list_models",
    "pull",
    "resolve",
]

TINY = "tiny"
REPOS = {
    "schnell": "black-forest-labs/FLUX.1-schnell",
    "dev": "black-forest-labs/FLUX.1-dev",
    "krea-dev": "black-forest-labs/FLUX.1-Krea-dev",
}
OVERRIDES = {"schnell": "FLUX_SCHNELL", "dev": "FLUX_DEV"}  # environment: BFL's single files
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}")

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True)
class ModelInfo:
    """A line of `fluxmesh models list`."""

    name: str  # what `--model` takes
    source: str  # Hub id, path, or "embedded"
    revision: str | None  # None when it isn't on this machine
    nbytes: int
    note: str = ""  # why it can't be used, when it can't


def resolve(name: str, *, download: bool = True, progress: Progress | None = None) -> Checkpoint:
    """The checkpoint called `name`, fetched from the Hub when it isn't here.

    `progress` hears (bytes done, bytes in all) of a download. Raises `ModelNotFoundError` for a
    name that leads nowhere, a gated repository, no network; `WeightsError` for broken files;
    `OutputError` when the disk is full.
    """
    alias = alias_of(name)
    if alias == TINY:
        return _embedded()
    if alias is not None:
        override = os.environ.get(OVERRIDES.get(alias, ""), "")
        if override:
            file = _named_file(override, OVERRIDES[alias])
            return _single_file(file, alias, download, progress)
        return _from_hub(REPOS[alias], alias, download, progress)
    # os.path, not pathlib: a name too long for a path, or of a user unknown here, is no file.
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):
        return from_folder(path.resolve(), name)
    if os.path.isfile(path):
        if path.suffix != ".safetensors":
            raise ModelNotFoundError(
                f"{name} is not a .safetensors file; fluxmesh loads no other format of weights."
            )
        return _single_file(path.absolute(), name, download, progress)
    if is_hub_id(name) and path.suffix != ".safetensors":
        return _from_hub(name, name, download, progress)
    raise ModelNotFoundError(
        f"No model is called {name!r}; name one of tiny, {', '.join(REPOS)}, a Hub id like "
        "owner/repo, a folder or a .safetensors file."
    )


def full_name(name: str) -> str:
    """What other processes and machines know a model by: as `resolve` reads the name here.

    An alias in its short form (also where a folder is called so), a path from the root, a Hub id.
    """
    path = os.path.expanduser(name)
    return alias_of(name) or (os.path.abspath(path) if os.path.exists(path) else name)


def _embedded() -> Checkpoint:
    """The checkpoint of the package; its own fluxmesh.json may say what it paints by default."""
    checkpoint = from_folder(tiny_folder(), TINY)
    if (tiny_folder() / MANIFEST).is_file():
        return checkpoint
    trained_at = dataclasses.replace(checkpoint.defaults, steps=4, height=128, width=128)
    return dataclasses.replace(checkpoint, defaults=trained_at)


def default_checkpoint() -> Checkpoint:
    """The FLUX that is on this machine already, else `tiny`."""
    for alias in REPOS:
        try:
            return resolve(alias, download=False)
        except FluxmeshError:
            continue
    return resolve(TINY)


def default_model() -> str:
    """The name of the default checkpoint."""
    return default_checkpoint().name


def pull(name: str, progress: Progress | None = None) -> Checkpoint:
    """Fetches the newest revision of a Hub model and checks it; a local one is only resolved.

    Raises what `resolve` does.
    """
    alias = alias_of(name)
    repo = REPOS.get(alias or "", name)
    if alias == TINY or not is_hub_id(repo) or os.path.isabs(full_name(name)):
        return resolve(name, progress=progress)
    from fluxmesh.weights.download import download_model

    folder = download_model(repo, hub_cache(), progress)
    return _in_snapshot(folder, alias or name, True, progress)


def list_models() -> list[ModelInfo]:
    """The embedded model, the aliases, and every FLUX in the Hub's cache."""
    return list(_list_models())


def _list_models() -> Iterator[ModelInfo]:
    for alias in (TINY, *REPOS):
        source = "embedded" if alias == TINY else REPOS[alias]
        override = os.environ.get(OVERRIDES.get(alias, ""))
        yield _info(alias, override or source)
    known = set(REPOS.values())
    for folder in sorted(hub_cache().glob("models--*--*")):
        repo = folder.name.removeprefix("models--").replace("--", "/", 1)
        snapshot = cached_snapshot(repo)
        if repo in known or snapshot is None:
            continue
        index = snapshot / "model_index.json"
        if index.is_file() and '"Flux' in index.read_text(errors="replace"):
            info = _info(repo, repo)
            if "fluxmesh runs FLUX.1 only" not in info.note:
                yield info


def _info(name: str, source: str) -> ModelInfo:
    try:
        checkpoint = resolve(name, download=False)
    except FluxmeshError as error:
        untouched = source in REPOS.values() and cached_snapshot(source) is None
        return ModelInfo(name, source, None, 0, "not here" if untouched else str(error))
    total = sum(component.nbytes for component in checkpoint.components.values())
    return ModelInfo(name, source, checkpoint.revision, total)


def tiny_folder() -> Path:
    """Where the embedded checkpoint lies in the installed package."""
    return Path(__file__).resolve().parent.parent / "tiny" / "checkpoint"


def is_hub_id(name: str) -> bool:
    """Whether `name` can be a Hub id: `owner/repo`, nothing that climbs out of the cache."""
    return HUB_ID.fullmatch(name) is not None and ".." not in name and "--" not in name


def hub_cache() -> Path:
    """The Hub's cache folder, as huggingface_hub finds it, without importing that."""
    environ = os.environ
    if environ.get("HF_HUB_CACHE"):
        return Path(os.path.expanduser(environ["HF_HUB_CACHE"]))
    base = environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(environ.get("HF_HOME") or f"{base}/huggingface")) / "hub"


def cached_snapshot(repo: str) -> Path | None:
    """The folder of the repository's files in the cache, at the revision last fetched."""
    folder = hub_cache() / f"models--{repo.replace('/', '--')}"
    try:
        commit = (folder / "refs" / "main").read_text().strip()
    except OSError:
        return None
    snapshot = folder / "snapshots" / commit
    return snapshot if re.fullmatch(r"[0-9a-f]{7,64}", commit) and snapshot.is_dir() else None


def alias_of(name: str) -> str | None:
    """The alias that a name means, in its short form (`FLUX-dev` is `dev`), or None."""
    short = name.lower().removeprefix("flux-")
    return short if short == TINY or short in REPOS else None


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
    if snapshot is not None:
        try:
            return _in_snapshot(snapshot, name, False, None)
        except ModelNotFoundError:  # some of its files were never fetched
            if not download:
                raise
    if not download:
        raise ModelNotFoundError(
            f"{name} is not on this machine; fetch it with `fluxmesh models pull {name}`."
        )
    from fluxmesh.weights.download import download_model

    return _in_snapshot(download_model(repo, hub_cache(), progress), name, True, progress)


def _in_snapshot(
    snapshot: Path, name: str, download: bool, progress: Progress | None
) -> Checkpoint:
    """The checkpoint in a cached snapshot, whose folder is named by the commit."""
    if (snapshot / "model_index.json").is_file():
        return from_folder(snapshot, name, revision=snapshot.name)
    tensor_files = apple_double.without(snapshot.glob("*.safetensors"))
    files = [file for file in tensor_files if file.name != "ae.safetensors"]
    if len(files) == 1:
        return _single_file(files[0], name, download, progress, revision=snapshot.name)
    raise ModelNotFoundError(
        f"{name} holds neither a diffusers folder nor one single .safetensors file of FLUX.1."
    )


def _single_file(
    file: Path,
    name: str,
    download: bool,
    progress: Progress | None,
    revision: str | None = None,
) -> Checkpoint:
    """BFL's transformer, with the autoencoder and text encoders that are found for it."""
    override = os.environ.get("AE")
    sibling = file.with_name("ae.safetensors")
    autoencoder = _named_file(override, "AE") if override else sibling
    if file == autoencoder:
        raise ModelNotFoundError(f"{file} is the autoencoder; name the transformer's file.")
    text = _text_folder(file, download, progress)
    autoencoder_file = autoencoder if autoencoder.is_file() else None
    if autoencoder_file is None and not (text / "vae" / "config.json").is_file():
        raise ModelNotFoundError(
            f"No autoencoder for {file}: put ae.safetensors beside it, or name it in the "
            "environment variable AE."
        )
    return from_single_files(file, autoencoder_file, text, name, revision)


def _text_folder(file: Path, download: bool, progress: Progress | None) -> Path:
    """Text encoders for a single file: beside it, else those of any FLUX.1 (they are the same)."""
    if has_text_encoders(file.parent):
        return file.parent
    for repo in REPOS.values():
        snapshot = cached_snapshot(repo)
        if snapshot is not None and has_text_encoders(snapshot):
            return snapshot
    if not download:
        raise ModelNotFoundError(
            f"No text encoders for {file}: put the folders text_encoder, text_encoder_2, "
            "tokenizer and tokenizer_2 of FLUX.1 beside it, or run `fluxmesh models pull schnell`."
        )
    from fluxmesh.weights.download import download_text_encoders

    folder = download_text_encoders(REPOS["schnell"], hub_cache(), progress)
    if not has_text_encoders(folder):
        raise WeightsError(f"{REPOS['schnell']} lacks some of its text encoders; try again later.")
    return folder
