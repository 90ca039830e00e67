"""The folder of finished pictures: each appears whole, under a name that no client chose.

Names sort by time: `20261128-161530-123-1f0c9a7be2d4-0.png` is image 0 of the job whose id has that
hash. Nothing else in the folder is ever listed, read or removed.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from fluxmesh.errors import FluxmeshError, OutputError
from fluxmesh.storage.atomic import write_file
from fluxmesh_coordinator.artifacts.recipe import KEYWORD, Recipe, read_recipe

NAME = re.compile(r"\d{8}-\d{6}-\d{3}-[0-9a-f]{12}-\d{1,4}\.png")
THUMBNAIL = 320  # pixels of the longer side
KEPT_THUMBNAILS = 256


class NoSuchPictureError(FluxmeshError):
    """No picture of the folder is called so."""


@dataclass(frozen=True)
class SavedPicture:
    """A picture of the folder."""

    name: str
    width: int
    height: int
    created: str  # 2026-11-28T16:15:30.123Z
    recipe: dict[str, Any]


class PictureFolder:
    """The folder. Everything here blocks."""

    def __init__(self, folder: Path) -> None:
        """Makes the folder if it is missing. Raises `OutputError`."""
        self.folder = folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"The folder of pictures {folder} can't be made: {error.strerror}."
            ) from error
        self._thumbnail = lru_cache(KEPT_THUMBNAILS)(self._scaled)

    def commit(self, job: str, accepted: float, image: int, data: bytes) -> str:
        """Writes a finished picture of a job, accepted at that time, and returns its name.

        Raises `OutputError`.
        """
        name = self.name_of(job, accepted, image)
        try:
            write_file(self.folder / name, data)
        except FileExistsError as error:
            raise OutputError(f"There is a picture {name} already; send the job again.") from error
        return name

    @staticmethod
    def name_of(job: str, accepted: float, image: int) -> str:
        """What a picture of a job is called, of which `accepted` is in seconds since 1970."""
        clock = time.strftime("%Y%m%d-%H%M%S", time.gmtime(accepted))
        return f"{clock}-{int(accepted % 1 * 1000):03}-{_hash(job)}-{image}.png"

    def of_job(self, job: str, accepted: float, n_images: int) -> dict[int, str]:
        """The pictures of a job that are there, by image."""
        names = {image: self.name_of(job, accepted, image) for image in range(n_images)}
        return {image: name for image, name in names.items() if self.has(name)}

    def has(self, name: str) -> bool:
        """Whether there is a picture of that name."""
        try:
            return bool(self.path(name))
        except NoSuchPictureError:
            return False

    def recipe(self, name: str) -> Recipe | None:
        """How a picture was made; None: it is not there, or does not say."""
        try:
            return read_recipe(self.path(name))
        except FluxmeshError:
            return None

    def newest(self, limit: int, before: str = "") -> tuple[list[SavedPicture], str]:
        """Pictures, newest first, and the name to go on before: "" where there are no more."""
        names = sorted(self._names(), reverse=True)
        if before:
            names = [name for name in names if name < before]
        pictures = [picture for name in names[:limit] if (picture := self._read(name)) is not None]
        return pictures, names[limit - 1] if len(names) > limit else ""

    def path(self, name: str) -> Path:
        """The file of a picture. Raises `NoSuchPictureError`."""
        path = self.folder / name if NAME.fullmatch(name) else None
        if path is None or not path.is_file() or path.is_symlink():
            raise _no_such_picture()
        return path

    def read(self, name: str) -> bytes:
        """A picture's file. Raises `NoSuchPictureError`, `OutputError`."""
        path = self.path(name)
        try:
            return path.read_bytes()
        except FileNotFoundError:  # removed since
            raise _no_such_picture() from None
        except OSError as error:
            raise OutputError(f"{name} can't be read: {error.strerror}.") from error

    def thumbnail(self, name: str) -> bytes:
        """A small JPEG of a picture. Raises `NoSuchPictureError`."""
        path = self.path(name)
        try:
            return self._thumbnail(path)
        except FileNotFoundError:
            raise _no_such_picture() from None

    def remove(self, name: str) -> None:
        """Raises `NoSuchPictureError`, `OutputError`."""
        path = self.path(name)
        try:
            path.unlink()
        except FileNotFoundError:
            raise _no_such_picture() from None
        except OSError as error:
            raise OutputError(f"{name} can't be removed: {error.strerror}.") from error

    def _names(self) -> Sequence[str]:
        try:
            return [name for name in os.listdir(self.folder) if NAME.fullmatch(name)]
        except OSError as error:
            raise OutputError(
                f"The folder of pictures {self.folder} can't be read: {error.strerror}."
            ) from error

    def _read(self, name: str) -> SavedPicture | None:
        """None where a file is none of ours."""
        try:
            with Image.open(self.folder / name, formats=["PNG"]) as picture:
                width, height = picture.size
                text = picture.info.get(KEYWORD, "")  # `text` would unpack all its pixels
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return None
        return SavedPicture(name, width, height, _created(name), _recipe(text))

    @staticmethod
    def _scaled(path: Path) -> bytes:
        with Image.open(path, formats=["PNG"]) as picture:
            small = picture.convert("RGB")
            small.thumbnail((THUMBNAIL, THUMBNAIL))
        out = io.BytesIO()
        small.save(out, "JPEG", quality=85)
        return out.getvalue()


def _no_such_picture() -> NoSuchPictureError:
    return NoSuchPictureError("There is no picture of that name.")


def _hash(job: str) -> str:
    return hashlib.sha256(job.encode()).hexdigest()[:12]


def _created(name: str) -> str:
    day, clock, millis = name.split("-")[:3]
    return f"{day[:4]}-{day[4:6]}-{day[6:]}T{clock[:2]}:{clock[2:4]}:{clock[4:]}.{millis}Z"


def _recipe(text: str) -> dict[str, Any]:
    """What a picture says of how it was made, as a client may set it again."""
    try:
        recipe = Recipe.from_json(text)
    except ValueError:
        return {}
    return {
        "prompt": recipe.prompt,
        "model": recipe.model,
        "seed": recipe.seed,
        "width": recipe.width,
        "height": recipe.height,
        "steps": recipe.steps,
        "guidance": recipe.guidance,
        "adapters": [{"name": path, "strength": scale} for path, scale, _ in recipe.adapters],
        "placement": recipe.placement,
        "from_picture": recipe.source is not None,
        "strength": recipe.source.strength if recipe.source else None,
        "references": len(recipe.references),
        "control": recipe.control is not None or recipe.control_from is not None,
        "negative_prompt": recipe.negative or "",
        "cfg": recipe.cfg,
        "bits": recipe.bits,
        "text_bits": recipe.text_bits,
        "dtype": recipe.dtype,
        "cache": recipe.cache,
        "t5_padding": recipe.t5_padding,
        "fuse_adapters": recipe.fuse_adapters,
        "version": recipe.version,
    }
