"""A host's own folder of models: what a name leads to in it. Imports no mlx.

A checkpoint that is pushed to a host (`fluxmesh models push`) and is no snapshot of the Hub lands
there, as a folder that is complete in itself, under the last part of its name: the paths of one
host's disk mean nothing on another's. One of BFL's files lies in a folder of its own name, with
what it needs beside it.
"""

from __future__ import annotations

import os
from pathlib import Path

from fluxmesh.weights.identify import READ


def folder_name(model: str) -> str:
    """What the folder of a model is called in a folder of models.

    An alias or a Hub id is that itself; of a path it is the last part, without its suffix, and
    without what would make it a repository of a Hub cache.
    """
    name = model.rstrip("/")
    if os.path.isabs(name):
        name = os.path.basename(name).rpartition("--")[2]
    for suffix in READ:
        name = name.removesuffix(suffix)
    return name


def entry_in(folder: Path, model: str) -> Path:
    """The path that `hub.resolve` would take for a model in a folder of models; it need not exist.

    That is a diffusers folder, or the one file in a folder that has its name.
    """
    last = os.path.basename(model.rstrip("/"))
    if os.path.isabs(model) and last in ("", ".", ".."):  # no name: a folder of models is no model
        return Path(model)
    named = folder / (last if os.path.isabs(model) else model)
    own = named if named.exists() else folder / folder_name(model)
    if own.is_dir() and not (own / "model_index.json").exists():
        for suffix in READ:
            if (file := own / f"{own.name}{suffix}").is_file():
                return file
    return own
