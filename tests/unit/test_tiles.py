"""Tiled decoding: the cut covers a side, shares sum to one, and only large pictures are cut."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxmesh.errors import UsageError
from fluxmesh.models.autoencoder.tiling import tiles
from fluxmesh.models.flux1.autoencoder import AutoEncoder
from fluxmesh.models.flux1.config import AutoencoderConfig

CONFIG = AutoencoderConfig(
    widths=(4, 8), num_res_blocks=1, z_channels=4, norm_groups=4, mid_attention=False
)


@given(st.integers(1, 500), st.integers(3, 140), st.integers(1, 46), st.integers(1, 8))
def test_tiles_cover_a_side_and_their_shares_sum_to_one(
    length: int, tile: int, overlap: int, scale: int
) -> None:
    overlap = min(overlap, tile // 3)
    cut = tiles(length, tile, overlap)
    assert cut[0].start == 0 and cut[-1].stop == length
    assert len({part.stop - part.start for part in cut}) == 1
    assert all(part.stop - part.start <= tile for part in cut)
    for left, right in zip(cut, cut[1:], strict=False):
        assert left.stop - right.start == left.after == right.before >= overlap
    total = np.zeros(length * scale)
    for part in cut:
        total[part.start * scale : part.stop * scale] += part.share(scale)
    np.testing.assert_allclose(total, 1, rtol=1e-6)


@pytest.mark.parametrize("overlap", [0, 5, -1])
def test_senseless_overlaps_are_refused(overlap: int) -> None:
    with pytest.raises(UsageError, match="1 to 4"):
        tiles(100, 12, overlap)


def test_a_picture_up_to_the_limit_is_decoded_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluxmesh.models.autoencoder.convolutional.UNTILED_LATENTS", 12 * 10)
    ae = AutoEncoder(CONFIG)
    z = mx.random.normal((1, 12, 10, 4), key=mx.random.key(0))
    assert mx.array_equal(ae.decode_tiled(z, tile=6, overlap=2), ae.decode(z))


def test_a_larger_picture_is_blended_from_its_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no neighbour reaches, a pixel is its own tile's, and one in between is a mean."""
    monkeypatch.setattr("fluxmesh.models.autoencoder.convolutional.UNTILED_LATENTS", 12 * 10 - 1)
    ae = AutoEncoder(CONFIG)
    z = mx.random.normal((2, 12, 10, 4), key=mx.random.key(0))
    picture = ae.decode_tiled(z, tile=10, overlap=2)  # two tiles of 7 rows, sharing 2
    assert picture.shape == (2, 24, 20, 3)
    above, below = ae.decode(z[:, :7]), ae.decode(z[:, 5:])
    assert mx.allclose(picture[:, :10], above[:, :10], atol=1e-6)
    assert mx.allclose(picture[:, 14:], below[:, 4:], atol=1e-6)
    share = mx.array([7 / 8, 5 / 8, 3 / 8, 1 / 8])[:, None, None]
    blend = share * above[:, 10:] + (1 - share) * below[:, :4]
    assert mx.allclose(picture[:, 10:14], blend, atol=1e-6)
    assert not mx.allclose(picture, ae.decode(z), atol=1e-3)  # a tile is not the same picture
