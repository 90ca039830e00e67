"""Files in any mode, orientation and size become the picture and mask that a request carries."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fluxmesh import images
from fluxmesh.errors import UsageError
from fluxmesh.images import files


def gradient(height: int, width: int) -> np.ndarray:
    """A picture without symmetry: red grows to the right, green downwards."""
    rows, columns = np.mgrid[0:height, 0:width]
    red = np.round(255 * columns / max(width - 1, 1))
    green = np.round(255 * rows / max(height - 1, 1))
    return np.stack([red, green, np.full_like(red, 40)], axis=-1).astype(np.uint8)


def saved(folder: Path, picture: Image.Image, name: str = "in.png", **options: object) -> Path:
    path = folder / name
    picture.save(path, **options)
    return path


def test_a_picture_of_fitting_size_is_not_resampled(tmp_path: Path) -> None:
    pixels = gradient(32, 48)
    source = images.load_source(saved(tmp_path, Image.fromarray(pixels)))
    assert np.array_equal(source.pixels, pixels)
    assert source.mask is None
    assert source.strength == 0.6


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate 90 degrees clockwise to view"
    path = saved(tmp_path, Image.fromarray(gradient(32, 48)), exif=exif)
    assert np.array_equal(files.read_picture(path), np.rot90(gradient(32, 48), k=-1))


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    white = Image.new("RGB", (4, 3), "white")
    picture = white.convert(mode) if mode != "LAB" else Image.new("LAB", (4, 3), (255, 128, 128))
    pixels = files.over(picture, background=0)
    assert pixels.shape == (3, 4, 3)
    assert pixels.min() >= 250


def test_sixteen_bit_greys_are_scaled_not_clipped(tmp_path: Path) -> None:
    deep = np.array([[0, 32768, 65535]], np.uint16)
    pixels = files.read_picture(saved(tmp_path, Image.fromarray(deep)))
    assert pixels[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_become_white(mode: str, tmp_path: Path) -> None:
    clear = Image.new("RGBA", (2, 2), (10, 10, 10, 0))
    path = saved(tmp_path, clear.convert(mode), "in.png")
    assert np.all(files.read_picture(path) == 255)


def test_a_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "notes.png"
    path.write_text("not a picture")
    with pytest.raises(UsageError, match=r"`image` .*notes\.png can't be read"):
        images.load_source(path)
    with pytest.raises(UsageError, match="does not exist"):
        images.load_source(tmp_path / "missing.png")


def test_a_photo_of_an_iphone_is_told_with_how_to_convert_it(tmp_path: Path) -> None:
    photo = b"\0\0\0\x24ftypheic\0\0\0\0mif1heic"
    path = tmp_path / "photo.jpg"  # whatever it is called
    path.write_bytes(photo)
    for read in (files.read_picture, images.load_source, lambda _: decode(photo)):
        with pytest.raises(UsageError, match="is HEIC, .* `sips -s format jpeg"):
            read(path)


def decode(data: bytes) -> np.ndarray:
    return files.decode_picture(data, "line 3")


def test_a_truncated_picture_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.fromarray(gradient(64, 64)))
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(UsageError, match="can't be read"):
        files.read_picture(path)


def test_a_large_photo_is_read_without_a_word_and_a_larger_one_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow warns from this many pixels on, and refuses twice as many."""
    path = saved(tmp_path, Image.fromarray(gradient(20, 30)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(files.read_picture(path), gradient(20, 30))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    with pytest.raises(UsageError, match="has too many pixels; scale it down first"):
        files.read_picture(path)


def test_what_a_program_gives_that_is_no_picture_or_no_list_of_them_is_told(
    tmp_path: Path,
) -> None:
    picture = Image.fromarray(gradient(20, 30))
    path, pixels = saved(tmp_path, picture), gradient(20, 30)
    for given in (path, str(path), path.read_bytes(), pixels):
        np.testing.assert_array_equal(files.pixels_of(given, "control"), pixels)
        with pytest.raises(UsageError, match="`references` is one picture; put it into a list"):
            files.listed(given, "references")
        assert files.listed(iter([given]), "references")[0] is given
    for wrong in (picture, 3, None):
        with pytest.raises(UsageError, match=r"`control` has a \w+; give a path, the bytes of"):
            files.pixels_of(wrong, "control")  # type: ignore[arg-type]


def test_without_a_size_sides_become_multiples_of_sixteen(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.fromarray(gradient(101, 60)))
    assert images.load_source(path).pixels.shape == (96, 64, 3)


def test_margins_that_grow_and_a_size_that_changes_are_told_and_nothing_else(
    tmp_path: Path,
) -> None:
    path = saved(tmp_path, Image.fromarray(gradient(64, 128)))
    sentences: list[str] = []
    images.load_source(path, tell=sentences.append)
    images.load_source(path, outpaint=(16, 0, 0, 0), tell=sentences.append)
    assert sentences == []
    images.load_source(path, outpaint=(10, 0, 0, 4), tell=sentences.append)
    assert sentences == ["`outpaint` 10,0,0,4 became 16,0,0,16: sides are multiples of 16."]
    images.load_source(path, height=32, tell=sentences.append)
    assert sentences[1:] == [f"{path} becomes 32x64 pixels; it is 64x128."]


def test_a_large_picture_is_scaled_to_the_area_and_keeps_proportions(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.fromarray(gradient(256, 512)))
    assert images.load_source(path, max_area=128 * 128).pixels.shape == (96, 176, 3)


def test_a_given_size_cuts_instead_of_stretching(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.fromarray(gradient(64, 128)))
    pixels = images.load_source(path, height=32, width=32).pixels
    assert pixels.shape == (32, 32, 3)
    # Half of the width is left, so the red ramp spans half of its range.
    assert 55 < pixels[:, 0, 0].mean() < 75
    assert 180 < pixels[:, -1, 0].mean() < 200


def test_one_given_side_sets_the_other(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.fromarray(gradient(64, 128)))
    assert images.load_source(path, height=32).pixels.shape == (32, 64, 3)


def test_a_mask_goes_along_with_the_picture_and_sets_strength_to_one(tmp_path: Path) -> None:
    image = saved(tmp_path, Image.fromarray(gradient(64, 64)))
    half = np.zeros((64, 64), np.uint8)
    half[:, 32:] = 255
    mask = saved(tmp_path, Image.fromarray(half), "mask.png")
    source = images.load_source(image, mask=mask)
    assert source.mask is not None
    assert np.array_equal(source.mask, half)
    assert source.strength == 1.0
    assert images.load_source(image, mask=mask, strength=0.5).strength == 0.5


def test_a_mask_at_another_size_is_scaled_and_of_other_proportions_refused(tmp_path: Path) -> None:
    image = saved(tmp_path, Image.fromarray(gradient(64, 64)))
    small = saved(tmp_path, Image.new("L", (32, 32), 255), "mask.png")
    source = images.load_source(image, mask=small)
    assert source.mask is not None
    assert source.mask.shape == (64, 64)
    wide = saved(tmp_path, Image.new("L", (64, 32), 255), "wide.png")
    with pytest.raises(UsageError, match="is 32x64 pixels"):
        images.load_source(image, mask=wide)


def test_outpainting_keeps_the_old_pixels_and_masks_the_new(tmp_path: Path) -> None:
    pixels = gradient(32, 32)
    path = saved(tmp_path, Image.fromarray(pixels))
    source = images.load_source(path, outpaint=(16, 0, 32, 16))
    assert source.pixels.shape == (48, 80, 3)
    assert np.array_equal(source.pixels[:32, 16:48], pixels)
    assert source.mask is not None
    assert np.all(source.mask[:32, 16:48] == 0)
    assert int((source.mask == 0).sum()) == 32 * 32
    assert source.strength == 1.0


def test_outpainting_grows_the_wider_margin_to_a_multiple_of_sixteen() -> None:
    pixels = gradient(33, 40)
    larger, mask = images.outpaint_canvas(pixels, (20, 0, 5, 0))
    assert larger.shape == (48, 80, 3)
    assert np.array_equal(larger[:33, 35:75], pixels)
    assert np.all(mask[33:] == 255)


def test_outpainting_with_a_mask_paints_both() -> None:
    inside = np.zeros((16, 16), np.uint8)
    inside[4:8, 4:8] = 255
    _, mask = images.outpaint_canvas(gradient(16, 16), (0, 0, 16, 0), mask=inside)
    assert np.array_equal(mask[:, :16], inside)
    assert np.all(mask[:, 16:] == 255)


@pytest.mark.parametrize("text", ["1,2,3", "a,b,c,d", "-1,0,0,0", "1.5,0,0,0", ""])
def test_margins_that_are_not_four_numbers_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="left,top,right,bottom"):
        images.parse_margins(text)


def test_margins_are_left_top_right_bottom() -> None:
    assert images.parse_margins("1, 2,3,4") == (1, 2, 3, 4)


def test_a_canvas_beyond_the_largest_side_is_refused() -> None:
    with pytest.raises(UsageError, match="at most 8192"):
        images.outpaint_canvas(gradient(16, 16), (9000, 0, 0, 0))
