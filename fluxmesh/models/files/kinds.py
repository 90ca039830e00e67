"""What a weights file is, as its header tells: how a kind is recognised, and the words for it.

Each family lists the files that are its own (`flux1/single_file.py`, `flux2/single_file.py`), and
`weights/foreign_files.py` those of others; `weights/identify.py` asks them in order. Nothing but
names and shapes of tensors is looked at. Imports no mlx.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fluxmesh.models.tensor_map import Shape

# What a file may be, beside a model that is read.
NAME_THE_TRANSFORMER = (
    "name the file of the transformer (flux1-….safetensors), which finds this one beside it or in "
    "ComfyUI's folders"
)
OTHER_FAMILY = "fluxmesh runs {families}: name one of their models"


@dataclass(frozen=True)
class FileContents:
    """The tensors of one file by name, and what its header says beside them."""

    path: Path
    shapes: Mapping[str, Shape]
    metadata: Mapping[str, str]

    def prefix_of(self, names: Sequence[str]) -> str | None:
        """What stands before all of `names` in the file, "" for nothing; None where one lacks.

        Where several do, as a model and its moving average, the shortest is taken.
        """
        first, *others = names
        prefixes = [
            key[: -len(first)] for key in self.shapes if key == first or key.endswith(f".{first}")
        ]
        for prefix in sorted(prefixes, key=len):
            if all(prefix + name in self.shapes for name in others):
                return prefix
        return None


@dataclass(frozen=True)
class FileKind:
    """A kind of file that people have, and what becomes of it."""

    what: str  # after "FILE is "
    remedy: str = ""  # what to do, where it is not read as a model ({families}: which there are)
    names: tuple[str, ...] = ()  # tensors that it holds, behind the same prefix
    pattern: str = ""  # or what the name of some tensor matches
    fits: Callable[[FileContents, str], bool] | None = None  # what must be true of shapes too
    family: str = ""  # of the model that it is, or is a part of
    component: str = ""  # which part

    def prefix_in(self, contents: FileContents) -> str | None:
        """What stands before the names of this kind's tensors; None where it is of another."""
        if self.names:
            prefix = contents.prefix_of(self.names)
        else:
            mark = re.compile(self.pattern)
            prefix = "" if any(map(mark.search, contents.shapes)) else None
        if prefix is None or (self.fits is not None and not self.fits(contents, prefix)):
            return None
        return prefix


def side(name: str, axis: int, *sizes: int) -> Callable[[FileContents, str], bool]:
    """Whether a tensor's axis has one of these sizes."""

    def check(contents: FileContents, prefix: str) -> bool:
        shape = contents.shapes[prefix + name]
        return axis < len(shape) and shape[axis] in sizes

    return check


def lacks(*names: str) -> Callable[[FileContents, str], bool]:
    """Whether none of these stands behind the prefix."""

    def check(contents: FileContents, prefix: str) -> bool:
        return not any(prefix + name in contents.shapes for name in names)

    return check
