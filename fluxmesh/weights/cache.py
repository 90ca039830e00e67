"""The Hub's cache on this machine: where it is, and which snapshot of a repository counts.

Below `hub.py`. Any cache will do, also one on another disk whose path the user names. Imports
neither huggingface_hub nor mlx.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from fluxmesh.errors import NotFetchedError

HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}")
COMMIT = re.compile(r"[0-9a-f]{7,64}")


def hub_cache() -> Path:
    """The Hub's cache folder, as huggingface_hub finds it, without importing that."""
    environ = os.environ
    if environ.get("HF_HUB_CACHE"):
        return Path(os.path.expanduser(environ["HF_HUB_CACHE"]))
    base = environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(environ.get("HF_HOME") or f"{base}/huggingface")) / "hub"


def cached_snapshot(repo: str) -> Path | None:
    """The folder of the repository's files in the cache, at the revision last fetched."""
    return _newest_snapshot(hub_cache() / f"models--{repo.replace('/', '--')}")


def _newest_snapshot(folder: Path) -> Path | None:
    """The same, in a repository's folder of any cache."""
    try:
        commit = (folder / "refs" / "main").read_text().strip()
    except (OSError, ValueError):  # missing, or no text
        return None
    snapshot = folder / "snapshots" / commit
    return snapshot if COMMIT.fullmatch(commit) and snapshot.is_dir() else None


def snapshot_below(folder: Path) -> Path | None:
    """The snapshot that a path into a cache of the Hub means: the repository's, or one of it.

    Raises `NotFetchedError` where the repository's folder holds none.
    """
    if folder.parent.name == "snapshots" and COMMIT.fullmatch(folder.name):
        return folder
    repository = folder.parent if folder.name == "snapshots" else folder
    if not repository.name.startswith("models--"):
        return None
    snapshots = [path for path in repository.glob("snapshots/*") if path.is_dir()]
    snapshot = _newest_snapshot(repository) or (snapshots[0] if len(snapshots) == 1 else None)
    if snapshot is None:
        raise NotFetchedError(
            f"{folder} holds no snapshot of the model; fetch it with `fluxmesh models pull "
            f"{repo_of(repository)}`."
        )
    return snapshot


def repo_of(folder: Path) -> str:
    """The Hub id that a folder of the cache is called by."""
    return folder.name.removeprefix("models--").replace("--", "/", 1)


def is_hub_id(name: str) -> bool:
    """Whether `name` can be a Hub id: `owner/repo`, nothing that climbs out of the cache."""
    return HUB_ID.fullmatch(name) is not None and ".." not in name and "--" not in name
