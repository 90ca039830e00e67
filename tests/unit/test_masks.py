"""Masks: which side is painted, whatever mode, depth, orientation and size a file has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fluxmesh.errors import UsageError
from fluxmesh.images import load_source
from fluxmesh.images.masks import read_mask

RIGHT = np.repeat([[0] * 20 + [255] * 12], 24, axis=0).astype(np.uint8)  # [24, 32], right painted
PALETTE = [10, 10, 10, 250, 250, 250] + [0] * 762


def hole(colour: tuple[int, int, int]) -> Image.Image:
    """All of one colour, and transparent on the right."""
    picture = Image.new("RGB", (32, 24), colour)
    picture.putalpha(Image.fromarray(255 - RIGHT))
    return picture


def palette_hole() -> Image.Image:
    picture = Image.fromarray((RIGHT // 255).astype(np.uint8), "P")
    picture.putpalette(PALETTE)
    picture.info["transparency"] = 1
    return picture


def grey_key() -> Image.Image:
    """A grey picture, one of whose values is transparent."""
    picture = Image.fromarray(np.where(RIGHT, 7, 200).astype(np.uint8))
    picture.info["transparency"] = 7
    return picture


TRANSPARENT: dict[str, Callable[[], Image.Image]] = {
    "black with a hole": lambda: hole((0, 0, 0)),
    "white with a hole": lambda: hole((255, 255, 255)),
    "a photo with a hole": lambda: hole((90, 120, 33)),
    "LA": lambda: hole((128, 128, 128)).convert("LA"),
    "palette": palette_hole,
    "grey with a transparent value": grey_key,
    "alpha of 0 and 1": lambda: Image.fromarray(
        np.dstack([np.zeros((24, 32, 3), np.uint8), 1 - RIGHT // 255])
    ),
}


def saved(folder: Path, picture: Image.Image, name: str = "mask.png", **options: object) -> Path:
    path = folder / name
    picture.save(path, **options)
    return path


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_an_alpha_channel_that_varies_is_the_mask_and_its_transparent_part_is_painted(
    tmp_path: Path, kind: str
) -> None:
    sentences: list[str] = []
    mask = read_mask(saved(tmp_path, TRANSPARENT[kind]()), tell=sentences.append)
    np.testing.assert_array_equal(mask, RIGHT)
    (sentence,) = sentences
    assert "`mask`" in sentence and "transparent" in sentence


def test_half_transparent_is_half_painted(tmp_path: Path) -> None:
    alpha = np.repeat([[0, 100, 255, 255]], 4, axis=0).astype(np.uint8)
    picture = Image.new("RGB", (4, 4), "white")
    picture.putalpha(Image.fromarray(alpha))
    np.testing.assert_array_equal(read_mask(saved(tmp_path, picture)), 255 - alpha)


def test_black_strokes_on_a_transparent_layer_are_what_stays(tmp_path: Path) -> None:
    layer = Image.new("RGBA", (32, 24), (0, 0, 0, 0))
    layer.paste((0, 0, 0, 255), (0, 0, 20, 24))
    np.testing.assert_array_equal(read_mask(saved(tmp_path, layer)), RIGHT)


def test_what_is_wholly_transparent_is_painted_all_over(tmp_path: Path) -> None:
    assert (read_mask(saved(tmp_path, Image.new("RGBA", (4, 4)))) == 255).all()


def test_an_opaque_alpha_channel_leaves_it_to_the_colours(tmp_path: Path) -> None:
    sentences: list[str] = []
    mask = read_mask(saved(tmp_path, Image.fromarray(RIGHT).convert("RGBA")), tell=sentences.append)
    np.testing.assert_array_equal(mask, RIGHT)
    assert not sentences


BINARY: dict[str, Callable[[], Image.Image]] = {
    "0 and 255": lambda: Image.fromarray(RIGHT),
    "0 and 1": lambda: Image.fromarray(RIGHT // 255),
    "0 and 1, RGB": lambda: Image.fromarray(RIGHT // 255).convert("RGB"),
    "0 and 1, opaque": lambda: Image.fromarray(RIGHT // 255).convert("RGBA"),
    "one channel of 0 and 1": lambda: Image.fromarray(
        np.dstack([np.zeros_like(RIGHT), np.zeros_like(RIGHT), RIGHT // 255])
    ),
    "1 bit": lambda: Image.fromarray(RIGHT).convert("1"),
    "16 bits": lambda: Image.fromarray(RIGHT.astype(np.uint16) * 257),
    "16 bits of 0 and 1": lambda: Image.fromarray((RIGHT // 255).astype(np.uint16)),
    "16 bits of 0 and 255": lambda: Image.fromarray(RIGHT.astype(np.uint16)),
    "32 bits of 0 and 1": lambda: Image.fromarray((RIGHT // 255).astype(np.int32)),
    "floats": lambda: Image.fromarray((RIGHT / 255).astype(np.float32)),
    "a palette": lambda: Image.fromarray(RIGHT).convert("P"),
}


@pytest.mark.parametrize("kind", BINARY)
def test_white_is_painted_in_every_mode_and_values_of_0_and_1_are_a_mask(
    tmp_path: Path, kind: str
) -> None:
    path = saved(tmp_path, BINARY[kind](), "mask.tif")  # which keeps every mode
    np.testing.assert_array_equal(read_mask(path), RIGHT)


@pytest.mark.parametrize("value", [1, 255])
def test_what_is_white_all_over_paints_everything(tmp_path: Path, value: int) -> None:
    assert (read_mask(saved(tmp_path, Image.new("L", (8, 8), value))) == 255).all()


@pytest.mark.parametrize(("values", "most"), [(RIGHT // 127, 2), (RIGHT * np.uint16(16), 16)])
def test_a_mask_of_which_nobody_would_see_anything_is_refused(
    tmp_path: Path, values: np.ndarray, most: int
) -> None:
    """Labels of 0 and 2, and 12 bits in a file of 16: all but black."""
    mask = saved(tmp_path, Image.fromarray(values))
    with pytest.raises(UsageError, match=rf"paints nothing.*nearly so \({most} of 255 at most\)"):
        read_mask(mask)


def test_a_value_that_is_no_number_stays(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    values = (RIGHT / 255).astype(np.float32)
    values[0, 0] = np.nan
    mask = read_mask(saved(tmp_path, Image.fromarray(values), "mask.tif"))
    np.testing.assert_array_equal(mask, RIGHT)
    assert not recwarn.list


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "1", "I;16", "LA"])
def test_a_mask_that_paints_nothing_is_an_error_that_says_what_is_painted(
    tmp_path: Path, mode: str
) -> None:
    black = Image.new("RGBA", (16, 16), (0, 0, 0, 255))
    picture = (
        Image.fromarray(np.zeros((16, 16), np.uint16)) if mode == "I;16" else black.convert(mode)
    )
    with pytest.raises(UsageError, match=r"`mask` .*mask\.tif paints nothing.* white"):
        read_mask(saved(tmp_path, picture, "mask.tif"))


def test_a_mask_whose_part_is_cut_off_by_the_size_is_an_error(tmp_path: Path) -> None:
    image = saved(tmp_path, Image.new("RGB", (128, 64)), "in.png")
    edge = np.zeros((64, 128), np.uint8)
    edge[:, :8] = 255
    mask = saved(tmp_path, Image.fromarray(edge))
    assert load_source(image, mask=mask).mask is not None
    with pytest.raises(UsageError, match="^`mask` paints nothing that is left at 64x64 pixels"):
        load_source(image, mask=mask, height=64, width=64)


def test_margins_that_add_nothing_are_an_error(tmp_path: Path) -> None:
    image = saved(tmp_path, Image.new("RGB", (32, 32)), "in.png")
    with pytest.raises(UsageError, match="`outpaint` adds nothing"):
        load_source(image, outpaint=(0, 0, 0, 0))


def turned(picture: Image.Image) -> dict[str, object]:
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate 90 degrees clockwise to view"
    return {"exif": exif}


def test_picture_and_mask_are_turned_alike(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 32, 3), dtype=np.uint8)
    upright = Image.fromarray(pixels)
    image = saved(
        tmp_path, upright.transpose(Image.Transpose.ROTATE_90), "in.png", **turned(upright)
    )
    painted = np.zeros((48, 32), np.uint8)
    painted[:16] = 255  # the top, as a viewer shows it
    plain = Image.fromarray(painted)
    masks = [
        saved(tmp_path, plain, "upright.png"),
        saved(tmp_path, plain.transpose(Image.Transpose.ROTATE_90), "turned.png", **turned(plain)),
    ]
    for mask in masks:
        source = load_source(image, mask=mask)
        np.testing.assert_array_equal(source.pixels, pixels)
        assert source.mask is not None
        np.testing.assert_array_equal(source.mask, painted)
    sideways = saved(tmp_path, plain.transpose(Image.Transpose.ROTATE_90), "sideways.png")
    sizes = "is 32x48 pixels and the picture is 48x32"  # heights first, as everywhere
    with pytest.raises(UsageError, match=f"{sizes}; turn the mask by a quarter"):
        load_source(image, mask=sideways)
