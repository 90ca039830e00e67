"""The tables of tensors: right in number, and the two directions undo each other."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxmesh.models.flux1 import tensor_maps
from fluxmesh.models.flux1.config import AutoencoderConfig, ClipConfig, FluxConfig, T5Config
from fluxmesh.models.flux1.tensor_maps import Rows
from tests import checkpoints

SMALL = checkpoints.TRANSFORMER


@pytest.mark.parametrize(
    ("tensors", "count"),
    [
        # published sizes of FLUX.1 schnell and dev, of its autoencoder and text encoders
        (tensor_maps.transformer_tensors(FluxConfig()), 11_891_178_560),
        (tensor_maps.transformer_tensors(FluxConfig(guidance_embed=True)), 11_901_408_320),
        (tensor_maps.autoencoder_tensors(AutoencoderConfig()), 83_819_683),
        (tensor_maps.t5_tensors(T5Config()), 4_762_310_656),
        (tensor_maps.clip_tensors(ClipConfig()), 123_060_480),
    ],
    ids=["schnell", "dev", "autoencoder", "t5", "clip"],
)
def test_the_full_models_have_their_published_number_of_parameters(tensors, count):
    assert tensor_maps.parameter_count(tensors) == count


@pytest.mark.parametrize("guidance", [False, True])
def test_splitting_into_diffusers_tensors_and_stacking_gives_the_model_back(guidance):
    config = dataclasses.replace(SMALL, guidance_embed=guidance)
    tensors = tensor_maps.transformer_tensors(config)
    arrays = checkpoints.random_arrays(tensors, np.random.default_rng(0))
    files = checkpoints.to_diffusers(tensors, arrays)
    for name, target in tensors.items():
        parts = [files[piece.key][piece.start : piece.stop] for piece in target.pieces]
        np.testing.assert_array_equal(np.concatenate(parts), arrays[name])
    assert sum(a.size for a in files.values()) == sum(a.size for a in arrays.values())


def test_the_last_modulation_is_stored_in_the_other_order():
    tensors = tensor_maps.transformer_tensors(SMALL)
    width = SMALL.hidden_size
    assert tensors["final_layer.adaLN_modulation.1.bias"].pieces == (
        Rows("norm_out.linear.bias", width, 2 * width),
        Rows("norm_out.linear.bias", 0, width),
    )


@given(start=st.integers(0, 448), count=st.integers(0, 448))
def test_any_rows_of_a_fused_matrix_are_found_in_its_pieces(start, count):
    target = tensor_maps.transformer_tensors(SMALL)["single_blocks.0.linear1.weight"]
    stop = min(start + count, target.shape[0])
    rows = [(piece.key, row) for piece in target.pieces for row in range(piece.start, piece.stop)][
        start:stop
    ]
    pieces = [
        (piece.key, row)
        for piece in tensor_maps.pieces_between(target.pieces, start, stop)
        for row in range(piece.start, piece.stop)
    ]
    assert pieces == rows


def test_a_one_by_one_convolution_is_a_linear_and_nothing_else_is():
    assert tensor_maps.same_but_for_ones((8, 4, 1, 1), (8, 4))
    assert tensor_maps.same_but_for_ones((8,), (8,))
    assert not tensor_maps.same_but_for_ones((4, 8), (8, 4))
    assert not tensor_maps.same_but_for_ones((8, 4, 3, 3), (8, 4))
