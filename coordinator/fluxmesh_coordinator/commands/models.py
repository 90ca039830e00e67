"""What `fluxmesh models show`, `check` and `rm` tell, find and remove.

Apart from click, as all of this folder: a server can tell the same.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxmesh.errors import ModelNotFoundError, OutputError, UsageError
from fluxmesh.storage.own_words import in_own_words
from fluxmesh.weights import hub
from fluxmesh.weights.embedded.checkpoints import embedded_names
from fluxmesh.weights.embedded.words import BACKGROUNDS, EDITS, EDITS_OF_TWO, PROMPTS, THINGS


def description(name: str) -> dict[str, Any]:
    """What is known of a model that is on this machine. Raises as `hub.resolve`."""
    checkpoint = hub.resolve(name, download=False)
    defaults = checkpoint.defaults
    parts = {part: component.nbytes for part, component in checkpoint.components.items()}
    folders = {os.path.dirname(f) for c in checkpoint.components.values() for f in c.files}
    told: dict[str, Any] = {
        "name": checkpoint.name,
        "folder": os.path.commonpath(folders),
        "revision": checkpoint.revision,
        "kind": checkpoint.kind,
        "bits": checkpoint.bits,
        "text_bits": checkpoint.text_bits or checkpoint.bits,
        "bytes": sum(parts.values()),
        "components": parts,
        "height": defaults.height,
        "width": defaults.width,
        "steps": defaults.steps,
        "guidance": defaults.guidance if checkpoint.architecture.takes_guidance else None,
        "prompt_tokens": defaults.t5_max_length,
    }
    if checkpoint.name in embedded_names():
        told["things"] = [_with_others(*thing) for thing in THINGS.items()]
        told["backgrounds"] = [_with_others(*ground) for ground in BACKGROUNDS.items()]
        told["prompts"] = list(PROMPTS)
        if "references" in checkpoint.architecture.takes:
            told["edits"], told["edits_of_two"] = list(EDITS), list(EDITS_OF_TWO)
    return told


def _with_others(name: str, others: tuple[str, ...]) -> str:
    return f"{name} ({', '.join(others)})" if others else name


def check(name: str, progress: Callable[[int, int], None]) -> hub.Checkpoint:
    """Reads every number of a model that is on this machine, and its vocabularies.

    `progress` hears (bytes read, bytes in all). Raises `WeightsError` that names the file and
    tensor that is damaged, and as `hub.resolve` does.
    """
    from fluxmesh.weights import loading, reader  # here: no other command of these needs mlx

    checkpoint = hub.resolve_any(name, download=False)
    with in_own_words(name):
        if checkpoint.tokenizers:  # what reads references has no words
            loading.load_tokenizers(checkpoint)
        damage = reader.first_not_finite(checkpoint, progress)
        if damage is not None:
            raise damage
    return checkpoint


@dataclass(frozen=True)
class Removable:
    """A model's files in the Hub's cache, all revisions of them."""

    name: str
    folder: Path
    nbytes: int


def removable(name: str) -> Removable:
    """What `remove` would remove: files that can be fetched again, and no others.

    Raises `UsageError` for a model that lies elsewhere, `ModelNotFoundError` where none is here.
    """
    if hub.alias_of(name) in embedded_names():
        raise UsageError(f"{name} is part of fluxmesh itself, and stays.")
    if os.path.exists(os.path.expanduser(name)) and hub.alias_of(name) is None:
        raise UsageError(
            f"{name} is a path of your own and not in the Hub's cache; remove it yourself."
        )
    folder = hub.folder_in_cache(name)
    if folder.is_symlink():
        target = os.readlink(folder)
        raise UsageError(f"{folder} is a link to {target}; remove both yourself.")
    if not folder.is_dir():
        raise ModelNotFoundError(f"{name} is not in the Hub's cache, {folder.parent}.")
    return Removable(name, folder, _size(folder))


def remove(model: Removable) -> None:
    """Removes a model's files. One that is broken off can be begun again. Raises `OutputError`."""
    with suppress(FileNotFoundError):
        # First the name of the revision: what is half removed is no model to anybody.
        (model.folder / "refs" / "main").unlink()
    try:
        shutil.rmtree(model.folder)
    except OSError as error:
        where = error.filename or model.folder
        raise OutputError(f"{where} can't be removed: {error.strerror or error}.") from error
    shutil.rmtree(model.folder.parent / ".locks" / model.folder.name, ignore_errors=True)


def _size(folder: Path) -> int:
    """Bytes of the files themselves: links to them take no room."""
    return sum(
        os.lstat(os.path.join(base, name)).st_size
        for base, _, names in os.walk(folder)
        for name in names
        if not os.path.islink(os.path.join(base, name))
    )
