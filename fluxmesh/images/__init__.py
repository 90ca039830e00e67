"""Pictures and masks from the user's files, made ready as a request's `SourceImage`.

Image-to-image, inpainting and outpainting all begin here: a file in any orientation, mode and
size goes in, a uint8 picture whose sides suit the model comes out, with a mask at the same size.
NumPy and Pillow only, no mlx: the command line and a coordinator call it; the pipeline
(`fluxmesh.engine.pipeline`) only ever sees arrays.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps

from fluxmesh.errors import UsageError
from fluxmesh.images.files import PictureFile, read_picture
from fluxmesh.images.masks import read_mask
from fluxmesh.request import MAX_SIDE, SourceImage

MULTIPLE = 16  # pixels: one packed 2x2 patch of latents, at 8 pixels a latent
STRENGTH = 0.6  # of image-to-image, when the user gives none
REPAINT = 1.0  # of inpainting and outpainting: nothing is kept of what is painted over

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
    tell: Callable[[str], None] = lambda _: None,
) -> SourceImage:
    """Reads what `--image`, `--mask` and `--outpaint` name, or the bytes of such files.

    The picture takes `height` x `width` pixels where given (scaled to cover, cut around the
    centre); else its own size, scaled down to `max_area` square pixels if it is larger, and
    each side brought to a multiple of 16. `outpaint` adds margins (left, top, right, bottom,
    in the file's own pixels), which grow where a side needs it to be a multiple of 16.
    `strength` None is 0.6, or 1 where a mask or margins say what is painted. `tell` hears, in a
    sentence, of margins that grew, of a picture that takes another size, and of a mask that is read
    by what is transparent.

    Raises `UsageError` for a file that is no picture, a mask of other proportions or that paints
    nothing, margins below 0, or a picture that is too large.
    """
    pixels = read_picture(image)
    painted = None if mask is None else read_mask(mask, like=pixels, tell=tell)
    if outpaint is not None:
        _check_margins(outpaint)
        round_up = height is None and width is None
        grown = _grown(pixels.shape, outpaint) if round_up else outpaint
        if grown != outpaint:
            asked, given = (",".join(map(str, margins)) for margins in (outpaint, grown))
            tell(f"`outpaint` {asked} became {given}: sides are multiples of {MULTIPLE}.")
        pixels, painted = outpaint_canvas(pixels, grown, mask=painted, round_up=False)
    size = _target_size(pixels.shape[0], pixels.shape[1], height, width, max_area)
    if size != pixels.shape[:2]:
        name = "The picture" if isinstance(image, bytes) else os.fspath(image)
        sizes = [f"{each[0]}x{each[1]}" for each in (pixels.shape, size)]
        tell(f"{name} becomes {sizes[1]} pixels; it is {sizes[0]}.")
    if strength is None:
        strength = STRENGTH if painted is None else REPAINT
    if painted is not None:
        painted = _cover(painted, size, Image.Resampling.BILINEAR)
        if not painted.any() and mask is None:
            raise UsageError.about("outpaint", "adds nothing", "give a margin above 0")
        if not painted.any():
            raise UsageError(
                f"`mask` paints nothing that is left at {size[0]}x{size[1]} pixels; give an "
                "`image_size` of the picture's proportions, or paint a larger part.",
                setting="mask",
            )
    return SourceImage(
        pixels=_cover(pixels, size, Image.Resampling.LANCZOS),
        strength=strength,
        mask=painted,
    )


def canvas_size(image: PictureFile, outpaint: Margins | None = None) -> tuple[int, int]:
    """Height and width of a picture with its margins. Raises `UsageError`."""
    height, width = read_picture(image).shape[:2]
    left, top, right, bottom = outpaint or (0, 0, 0, 0)
    return height + top + bottom, width + left + right


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
    _check_margins(margins)
    left, top, right, bottom = _grown(pixels.shape, margins) if round_up else margins
    height, width = pixels.shape[0] + top + bottom, pixels.shape[1] + left + right
    _check_side("outpaint", height, width)
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
    _check_side("image", *size)
    return size


def _check_margins(margins: Margins) -> None:
    if any(margin < 0 for margin in margins):
        raise UsageError.about(
            "outpaint", f"has margins {margins}", "each must be 0 or more pixels"
        )


def _check_side(setting: str, height: int, width: int) -> None:
    if max(height, width) > MAX_SIDE:
        raise UsageError(
            f"`{setting}` would give a picture of {height}x{width}; a side is at most {MAX_SIDE} "
            "pixels, so scale the input down or give `image_size`.",
            setting=setting,
        )


def _cover(values: np.ndarray, size: tuple[int, int], resample: Image.Resampling) -> np.ndarray:
    """Scaled to cover `size`, proportions kept, and cut around the centre; untouched if equal."""
    if values.shape[:2] == size:
        return values
    height, width = size
    return np.array(ImageOps.fit(Image.fromarray(values), (width, height), resample))


def _grown(shape: tuple[int, ...], margins: Margins) -> Margins:
    """Margins around a picture of `shape` (height, width, ...) that make both sides fit."""
    left, top, right, bottom = margins
    top, bottom = _grow(shape[0], top, bottom)
    left, right = _grow(shape[1], left, right)
    return left, top, right, bottom


def _grow(side: int, before: int, after: int) -> tuple[int, int]:
    """Margins that bring `before + side + after` to a multiple of 16."""
    missing = -(before + side + after) % MULTIPLE
    return (before + missing, after) if before > after else (before, after + missing)


def to_model_range(pixels: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] to float32 [1, H, W, 3] in [-1, 1], what the autoencoder encodes."""
    return 2.0 * (pixels[None].astype(np.float32) / 255.0) - 1.0
