"""Broken files are refused by name, before any compute."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fluxmesh.errors import WeightsError
from fluxmesh.weights import hub, loading
from tests.checkpoints import make_checkpoint
from tests.numerics.loading import (
    FILES,
    assert_refused,
    resolved,
    rewrite,
)


@pytest.mark.parametrize("component", FILES)
def test_a_truncated_file_of_any_component_is_refused(tmp_path, component):
    made = make_checkpoint(tmp_path)
    path = made.folder / FILES[component]
    path.write_bytes(path.read_bytes()[:-100])
    assert_refused(made, str(path), "truncated")


@pytest.mark.parametrize("component", FILES)
def test_a_missing_tensor_of_any_component_is_named(tmp_path, component):
    made = make_checkpoint(tmp_path)
    gone = []
    rewrite(made.folder / FILES[component], lambda arrays: gone.append(arrays.popitem()[0]))
    assert_refused(made, gone[0], str(made.folder / FILES[component]), "lacks")


@pytest.mark.parametrize("component", FILES)
def test_a_tensor_of_the_wrong_shape_is_named(tmp_path, component):
    made = make_checkpoint(tmp_path)
    wrong = []

    def grow(arrays):
        key = list(arrays)[-1]
        wrong.append(key)
        arrays[key] = np.concatenate([arrays[key], arrays[key][:1]])

    rewrite(made.folder / FILES[component], grow)
    assert_refused(made, wrong[0], "shape", str(made.folder / FILES[component]))


def test_a_tensor_missing_from_a_sharded_transformer_is_named(tmp_path):
    made = make_checkpoint(tmp_path, shards=2)
    part = next((made.folder / "transformer").glob("*00002-of*"))
    rewrite(part, lambda arrays: arrays.pop("x_embedder.bias"))
    assert_refused(made, "x_embedder.bias")


def test_a_single_file_that_lacks_a_tensor_is_refused(tmp_path):
    made = make_checkpoint(tmp_path, layout="bfl")
    rewrite(made.path, lambda arrays: arrays.pop("single_blocks.1.linear2.bias"))
    assert_refused(made, "single_blocks.1.linear2.bias", str(made.path))


def test_weights_of_whole_numbers_are_refused(tmp_path):
    made = make_checkpoint(tmp_path)
    path = made.folder / FILES["vae"]
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].replace(b'"F32"', b'"I32"')
    path.write_bytes(content[:8] + header + content[8 + length :])
    assert_refused(made, "I32", str(path))


def test_a_hostile_index_reads_no_file_outside(tmp_path):
    made = make_checkpoint(tmp_path / "model", shards=2)
    shutil.copy(
        next((made.folder / "transformer").glob("*.safetensors")), tmp_path / "out.safetensors"
    )
    index = next((made.folder / "transformer").glob("*.index.json"))
    entries = json.loads(index.read_text())
    entries["weight_map"]["x_embedder.bias"] = "../../out.safetensors"
    index.write_text(json.dumps(entries))
    assert_refused(made, "../../out.safetensors", "weight_map")


@pytest.mark.parametrize(
    ("folder", "changes", "word"),
    [
        ("transformer", {"num_layers": 10**9}, "depth"),
        ("transformer", {"attention_head_dim": 30}, "axes"),
        ("transformer", {"axes_dims_rope": [3, 14, 15]}, "axes"),
        ("transformer", {"num_attention_heads": 0}, "hidden_size is 0"),
        ("transformer", {"num_layers": -1}, "depth"),
        ("vae", {"layers_per_block": 2**20}, "num_res_blocks"),
        ("vae", {"block_out_channels": []}, "widths"),
        ("vae", {"norm_num_groups": 7}, "norm groups"),
        ("vae", {"scaling_factor": 0.0}, "scaling factor"),
        ("text_encoder", {"num_attention_heads": 7}, "CLIP's heads"),
        ("text_encoder", {"layer_norm_eps": 0.0}, "layer_norm_eps"),
        ("text_encoder_2", {"num_layers": 0}, "num_layers is 0"),
        ("text_encoder_2", {"layer_norm_epsilon": 0.0}, "layer_norm_epsilon"),
        ("text_encoder_2", {"relative_attention_max_distance": 1}, "max_distance"),
        ("scheduler", {"shift": 0.0}, "shift"),
        ("scheduler", {"max_image_seq_len": 256}, "max_image_seq_len"),
    ],
)
def test_a_config_of_absurd_sizes_is_refused(tmp_path, folder, changes, word):
    made = make_checkpoint(tmp_path)
    change_config(made.folder / folder, changes)
    assert_refused(made, word)


@pytest.mark.parametrize(
    ("folder", "field", "value"),
    [
        ("transformer", "num_layers", 2.0),
        ("transformer", "guidance_embeds", "yes"),
        ("transformer", "axes_dims_rope", ["4", "6", "6"]),
        ("text_encoder", "hidden_act", {}),
        ("text_encoder", "vocab_size", True),
        ("text_encoder", "layer_norm_eps", float("nan")),
        ("vae", "block_out_channels", "ab"),
        ("vae", "scaling_factor", "a"),
        ("scheduler", "shift", float("inf")),
    ],
)
def test_a_config_value_of_the_wrong_type_is_refused(tmp_path, folder, field, value):
    made = make_checkpoint(tmp_path)
    config = change_config(made.folder / folder, {field: value})
    assert_refused(made, str(config), "wrong type")


@pytest.mark.parametrize(
    ("folder", "field"), [("transformer", "in_channels"), ("vae", "latent_channels")]
)
def test_a_null_in_the_place_of_what_is_needed_is_as_good_as_nothing(tmp_path, folder, field):
    made = make_checkpoint(tmp_path)
    config = change_config(made.folder / folder, {field: None})
    assert_refused(made, str(config), f"lacks '{field}'")


def change_config(folder, changes):
    """Edits the folder's config file; returns its path."""
    path = next(folder.glob("*config.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


@pytest.mark.parametrize(
    "file", ["tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer_2/spiece.model"]
)
def test_a_broken_vocabulary_is_refused(tmp_path, file):
    made = make_checkpoint(tmp_path)
    checkpoint = resolved(made)
    (made.folder / file).write_bytes(b"\xff not a vocabulary")
    with pytest.raises(WeightsError, match=Path(file).name):
        loading.load_tokenizers(checkpoint)


@pytest.mark.parametrize(
    ("folder", "part"), [("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")]
)
def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path, folder, part):
    made = make_checkpoint(tmp_path)
    change_config(made.folder / folder, {"vocab_size": 100})
    with pytest.raises(WeightsError, match=f"{part} has .* its model 100"):
        loading.load_tokenizers(hub.resolve(str(made.path)))


def test_a_prompt_is_cut_where_the_tokenizer_says_and_the_positions_end(tmp_path):
    made = make_checkpoint(tmp_path)
    positions = made.clip.max_position_embeddings
    for declared, length in ((positions - 3, positions - 3), (positions + 3, positions)):
        change_config(made.folder / "tokenizer", {"model_max_length": declared})
        clip, _ = loading.load_tokenizers(resolved(made))
        assert len(clip.encode("dog " * 100)) == length
