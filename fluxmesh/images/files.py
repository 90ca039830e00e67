"""Files of pictures as uint8 arrays: any format, mode and orientation that Pillow reads.

Below masks and canvas, and the data sets of a training. HEIC, as iPhones save photos, is
read where pillow-heif is installed too: no dependency, for it brings 20 MB of libraries that most
users need not. Of a file that holds several pictures, an animation too, the first is read.
"""

from __future__ import annotations

import importlib
import io
import os
import warnings
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fluxmesh.errors import UsageError

# What is named like a picture. Of these, some need a Pillow that can: `open_picture` says so.
SUFFIXES = {
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".gif", ".bmp", ".dib"),
    *(".tif", ".tiff", ".avif", ".avifs", ".heic", ".heics", ".heif", ".hif", ".jxl", ".jp2"),
    *(".j2k", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".psd"),
}
# Of cameras: as a TIFF, which most of them are, Pillow reads a thumbnail, or not yet developed.
RAW_SUFFIXES = {
    *(".dng", ".cr2", ".cr3", ".nef", ".nrw", ".arw", ".raf", ".orf", ".rw2", ".pef", ".srw"),
    *(".x3f", ".raw"),
}
# The brand in the box that such a file begins with (ISO/IEC 23008-12, annex B; AV1 image format).
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1")
AVIF_BRANDS = (b"avif", b"avis")
TO_JPEG = "on a Mac by `sips -s format jpeg -o OUT.jpg IN.heic`"
HEIF_REMEDY = f"`pip install pillow-heif`, or make a JPEG of it, {TO_JPEG}"
MOVING = ("GIF", "PNG", "WEBP", "AVIF")  # formats whose further pictures are an animation's

PictureFile = str | PathLike[str] | bytes  # a path, or what is in the file


def read_picture(file: PictureFile, field: str = "image") -> np.ndarray:
    """The picture as a viewer shows it: uint8 (height, width, 3), EXIF rotation applied.

    Transparent parts become white. Raises `UsageError` naming the file, as the setting `field`.
    """
    return over(open_picture(*named(file, field)), background=255)


def pixels_of(picture: PictureFile | np.ndarray, field: str) -> np.ndarray:
    """A picture that a program has as a file, or as pixels, which are given back.

    Raises what `read_picture` does, and `UsageError` for what is neither.
    """
    if isinstance(picture, np.ndarray):
        return picture
    if not isinstance(picture, (str, PathLike, bytes)):
        raise UsageError.about(
            field,
            f"has a {type(picture).__name__}",
            "give a path, the bytes of a file, or a uint8 array [height, width, 3]",
        )
    return read_picture(picture, field)


def listed(pictures: Iterable[Any], field: str) -> list[Any]:
    """Pictures that a program gives, as a list. Raises `UsageError` for one alone, which would
    otherwise be read letter by letter, or row by row."""
    if isinstance(pictures, (str, PathLike, bytes, np.ndarray)):
        raise UsageError.about(field, "is one picture", "put it into a list")
    return list(pictures)


def decode_picture(data: bytes, name: str) -> np.ndarray:
    """As `read_picture`, from the file's bytes; a `UsageError` begins with `name`."""
    return over(open_picture(io.BytesIO(data), name), background=255)


def is_moving(data: bytes) -> bool:
    """Whether a file that can be read is an animation, of which the first picture is taken."""
    with Image.open(io.BytesIO(data)) as picture:
        return picture.format in MOVING and getattr(picture, "n_frames", 1) > 1


def named(file: PictureFile, field: str) -> tuple[Path | io.BytesIO, str]:
    """What to open, and what messages call it."""
    if isinstance(file, bytes):
        return io.BytesIO(file), f"`{field}`"
    return Path(file), f"`{field}` {os.fspath(file)}"


def open_picture(file: Path | io.BytesIO, name: str) -> Image.Image:
    """The decoded file, turned as its EXIF orientation says; messages call it `name`.

    Raises `UsageError` for a file that is missing, damaged, of another kind, or too large.
    """
    brand = _brand(file)
    if brand in HEIF_BRANDS:
        learn_heif()
    try:
        with warnings.catch_warnings():  # of 90 million pixels on, which is a large photo
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(file)
        with picture:
            picture.load()
            return ImageOps.exif_transpose(picture)
    except FileNotFoundError:
        raise UsageError(f"{name} does not exist; check the path.") from None
    except Image.DecompressionBombError:
        raise UsageError(f"{name} has too many pixels; scale it down first.") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        unknown = isinstance(error, UnidentifiedImageError)  # whose text is Python's own name
        if unknown and brand in HEIF_BRANDS:
            raise UsageError(
                f"{name} is HEIC, as iPhones save photos, which can't be read; {HEIF_REMEDY}."
            ) from None
        if unknown and brand in AVIF_BRANDS:
            raise UsageError(
                f"{name} is AVIF, which this Pillow can't read; `pip install -U Pillow`, or make a "
                "PNG of it."
            ) from None
        detail = "unknown format" if unknown else str(error).partition("\n")[0]
        detail = detail or type(error).__name__
        raise UsageError(
            f"{name} can't be read as a picture ({detail}); give a PNG, JPEG or WebP file."
        ) from None


def learn_heif() -> bool:
    """Has Pillow read HEIC from now on; whether it can."""
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError:
        return False
    return True


def over(picture: Image.Image, background: int) -> np.ndarray:
    """Any mode as uint8 RGB, laid over a grey of value `background` where it is transparent."""
    if is_deep(picture):
        # Pillow clips deep greys to 255 instead of scaling them: a 16-bit scan turns white.
        values = np.nan_to_num(np.asarray(picture, np.float64))
        top = values.max(initial=0.0)
        full = 1.0 if picture.mode == "F" and top <= 1 else 255.0 if top <= 255 else 65535.0
        grey = np.round(np.clip(values / full, 0, 1) * 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        below = Image.new("RGBA", picture.size, (background, background, background, 255))
        picture = Image.alpha_composite(below, picture)
    return np.array(picture.convert("RGB"))


def is_deep(picture: Image.Image) -> bool:
    """Whether its greys have more than 8 bits."""
    return picture.mode.startswith(("I", "F"))


def _brand(file: Path | io.BytesIO) -> bytes:
    """What an ISO media file says it is; b"" for any other."""
    try:
        head = file.getvalue()[:12] if isinstance(file, io.BytesIO) else _head(file, 12)
    except (OSError, ValueError):
        return b""
    return head[8:12] if head[4:8] == b"ftyp" else b""


def _head(path: Path, count: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(count)
