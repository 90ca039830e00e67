"""Pictures become files: PNG with its recipe, grids, names that are free.

Below `generate.py`; `files.py` writes them, whole or not at all.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from fluxmesh.errors import NoSuchFolderError, OutputError, UsageError
from fluxmesh.storage.atomic import write_file
from fluxmesh.storage.writable import check_file, check_folder
from fluxmesh.version import __version__
from fluxmesh_coordinator.artifacts.recipe import KEYWORD

DEFAULT_STEM = "out"
GAP = 8  # pixels between the images of a grid


def encode_png(pixels: np.ndarray, recipe_json: str | None) -> bytes:
    """A PNG of uint8 (height, width, 3) `pixels`, with its recipe in a text chunk.

    None: with nothing but the pixels.
    """
    chunks = PngImagePlugin.PngInfo()
    if recipe_json is not None:
        chunks.add_text("Software", f"fluxmesh {__version__}")
        chunks.add_text(KEYWORD, recipe_json)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", pnginfo=chunks)
    return buffer.getvalue()


def grid(pictures: Sequence[np.ndarray], n_rows: int = 1) -> np.ndarray:
    """Equally large uint8 (height, width, 3) pictures, row by row; one picture stays as it is.

    What the last row lacks stays black.
    """
    if len(pictures) == 1:
        return pictures[0]
    columns = -(-len(pictures) // n_rows)
    height, width, channels = pictures[0].shape
    rows = -(-len(pictures) // columns)
    canvas = np.zeros(
        (rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, channels), dtype=np.uint8
    )
    for index, picture in enumerate(pictures):
        top = index // columns * (height + GAP)
        left = index % columns * (width + GAP)
        canvas[top : top + height, left : left + width] = picture
    return canvas


@dataclass(frozen=True)
class PicturePath:
    """Where pictures go: a name that the user gave, or the next free one."""

    folder: Path
    stem: str = DEFAULT_STEM
    suffix: str = ".png"
    given: bool = False  # the user named the file, so no other name will do
    force: bool = False  # replace what is there

    @classmethod
    def parse(cls, output: str | None, *, force: bool = False) -> PicturePath:
        """Reads `--output`: None, a folder, or the name of a PNG file.

        Raises `UsageError` for a name that isn't a PNG's, `NoSuchFolderError` for a folder that
        is missing, `OutputError` for one that takes no files.
        """
        if output is None:
            check_folder(Path())
            return cls(Path(), force=force)
        path = Path(os.path.expanduser(output))
        if not output:
            raise UsageError.about("output", "names nothing", "name a PNG file, or a folder")
        if os.path.isdir(path):
            target = cls(path, force=force)
        elif output.endswith(("/", os.sep)):
            raise NoSuchFolderError(
                f"`output` {output}: the folder does not exist; make it first.", setting="output"
            )
        elif path.suffix.lower() in ("", ".png") and path.name:
            target = cls(path.parent, path.stem, path.suffix or ".png", given=True, force=force)
        else:
            raise UsageError(
                f"`output` {output}: pictures are written as PNG; end it in .png.", setting="output"
            )
        if not os.path.lexists(target.folder):
            raise NoSuchFolderError(
                f"`output` {output}: the folder {target.folder} does not exist; make it first.",
                setting="output",
            )
        check_file(target.folder / f"{target.stem}{target.suffix}")
        return target


@dataclass
class PictureFiles:
    """The files of one call: NAME.png for each prompt, or NAME.0.png, NAME.1.png, ... raw.

    The prompts' names are `stem`, `stem-1`, `stem-2`, ...: with a name that the user gave,
    exactly these; else those of them that are free.
    """

    target: PicturePath
    n_prompts: int = 1
    n_images: int = 1
    save_raw: bool = False
    _taken: dict[int, int] = field(default_factory=dict)  # prompt -> the number of its name

    def __post_init__(self) -> None:
        """Raises `OutputError`, before any work is done, if a given name is taken."""
        if not self.target.given or self.target.force:
            return
        images = range(self.n_images) if self.save_raw else [None]
        for prompt in range(self.n_prompts):
            for image in images:
                path = self._path(self._numbered(prompt), image)
                if os.path.lexists(path):
                    raise OutputError(_exists(path))

    def save(self, prompt: int, image: int | None, data: bytes) -> Path:
        """Writes `data` for prompt `prompt`, and returns where; both count from 0.

        `image` is the raw image's number, or None for the grid (or single picture).
        """
        if self.target.given or self.target.force:
            path = self._path(self._numbered(prompt), image)
            try:
                write_file(path, data, replace=self.target.force)
            except FileExistsError as error:
                raise OutputError(_exists(path)) from error
            return path
        number = self._taken.get(prompt)
        if number is None:
            number = self._next_free(0)
        while True:
            path = self._path(self._numbered(number), image)
            try:
                write_file(path, data)
            except FileExistsError:
                # Somebody else took the name since: the next one, then.
                number = self._next_free(number + 1)
            else:
                self._taken[prompt] = number
                return path

    def _numbered(self, number: int) -> str:
        return self.target.stem if number == 0 else f"{self.target.stem}-{number}"

    def _path(self, name: str, image: int | None) -> Path:
        part = "" if image is None else f".{image}"
        return self.target.folder / f"{name}{part}{self.target.suffix}"

    def _next_free(self, number: int) -> int:
        """The first number from `number` on that no file of this name bears."""
        pattern = re.compile(
            re.escape(self.target.stem) + r"(?:-(\d+))?(?:\.\d+)?\.png", re.IGNORECASE
        )
        try:
            names = os.listdir(self.target.folder)
        except OSError as error:
            raise OutputError(
                f"The folder {self.target.folder} can't be read any more: {error.strerror}."
            ) from error
        used = {int(match[1] or 0) for match in map(pattern.fullmatch, names) if match}
        while number in used:
            number += 1
        return number


def _exists(path: Path) -> str:
    return f"{path} exists already: add `force` to replace it, or name another with `output`."


class StepFiles:
    """The pictures after each step, in a folder of their own (`--stepwise`)."""

    def __init__(self, folder: str, n_prompts: int, n_images: int, *, force: bool) -> None:
        """Raises `OutputError` if the folder has something in it already, or takes nothing, and
        `NoSuchFolderError` if it is none."""
        self.folder = Path(os.path.expanduser(folder))
        self.n_prompts = n_prompts
        self.n_images = n_images
        self.force = force
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            raise NoSuchFolderError(
                f"`stepwise` {folder} is no folder: name a new one.", setting="stepwise"
            )
        if self.folder.is_dir() and any(self.folder.iterdir()) and not force:
            raise OutputError(
                f"`stepwise` {folder} is not empty: name a new folder.", setting="stepwise"
            )
        check_folder(self.folder)

    def save(self, prompt: int, image: int, step: int, steps: int, data: bytes) -> Path:
        """Writes the preview after `step` (from 1) of `steps`; prompt and image count from 0."""
        name = f"step-{step:0{max(2, len(str(steps)))}}.png"
        if self.n_images > 1:
            name = f"image-{image}-{name}"
        if self.n_prompts > 1:
            name = f"prompt-{prompt}-{name}"
        path = self.folder / name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"`stepwise`: the folder {self.folder} can't be made: {error.strerror}.",
                setting="stepwise",
            ) from error
        try:
            write_file(path, data, replace=self.force)
        except FileExistsError as error:
            raise OutputError(
                f"`stepwise`: {path} exists already: name a new folder.", setting="stepwise"
            ) from error
        return path
