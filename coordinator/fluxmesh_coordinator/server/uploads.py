"""Pictures that clients send: decoded within limits before anything else looks at them.

A file of a few kilobytes may unpack to gigabytes: its size in pixels is read from its header, and
one that is too large is refused unread. Only common formats are opened at all.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Sequence
from functools import lru_cache

from PIL import Image

from fluxmesh.errors import UsageError
from fluxmesh.images.files import learn_heif

MAX_FILE = 32 << 20  # bytes
MAX_PIXELS = 64 << 20  # of one picture; the largest phones' have 50 million
MAX_ALL_PIXELS = 2 * MAX_PIXELS  # of a request's pictures of one kind, which are unpacked together
MAX_FILES = 17  # pictures and masks of a request
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "AVIF", "HEIF")
DATA_URL = re.compile(r"data:image/[\w.+-]{1,40}(?:;[\w=.+-]{1,40})*;base64,", re.IGNORECASE)


def checked_all(files: Sequence[bytes], texts: Sequence[object], setting: str) -> list[bytes]:
    """Pictures, in files or in base64, that are within the limits, each and together.

    Raises `UsageError`.
    """
    if len(files) + len(texts) > MAX_FILES:
        raise UsageError.about(setting, f"has more than {MAX_FILES} pictures", "send fewer")
    pictures = [*files, *(from_text(text, setting) for text in texts)]
    if sum(_pixels(data, setting) for data in pictures) > MAX_ALL_PIXELS:
        raise UsageError.about(
            setting,
            f"has more than {MAX_ALL_PIXELS >> 20} million pixels in all",
            "scale the pictures down first",
        )
    return pictures


def from_text(text: object, setting: str) -> bytes:
    """What is in base64, with or without the head of a data URL. Raises `UsageError`."""
    if not isinstance(text, str):
        raise UsageError.about(setting, "is no picture", "send it in base64")
    head = DATA_URL.match(text)
    text = text[head.end() :] if head else text
    if len(text) > MAX_FILE // 3 * 4 + 4:
        raise _too_large(setting)
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise UsageError.about(setting, "is not base64", "send a picture that is") from None


def _pixels(data: bytes, setting: str) -> int:
    """How many a picture has, by its header. Raises `UsageError` where it is not within limits."""
    if len(data) > MAX_FILE:
        raise _too_large(setting)
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as picture:
            width, height = picture.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, Image.DecompressionBombError):
            raise _too_many_pixels(setting) from None
        raise UsageError.about(
            setting, "can't be read as a picture", "send a PNG, JPEG or WebP file"
        ) from None
    if width * height > MAX_PIXELS:
        raise _too_many_pixels(setting)
    return int(width * height)


@lru_cache(1)
def _formats() -> tuple[str, ...]:
    """Those that this Pillow can read."""
    Image.init()
    learn_heif()
    return tuple(kind for kind in FORMATS if kind in Image.OPEN)


def _too_large(setting: str) -> UsageError:
    return UsageError.about(
        setting, f"is larger than {MAX_FILE >> 20} MiB", "scale the picture down first"
    )


def _too_many_pixels(setting: str) -> UsageError:
    return UsageError.about(
        setting, f"has more than {MAX_PIXELS >> 20} million pixels", "scale it down first"
    )
