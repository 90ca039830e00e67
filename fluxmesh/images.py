"""Pictures and masks from the user's files, made ready as a request's `SourceImage`.

Image-to-image, inpainting and outpainting all begin here: a file in any orientation, mode and
size goes in, a uint8 picture whose sides suit the model comes out, with a mask at the same size.
NumPy and Pillow only, no mlx: the command line and a coordinator call it; the pipeline
(`fluxmesh.engine.pipeline`) only ever sees arrays.
"""

from __future__ import annotations

import io
import math
import os
from os import PathLike
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fluxmesh.errors import UsageError
from fluxmesh.request import MAX_SIDE, SourceImage

MULTIPLE = 16  # pixels: one packed 2x2 patch of latents, at 8 pixels a latent
STRENGTH = 0.6  # of image-to-image, when the user gives none
REPAINT = 1.0  # of inpainting and outpainting: nothing is kept of what is painted over
MAX_MASK_SKEW = 0.02  # how far the mask's proportions may be from the picture's
# iPhones save photos so, and Pillow alone does not read them.
HEIF_SUFFIXES = (".heic", ".heif")
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1")
TO_JPEG = "on a Mac by `sips -s format jpeg -o OUT.jpg IN.heic`"

PictureFile = str | PathLike[str] | bytes  # a path, or what is in the file
Margins = tuple[int, int, int, int]  # left, top, right, bottom, in pixels


def load_source(
    image: PictureFile,
    *,
    mask: PictureFile | None = None,
    outpaint: Margins | None = None,
    strength: float | None = None,
    height: int | None = None,
    width: int | None = None,
    max_area: int | None = None,
) -> SourceImage:
    """Reads what `--image`, `--mask` and `--outpaint` name, or the bytes of such files.

    The picture takes `height` x `width` pixels where given (scaled to cover, cut around the
    centre); else its own size, scaled down to `max_area` square pixels if it is larger, and
    each side brought to a multiple of 16. `outpaint` adds margins (left, top, right, bottom,
    in the file's own pixels), which grow where a side needs it to be a multiple of 16.
    `strength` None is 0.6, or 1 where a mask or margins say what is painted.

    Raises `UsageError` for a file that is no picture, a mask of other proportions, margins
    below 0, or a picture that is too large.
    """
    pixels = read_picture(image)
    painted = None if mask is None else read_mask(mask, like=pixels)
    if outpaint is not None:
        round_up = height is None and width is None
        pixels, painted = outpaint_canvas(pixels, outpaint, mask=painted, round_up=round_up)
    size = _target_size(pixels.shape[0], pixels.shape[1], height, width, max_area)
    if strength is None:
        strength = STRENGTH if painted is None else REPAINT
    return SourceImage(
        pixels=_cover(pixels, size, Image.Resampling.LANCZOS),
        strength=strength,
        mask=None if painted is None else _cover(painted, size, Image.Resampling.BILINEAR),
    )


def read_picture(file: PictureFile) -> np.ndarray:
    """The picture as a viewer shows it: uint8 (height, width, 3), EXIF rotation applied.

    Transparent parts become white. Raises `UsageError` naming the file.
    """
    return _over(_open(*_named(file, "image")), background=255)


def decode_picture(data: bytes, name: str) -> np.ndarray:
    """As `read_picture`, from the file's bytes; a `UsageError` begins with `name`."""
    return _over(_open(io.BytesIO(data), name), background=255)


def read_mask(file: PictureFile, like: np.ndarray | None = None) -> np.ndarray:
    """A mask as uint8 (height, width): 255 (white) is painted, 0 (black) stays, greys blend.

    With `like`, the mask is brought to that picture's size; proportions that differ raise
    `UsageError`, since the mask was then drawn over something else.
    """
    opened, name = _named(file, "mask")
    mask = _open(opened, name)
    grey = np.asarray(Image.fromarray(_over(mask, background=0)).convert("L"))
    if like is None or grey.shape == like.shape[:2]:
        return grey
    height, width = like.shape[:2]
    skew = (grey.shape[1] * height) / (grey.shape[0] * width)
    if abs(skew - 1) > MAX_MASK_SKEW:
        raise UsageError(
            f"{name} is {grey.shape[1]}x{grey.shape[0]} pixels and the picture is "
            f"{width}x{height}; draw the mask at the picture's size."
        )
    return np.asarray(Image.fromarray(grey).resize((width, height), Image.Resampling.BILINEAR))


def outpaint_canvas(
    pixels: np.ndarray,
    margins: Margins,
    *,
    mask: np.ndarray | None = None,
    round_up: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """A larger picture around `pixels`, and the mask (uint8, height x width) of what is new.

    `margins` are pixels to the left, top, right and bottom. With `round_up`, each axis grows
    to a multiple of 16 on the side with the wider margin (right or bottom when equal). New
    parts repeat the edge until the model paints them; `mask` adds parts of the old picture.
    """
    if any(margin < 0 for margin in margins):
        raise UsageError.about(
            "outpaint", f"has margins {margins}", "each must be 0 or more pixels"
        )
    left, top, right, bottom = margins
    if round_up:
        top, bottom = _grow(pixels.shape[0], top, bottom)
        left, right = _grow(pixels.shape[1], left, right)
    height, width = pixels.shape[0] + top + bottom, pixels.shape[1] + left + right
    _check_side(height, width)
    around = ((top, bottom), (left, right))
    canvas = np.pad(pixels, (*around, (0, 0)), mode="edge")
    inside = np.zeros(pixels.shape[:2], np.uint8) if mask is None else mask
    return canvas, np.pad(inside, around, constant_values=255)


def parse_margins(text: str) -> Margins:
    """`--outpaint L,T,R,B` as four numbers of pixels; raises `UsageError`."""
    parts = text.split(",")
    if len(parts) == 4 and all(part.strip().isdecimal() for part in parts):
        left, top, right, bottom = (int(part) for part in parts)
        return left, top, right, bottom
    raise UsageError.about(
        "outpaint", f"is {text!r}", "give left,top,right,bottom in pixels, such as 0,0,128,0"
    )


def composite(pixels: np.ndarray, source: SourceImage) -> np.ndarray:
    """The finished picture, uint8 [H, W, 3]: `pixels` where painted, the user's own elsewhere.

    Greys of the mask blend the two; where it is 0 the result equals the source exactly.
    """
    if source.mask is None:
        return pixels
    alpha = source.mask[:, :, None].astype(np.float32) / 255.0
    blended = alpha * pixels + (1 - alpha) * source.pixels
    return np.round(blended).astype(np.uint8)


def _named(file: PictureFile, field: str) -> tuple[Path | io.BytesIO, str]:
    """What to open, and what messages call it."""
    if isinstance(file, bytes):
        return io.BytesIO(file), f"`{field}`"
    return Path(file), f"`{field}` {os.fspath(file)}"


def _open(file: Path | io.BytesIO, name: str) -> Image.Image:
    """The decoded file, turned as its EXIF orientation says; messages call it `name`."""
    try:
        with Image.open(file) as picture:
            picture.load()
            return ImageOps.exif_transpose(picture)
    except FileNotFoundError:
        raise UsageError(f"{name} does not exist; check the path.") from None
    except Image.DecompressionBombError:
        raise UsageError(f"{name} has too many pixels; scale it down first.") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        if _is_heif(file):
            raise UsageError(
                f"{name} is HEIC, as iPhones save photos, which can't be read; make a JPEG of it, "
                f"{TO_JPEG}."
            ) from None
        unknown = isinstance(error, UnidentifiedImageError)  # whose text is Python's own name
        detail = "unknown format" if unknown else str(error).partition("\n")[0]
        detail = detail or type(error).__name__
        raise UsageError(
            f"{name} can't be read as a picture ({detail}); give a PNG, JPEG or WebP file."
        ) from None


def _is_heif(file: Path | io.BytesIO) -> bool:
    """By the brand in the box that such a file begins with (ISO/IEC 23008-12, annex B)."""
    try:
        head = file.getvalue()[:12] if isinstance(file, io.BytesIO) else _head(file, 12)
    except OSError:
        return False
    return head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS


def _head(path: Path, count: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(count)


def _over(picture: Image.Image, background: int) -> np.ndarray:
    """Any mode as uint8 RGB, laid over a grey of value `background` where it is transparent."""
    if picture.mode.startswith(("I", "F")):
        # Pillow clips deep greys to 255 instead of scaling them: a 16-bit scan turns white.
        values = np.asarray(picture, np.float64)
        top = values.max(initial=0.0)
        full = 1.0 if picture.mode == "F" and top <= 1 else 255.0 if top <= 255 else 65535.0
        grey = np.round(np.clip(values / full, 0, 1) * 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        below = Image.new("RGBA", picture.size, (background, background, background, 255))
        picture = Image.alpha_composite(below, picture)
    return np.array(picture.convert("RGB"))


def _target_size(
    height: int, width: int, new_height: int | None, new_width: int | None, max_area: int | None
) -> tuple[int, int]:
    """(height, width) that the canvas takes, multiples of 16; one given side sets the other."""
    if new_height is not None and new_width is not None:
        return new_height, new_width
    scale = 1.0
    if new_height is not None:
        scale = new_height / height
    elif new_width is not None:
        scale = new_width / width
    elif max_area is not None and height * width > max_area:
        scale = math.sqrt(max_area / (height * width))
    size = (
        new_height or max(MULTIPLE, round(height * scale / MULTIPLE) * MULTIPLE),
        new_width or max(MULTIPLE, round(width * scale / MULTIPLE) * MULTIPLE),
    )
    _check_side(*size)
    return size


def _check_side(height: int, width: int) -> None:
    if max(height, width) > MAX_SIDE:
        raise UsageError(
            f"the picture would be {height}x{width}; a side is at most {MAX_SIDE} pixels, "
            "so scale the input down or give `image_size`."
        )


def _cover(values: np.ndarray, size: tuple[int, int], resample: Image.Resampling) -> np.ndarray:
    """Scaled to cover `size`, proportions kept, and cut around the centre; untouched if equal."""
    if values.shape[:2] == size:
        return values
    height, width = size
    return np.array(ImageOps.fit(Image.fromarray(values), (width, height), resample))


def _grow(side: int, before: int, after: int) -> tuple[int, int]:
    """Margins that bring `before + side + after` to a multiple of 16."""
    missing = -(before + side + after) % MULTIPLE
    return (before + missing, after) if before > after else (before, after + missing)


def to_model_range(pixels: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] to float32 [1, H, W, 3] in [-1, 1], what the autoencoder encodes."""
    return 2.0 * (pixels[None].astype(np.float32) / 255.0) - 1.0
