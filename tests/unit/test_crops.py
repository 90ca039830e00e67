"""Crops and buckets: whole pictures, scaled up where small, never padded, the same every time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxmesh.training.data.bucketing import ZOOM, bucket_of, buckets, crop_box, cut

CONTENT = "5f" * 32
sides = st.integers(1, 4000)
targets = st.integers(1, 64).map(lambda side: 16 * side)


@given(sides, sides, targets, targets, st.integers(0, 50), st.integers(0, 2**63 - 1))
def test_a_crop_lies_in_the_picture_and_has_the_target_s_proportions(h, w, th, tw, crop, seed):
    left, top, right, bottom = crop_box((h, w), (th, tw), seed, CONTENT, crop)
    assert 0 <= left < right <= w and 0 <= top < bottom <= h
    assert (bottom - top) / (right - left) == pytest.approx(th / tw, rel=1e-6)
    largest = min(h / th, w / tw)
    assert (bottom - top) / th >= largest * ZOOM * (1 - 1e-6)
    # no pixel is made up where the picture has enough of them
    assert (bottom - top) / th >= min(1.0, largest) * (1 - 1e-6)


def test_the_first_crop_is_the_largest_from_the_middle():
    assert crop_box((100, 200), (64, 64), 1, CONTENT, 0) == (50, 0, 150, 100)


def test_a_crop_depends_on_seed_picture_and_number_alone():
    def box(seed=1, content=CONTENT, crop=3):
        return crop_box((500, 700), (64, 64), seed, content, crop)

    assert box() == box()
    assert len({box(), box(seed=2), box(content="00" * 32), box(crop=4)}) == 4


def test_a_small_picture_is_scaled_up_to_fill_the_target():
    white = np.full((5, 9, 3), 255, np.uint8)
    out = cut(white, (64, 64), crop_box((5, 9), (64, 64), 0, CONTENT, 2))
    assert out.shape == (64, 64, 3)
    assert (out == 255).all()  # padding would be black


def test_a_crop_of_the_picture_s_own_size_is_the_picture():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    np.testing.assert_array_equal(
        cut(pixels, (32, 48), crop_box((32, 48), (32, 48), 0, CONTENT, 0)), pixels
    )


@pytest.mark.parametrize(("area", "multiple"), [(512 * 512, 16), (1024 * 1024, 16), (64 * 64, 8)])
def test_buckets_divide_and_have_about_the_area(area, multiple):
    sizes = buckets(area, multiple)
    assert len(sizes) >= 7
    for height, width in sizes:
        assert height % multiple == width % multiple == 0
        assert 0.7 * area <= height * width <= area
    side = int(area**0.5)
    assert (side, side) in sizes


def test_a_picture_goes_to_the_bucket_of_its_proportions():
    sizes = buckets(512 * 512, 16)
    assert bucket_of((600, 600), sizes) == (512, 512)
    tall, wide = bucket_of((1500, 1000), sizes), bucket_of((1000, 1500), sizes)
    assert tall == wide[::-1] and tall[0] / tall[1] == pytest.approx(1.5, rel=0.12)
    assert bucket_of((10_000, 10), sizes)[0] / bucket_of((10_000, 10), sizes)[1] <= 2.5
