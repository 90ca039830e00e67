"""Writing a checkpoint's folder: whole under its name, or not at all. Imports no mlx.

Below `quantize.py` and `fuse.py`, which write the weights; what surrounds them (configs,
tokenizers, `fluxmesh.json`) is written here, as `checkpoint.py` reads it back.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fluxmesh.storage.atomic import whole_folder
from fluxmesh.storage.safetensors import cannot_write
from fluxmesh.storage.writable import check_new
from fluxmesh.version import __version__
from fluxmesh.weights.checkpoint import FORMAT, MANIFEST, Checkpoint

SHARD_BYTES = 1 << 30  # a file of the folder; also what is held in memory before it is written


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name when the block ends well.

    Raises `OutputError` where `folder` exists or can't be written. A failure leaves nothing.
    """
    check_new(folder)
    try:
        with whole_folder(folder) as partial:
            yield partial
    except OSError as error:
        raise cannot_write(folder, error) from error


def write_surroundings(source: Checkpoint, folder: Path, manifest: Mapping[str, Any]) -> None:
    """All that a folder holds beside its models: tokenizers, scheduler and `fluxmesh.json`.

    `manifest` is added to what the latter says of every folder.
    """
    form, model = source.family.folder, source.architecture
    for name, tokenizer in form.tokenizers.items():
        (folder / name).mkdir()
        files = {file for choice in tokenizer.choices for file in choice}
        for file in sorted({*files, *tokenizer.beside, "tokenizer_config.json"}):
            original = source.tokenizers[tokenizer.component] / file
            if original.is_file():
                shutil.copyfile(original, folder / name / file)
    (folder / "scheduler").mkdir()
    schedule = dataclasses.asdict(model.configs["schedule"])
    write_json(folder / "scheduler" / "scheduler_config.json", schedule)
    write_json(folder / "model_index.json", form.index(model))
    defaults = dataclasses.asdict(source.defaults)
    del defaults["t5_max_length"]  # the tokenizer says
    entries = {
        "format": FORMAT,
        "defaults": defaults,
        "source": {"name": source.name, "revision": source.revision},
        "fluxmesh": __version__,
    }
    write_json(folder / MANIFEST, entries | dict(manifest))


def config_of(source: Checkpoint, component: str) -> dict[str, Any]:
    """The component's config.json, spelled as its family reads it back."""
    return source.family.folder.config(source.architecture, component)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A new file."""
    with open(path, "x", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
