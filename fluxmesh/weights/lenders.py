"""Folders on this machine that lend what a model in loose files lacks. Imports no mlx.

Below `single_files.py` and `mflux_folder.py`, which say what that is. A vocabulary is taken where
it has as many tokens as the text encoder has rows; a config where it has exactly the sizes that the
tensors show, for the rest, which no shape tells.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fluxmesh.errors import FluxmeshError, ModelNotFoundError, WeightsError
from fluxmesh.models.files.family import Choices, Family
from fluxmesh.weights.checkpoint import weight_files
from fluxmesh.weights.configs import config_in, schedule_in
from fluxmesh.weights.folder_files import vocabulary_in


@dataclass(frozen=True)
class Lenders:
    """Folders on this machine that may give a single file what it lacks, the first first."""

    family: Family  # whose parts are looked for
    folders: Sequence[Path] = ()  # of whole models, or some parts of one
    package: Sequence[Path] = ()  # of models whose weights nobody else's transformer takes
    autoencoder: Path | None = None  # the file that the user names for it

    def lacks(self, parts: Iterable[str]) -> list[str]:
        """Those of the parts that no folder has; "tokenizer" and the others by their folders."""
        return [
            part for part in parts if not any(self._has(folder, part) for folder in self.folders)
        ]

    def near(self, folder: Path) -> Self:
        """The same, a folder first."""
        return dataclasses.replace(self, folders=(folder, *self.folders))

    def completed(self, part: str, sizes: Any) -> Any:
        """The config of a model that has exactly these sizes, for what shapes don't tell."""
        hidden_fields = self.family.files.shapes_hide[part]
        for folder in (*self.folders, *self.package):
            with contextlib.suppress(FluxmeshError):
                known = config_in(folder, part, self.family.folder)
                hidden = {name: getattr(known, name) for name in hidden_fields}
                if dataclasses.replace(sizes, **hidden) == known:
                    return known
        return sizes

    def schedule(self, transformer: Any) -> Any:
        """That of a model with the same transformer, else BFL's."""
        form = self.family.folder
        for folder in (*self.folders, *self.package):
            with contextlib.suppress(FluxmeshError):
                if config_in(folder, "transformer", form) == transformer:
                    return schedule_in(folder, form)
        return self.family.files.schedule(transformer)

    def tokenizer(self, part: str, config: Any) -> Path | None:
        """A folder whose vocabulary is that of an encoder of these sizes; None for none."""
        choices = self.family.folder.tokenizers[part].choices
        for folder in (*self.folders, *self.package):
            for place in (folder / part, folder):
                if _has_one_of(place, choices) and self._speaks(place, part, config):
                    return place
        return None

    def _has(self, folder: Path, part: str) -> bool:
        """Whether a folder has a component's config and weights, or a vocabulary."""
        form = self.family.folder
        if part in form.components:
            with contextlib.suppress(FluxmeshError):
                config_in(folder, part, form)
                return bool(weight_files(folder / part))
            return False
        own, *_ = choices = form.tokenizers[part].choices
        # a tokenizer.json beside others may be any model's
        return _has_one_of(folder / part, choices) or _has_one_of(folder, (own,))

    def _speaks(self, folder: Path, part: str, config: Any) -> bool:
        try:
            return self.family.files.speaks(folder, part, config)
        except (ModelNotFoundError, WeightsError):
            return False


def _has_one_of(folder: Path, choices: Choices) -> bool:
    """Whether a folder has the files of a vocabulary."""
    names = [path.name for path in folder.glob("*.*") if path.is_file()]
    return vocabulary_in(names, choices) is not None
