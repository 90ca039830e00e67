"""From the name that a user gives an adapter to its file on this machine. Imports no mlx.

A name is a path (a file, or a folder that trainers leave), a Hub id (`owner/repo`, with `:file`
where the repository holds several), or the address of a repository or file on the Hub. A path that
exists wins. What lies in the Hub's cache is used without asking the network; the rest is fetched
as models are (`weights/download.py`).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from fluxmesh.adapters.peft import CONFIG, PEFT_FILE
from fluxmesh.errors import ModelNotFoundError, NoSuchNameError
from fluxmesh.storage import apple_double
from fluxmesh.weights import hub
from fluxmesh.weights.cache import cached_snapshot, hub_cache, snapshot_below

Progress = Callable[[int, int], None]  # bytes done, bytes in all

# What trainers call their result; of several files in a folder, one of these is meant.
NAMES = (
    "final_adapters.safetensors",
    "pytorch_lora_weights.safetensors",
    PEFT_FILE,
)
ADDRESS = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([^/?#]+/[^/?#]+)"
    r"(?:/(?:blob|resolve|raw)/[^/?#]+/([^?#]+))?(?:/tree/[^?#]*)?/?(?:[?#].*)?"
)


@dataclass(frozen=True)
class HubAdapter:
    """A repository of the Hub, and the file in it; "" is the only one, or the one by its name."""

    repo: str
    file: str = ""

    @classmethod
    def of(cls, name: str) -> HubAdapter | None:
        """What a name means on the Hub; None where it can't be of it."""
        address = ADDRESS.fullmatch(name)
        if address:
            repo, file = address[1], unquote(address[2] or "")
        else:
            repo, _, file = name.partition(":")
        is_inside = not file.startswith("/") and ".." not in file.split("/") and "\\" not in file
        if not hub.is_hub_id(repo) or repo.endswith(".safetensors") or not is_inside:
            return None
        return cls(repo, file)


def split_scale(value: str) -> tuple[str, float]:
    """(name, strength) of NAME, NAME@STRENGTH or NAME:STRENGTH; a path that exists has none.

    Raises `ValueError` for a strength that is not finite, or for no name before it.
    """
    if os.path.exists(os.path.expanduser(value)):
        return value, 1.0
    for sign in "@:":
        name, is_there, number = value.rpartition(sign)
        if not is_there:
            continue
        try:
            strength = float(number)
        except ValueError:
            continue
        if not name or not math.isfinite(strength):
            raise ValueError(value)
        return name, strength
    return value, 1.0


def find_adapter(
    name: str | Path, *, download: bool = True, progress: Progress | None = None
) -> Path:
    """The adapter's file; a folder stands for the one that trainers leave in it.

    `progress` hears of a download. Raises `ModelNotFoundError`; of a download, what
    `download.download_files` raises.
    """
    file = Path(os.path.expanduser(name))
    if os.path.isdir(file):
        return _in_folder(snapshot_below(file) or file, str(name))
    if os.path.isfile(file):
        if file.name == CONFIG:
            return _in_folder(file.parent, str(name))
        return file
    named = HubAdapter.of(str(name))
    if named is None and "://" in str(name):
        raise NoSuchNameError(
            f"{name} is no address of a repository or file of the Hugging Face Hub, from which "
            "alone fluxmesh fetches adapters; download it, and name the file."
        )
    if named is None:
        raise NoSuchNameError(
            f"No adapter file {name}; check the path, or name a repository of the Hub as "
            "owner/repo or owner/repo:file."
        )
    return _on_hub(named, str(name), download, progress)


def _in_folder(folder: Path, name: str) -> Path:
    here = sorted(apple_double.without(folder.glob("*.safetensors")))
    chosen = _chosen([file.name for file in here])
    if chosen is None:
        raise NoSuchNameError(
            f"The folder {name} holds {len(here)} .safetensors files; name the adapter's file."
        )
    return folder / chosen


def _chosen(names: Iterable[str]) -> str | None:
    """The one that is meant of several files, by their names; None where it is not plain."""
    names = list(names)
    known = [name for name in NAMES if name in names]
    if known:
        return known[0]
    return names[0] if len(names) == 1 else None


def _on_hub(named: HubAdapter, name: str, download: bool, progress: Progress | None) -> Path:
    snapshot = cached_snapshot(named.repo)
    if snapshot is not None:
        here = [str(path.relative_to(snapshot)) for path in snapshot.rglob("*.safetensors")]
        chosen = named.file if named.file in here else None if named.file else _chosen(here)
        # What is here may be the rest of a model; only the name of an adapter's file is enough.
        if chosen and (named.file or len(here) == 1 or chosen in NAMES):
            return snapshot / chosen
    if not download:
        raise ModelNotFoundError(f"The adapter {name} is not on this machine.")
    from fluxmesh.weights.download import download_files

    picked: list[str] = []

    def choose(files: list[str]) -> list[str]:
        picked[:] = [_of_repository(named, files)]
        return [*_settings_beside(picked[0], files), *picked]

    return download_files(named.repo, hub_cache(), progress, choose) / picked[0]


def _settings_beside(file: str, files: list[str]) -> list[str]:
    """PEFT's settings of a repository's file: those in its folder, where they are its own."""
    folder = os.path.dirname(file)
    settings = os.path.join(folder, CONFIG)
    beside = [
        name for name in files if name.endswith(".safetensors") and os.path.dirname(name) == folder
    ]
    is_own = os.path.basename(file) == PEFT_FILE or beside == [file]
    return [settings] if settings in files and is_own else []


def _of_repository(named: HubAdapter, files: list[str]) -> str:
    """The file of a repository that is meant. Raises `ModelNotFoundError` naming what is there."""
    tensors = sorted(file for file in files if file.endswith(".safetensors"))
    if named.file:
        if named.file in files:
            return named.file
        raise ModelNotFoundError(
            f"{named.repo} holds no {named.file}; it holds {_listed(tensors) or 'no adapter'}."
        )
    chosen = _chosen(file for file in tensors if "/" not in file) or _chosen(tensors)
    if chosen is None:
        if not tensors:
            raise ModelNotFoundError(f"{named.repo} holds no .safetensors file; name another.")
        raise ModelNotFoundError(
            f"{named.repo} holds several adapters: {_listed(tensors)}; name one, as in "
            f"{named.repo}:{tensors[0]}."
        )
    return chosen


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more
