"""Loading: equal from every layout, small in memory, and refused before compute when broken."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from fluxmesh.errors import OutputError, UsageError, WeightsError
from fluxmesh.flux import hub, weights
from fluxmesh.flux.components import Reader, tables
from fluxmesh.flux.quantize import quantize_checkpoint
from tests import checkpoints
from tests.checkpoints import make_checkpoint

LOADERS = {
    "transformer": weights.load_transformer,
    "text_encoder": weights.load_clip,
    "text_encoder_2": weights.load_t5,
    "vae": weights.load_autoencoder,
}
FILES = {
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "text_encoder_2": "text_encoder_2/model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}


def parameters(model) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def assert_same(one: dict[str, mx.array], other: dict[str, mx.array]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert mx.array_equal(one[name], other[name]), name


def resolved(made):
    checkpoint = hub.resolve(str(made.path))
    weights.verify(checkpoint)
    return checkpoint


@pytest.mark.parametrize("component", LOADERS)
def test_both_layouts_give_the_same_model(tmp_path, component):
    models = []
    for layout in ("diffusers", "bfl"):
        made = make_checkpoint(tmp_path / layout, seed=3, layout=layout, guidance=True)
        models.append(parameters(LOADERS[component](resolved(made), mx.float32)))
    assert_same(*models)


def test_a_single_file_may_carry_the_prefix_that_some_trainers_write(tmp_path):
    plain = make_checkpoint(tmp_path / "plain", layout="bfl", seed=3)
    prefixed = make_checkpoint(tmp_path / "prefixed", layout="bfl", seed=3)

    def rename(arrays):
        for key in list(arrays):
            arrays[f"model.diffusion_model.{key}"] = arrays.pop(key)

    rewrite(prefixed.path, rename)
    models = [parameters(weights.load_transformer(resolved(made))) for made in (plain, prefixed)]
    assert_same(*models)


@pytest.mark.parametrize("component", LOADERS)
def test_the_models_hold_exactly_the_tensors_of_the_tables(tmp_path, component):
    checkpoint = resolved(make_checkpoint(tmp_path, guidance=True))
    loaded = parameters(LOADERS[component](checkpoint))
    targets = tables(checkpoint)[component]
    assert loaded.keys() == targets.keys()
    for name, target in targets.items():
        shape = target.shape
        if len(shape) == 4:  # MLX has channels last
            shape = (shape[0], shape[2], shape[3], shape[1])
        assert loaded[name].shape == shape, name
        assert loaded[name].dtype == mx.bfloat16, name


def test_shards_are_the_whole(tmp_path):
    whole = resolved(make_checkpoint(tmp_path / "one", seed=5))
    parts = resolved(make_checkpoint(tmp_path / "three", seed=5, shards=3))
    assert len(parts.components["transformer"].files) == 3
    assert_same(
        parameters(weights.load_transformer(whole)), parameters(weights.load_transformer(parts))
    )


def test_a_bfloat16_file_is_read_bit_for_bit(tmp_path):
    stored = resolved(make_checkpoint(tmp_path / "bf16", seed=5, dtype="bfloat16"))
    full = resolved(make_checkpoint(tmp_path / "f32", seed=5))
    assert_same(parameters(weights.load_t5(stored)), parameters(weights.load_t5(full)))
    lifted = parameters(weights.load_t5(stored, mx.float32))
    assert all(value.dtype == mx.float32 for value in lifted.values())


def test_a_float16_file_is_read(tmp_path):
    made = make_checkpoint(tmp_path)
    path = made.folder / FILES["text_encoder_2"]
    arrays = checkpoints.random_arrays(
        tables(resolved(made))["text_encoder_2"], np.random.default_rng(1)
    )
    from fluxmesh.flux.tensorfile import write_tensors

    path.unlink()
    halves = {key: (value.astype(np.float16), "F16") for key, value in arrays.items()}
    write_tensors(path, halves, {})
    loaded = parameters(weights.load_t5(resolved(made), mx.float32))
    for name, (value, _) in halves.items():
        np.testing.assert_array_equal(np.array(loaded[name]), value.astype(np.float32))


@pytest.mark.parametrize("spelling", ["text_model.{}", "{}"])
def test_clip_is_found_under_both_of_its_spellings(tmp_path, spelling):
    made = make_checkpoint(tmp_path)
    path = made.folder / FILES["text_encoder"]
    arrays = checkpoints.random_arrays(
        tables(resolved(made))["text_encoder"], np.random.default_rng(1)
    )
    named = {spelling.format(key): value for key, value in arrays.items()}
    checkpoints.write_safetensors(path, named)
    loaded = parameters(weights.load_clip(resolved(made), mx.float32))
    for name, value in arrays.items():
        np.testing.assert_array_equal(np.array(loaded[name]), value)


def test_t5_is_found_when_only_its_encoder_has_the_embedding(tmp_path):
    made = make_checkpoint(tmp_path)
    path = made.folder / FILES["text_encoder_2"]
    arrays = checkpoints.random_arrays(
        tables(resolved(made))["text_encoder_2"], np.random.default_rng(1)
    )
    embedding = arrays.pop("shared.weight")
    checkpoints.write_safetensors(path, arrays | {"encoder.embed_tokens.weight": embedding})
    loaded = weights.load_t5(resolved(made), mx.float32)
    np.testing.assert_array_equal(np.array(loaded.shared.weight), embedding)


def test_a_shard_reads_its_rows_and_nothing_else(tmp_path, monkeypatch):
    checkpoint = resolved(make_checkpoint(tmp_path, seed=7))
    reader = Reader(checkpoint, "transformer")
    name = "single_blocks.1.linear1.weight"
    whole = weights.read_rows(reader, name, mx.float32)
    read = []
    from fluxmesh.flux import components

    original = components.read_rows_into

    def counting(out, entry, start=0):
        read.append(out.nbytes)
        original(out, entry, start)

    monkeypatch.setattr(components, "read_rows_into", counting)
    part = weights.read_rows(reader, name, mx.float32, 60, 200)  # of q, k, v and the MLP
    assert mx.array_equal(part, whole[60:200])
    assert sum(read) == part.nbytes
    assert len(read) == 4


def test_loading_holds_the_model_and_one_tensor_more(tmp_path):
    config = dataclasses.replace(
        checkpoints.TRANSFORMER, hidden_size=192, num_heads=6, depth=4, depth_single_blocks=8
    )
    checkpoint = resolved(make_checkpoint(tmp_path, transformer=config))
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = weights.load_transformer(checkpoint)  # the file is float32: twice the model's bytes
    peak = mx.get_peak_memory() - before
    size = sum(value.nbytes for value in parameters(model).values())
    largest = max(value.nbytes for value in parameters(model).values())
    in_file = 2 * largest
    assert size > 20 * largest  # else the bound below would say nothing
    assert size <= mx.get_active_memory() - before <= size * 1.02
    assert peak <= size * 1.02 + in_file
    assert mx.get_cache_memory() == 0


def test_quantizing_while_loading_never_holds_the_plain_model(tmp_path):
    config = dataclasses.replace(
        checkpoints.TRANSFORMER, hidden_size=192, num_heads=6, depth=4, depth_single_blocks=8
    )
    checkpoint = resolved(make_checkpoint(tmp_path, transformer=config))
    plain = sum(v.nbytes for v in parameters(weights.load_transformer(checkpoint)).values())
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = weights.load_transformer(checkpoint, bits=4)
    assert mx.get_peak_memory() - before < 0.5 * plain
    assert model.double_blocks[0].img_attn.qkv.bits == 4


def test_progress_ends_at_all_the_bytes(tmp_path):
    checkpoint = resolved(make_checkpoint(tmp_path))
    for component, load in LOADERS.items():
        told: list[tuple[int, int]] = []
        load(checkpoint, on_bytes=lambda done, total, told=told: told.append((done, total)))
        done = [number for number, _ in told]
        assert done == sorted(done)
        total = checkpoint.components[component].nbytes
        assert {number for _, number in told} == {total}
        assert 0.9 * total < done[-1] <= total  # the rest is the header


# --- broken files ----------------------------------------------------------------------------


def assert_refused(made, *words: str) -> None:
    """One sentence, before any array of MLX is made."""
    mx.synchronize()
    mx.reset_peak_memory()
    active = mx.get_active_memory()
    with pytest.raises(WeightsError) as caught:
        weights.verify(hub.resolve(str(made.path)))
    assert mx.get_peak_memory() <= active
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def rewrite(path: Path, change) -> None:
    """Reads a float32 safetensors file, lets `change` edit its arrays, and writes it again."""
    from fluxmesh.flux.tensorfile import read_header, read_tensor

    arrays = {key: read_tensor(entry) for key, entry in read_header(path).entries.items()}
    change(arrays)
    checkpoints.write_safetensors(path, arrays)


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
        ("transformer", "in_channels", None),
        ("transformer", "guidance_embeds", "yes"),
        ("transformer", "axes_dims_rope", ["4", "6", "6"]),
        ("text_encoder", "hidden_act", {}),
        ("text_encoder", "vocab_size", True),
        ("text_encoder", "layer_norm_eps", float("nan")),
        ("text_encoder_2", "num_heads", None),
        ("vae", "block_out_channels", "ab"),
        ("vae", "latent_channels", None),
        ("vae", "scaling_factor", "a"),
        ("scheduler", "shift", float("inf")),
    ],
)
def test_a_config_value_of_the_wrong_type_is_refused(tmp_path, folder, field, value):
    made = make_checkpoint(tmp_path)
    config = change_config(made.folder / folder, {field: value})
    assert_refused(made, str(config), "wrong type")


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
        weights.load_tokenizers(checkpoint)


@pytest.mark.parametrize(
    ("folder", "part"), [("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")]
)
def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path, folder, part):
    made = make_checkpoint(tmp_path)
    change_config(made.folder / folder, {"vocab_size": 100})
    with pytest.raises(WeightsError, match=f"{part} has .* its model 100"):
        weights.load_tokenizers(hub.resolve(str(made.path)))


def test_a_prompt_is_cut_where_the_tokenizer_says_and_the_positions_end(tmp_path):
    made = make_checkpoint(tmp_path)
    positions = made.clip.max_position_embeddings
    for declared, length in ((positions - 3, positions - 3), (positions + 3, positions)):
        change_config(made.folder / "tokenizer", {"model_max_length": declared})
        clip, _ = weights.load_tokenizers(resolved(made))
        assert len(clip.encode("dog " * 100)) == length


# --- fluxmesh's own quantized folder -----------------------------------------------------------


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 8])
@pytest.mark.parametrize("layout", ["diffusers", "bfl"])
def test_a_quantized_folder_loads_as_what_quantizing_on_the_way_gives(tmp_path, layout, bits):
    source = resolved(make_checkpoint(tmp_path / "source", layout=layout, guidance=True))
    folder = tmp_path / "quantized"
    quantize_checkpoint(source, folder, bits)
    found = hub.resolve(str(folder))
    weights.verify(found)
    assert (found.kind, found.bits) == ("quantized", bits)
    assert found.defaults == source.defaults
    assert (found.transformer, found.t5, found.clip) == (source.transformer, source.t5, source.clip)
    assert (found.autoencoder, found.schedule) == (source.autoencoder, source.schedule)
    for component, load in LOADERS.items():
        options = {} if component == "vae" else {"bits": bits}
        assert_same(parameters(load(found)), parameters(load(source, **options)))
    clip, t5 = weights.load_tokenizers(found)
    assert t5.encode("a red dog") == weights.load_tokenizers(source)[1].encode("a red dog")
    assert clip.encode("a red dog") == weights.load_tokenizers(source)[0].encode("a red dog")


def test_a_quantized_folder_is_smaller(tmp_path):
    made = make_checkpoint(tmp_path / "source", dtype="bfloat16")
    source = resolved(made)
    quantize_checkpoint(source, tmp_path / "q", 4)
    found = hub.resolve(str(tmp_path / "q"))
    sizes = [c.components["transformer"].nbytes for c in (source, found)]
    assert sizes[1] < 0.5 * sizes[0]


def test_a_large_component_is_written_in_several_files(tmp_path, monkeypatch):
    from fluxmesh.flux import quantize

    source = resolved(make_checkpoint(tmp_path / "source"))
    monkeypatch.setattr(quantize, "SHARD_BYTES", 100_000)
    quantize_checkpoint(source, tmp_path / "q", 8)
    found = hub.resolve(str(tmp_path / "q"))
    assert len(found.components["transformer"].files) > 2
    assert_same(
        parameters(weights.load_transformer(found)),
        parameters(weights.load_transformer(source, bits=8)),
    )


def test_quantizing_never_overwrites(tmp_path):
    source = resolved(make_checkpoint(tmp_path / "source"))
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        quantize_checkpoint(source, tmp_path / "there", 4)
    assert list((tmp_path / "there").iterdir()) == []


def test_quantizing_into_a_missing_folder_says_so(tmp_path):
    source = resolved(make_checkpoint(tmp_path / "source"))
    with pytest.raises(OutputError, match="does not exist"):
        quantize_checkpoint(source, tmp_path / "absent" / "q", 4)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_quantization_leaves_nothing(tmp_path, monkeypatch, error):
    from fluxmesh.flux import quantize

    source = resolved(make_checkpoint(tmp_path / "source"))
    calls = []

    def failing(path, value):
        calls.append(path)
        if len(calls) == 3:
            raise error

    monkeypatch.setattr(quantize, "_write_json", failing)
    expected = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        quantize_checkpoint(source, tmp_path / "q", 4)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("bits", [2, 7, 16])
def test_only_the_offered_bits_are_taken(tmp_path, bits):
    source = resolved(make_checkpoint(tmp_path / "source"))
    with pytest.raises(UsageError, match=str(bits)):
        quantize_checkpoint(source, tmp_path / "q", bits)


def test_a_quantized_folder_stays_at_its_bits(tmp_path):
    source = resolved(make_checkpoint(tmp_path / "source"))
    quantize_checkpoint(source, tmp_path / "q", 4)
    found = hub.resolve(str(tmp_path / "q"))
    with pytest.raises(UsageError, match="4 bits"):
        weights.load_transformer(found, bits=8)
    with pytest.raises(UsageError, match="4 bits"):
        quantize_checkpoint(found, tmp_path / "q8", 8)


def test_a_damaged_quantized_folder_is_refused(tmp_path):
    source = resolved(make_checkpoint(tmp_path / "source"))
    quantize_checkpoint(source, tmp_path / "q", 4)
    manifest = tmp_path / "q" / "fluxmesh.json"
    content = json.loads(manifest.read_text())
    content["quantization"]["bits"] = 8  # the files hold 4
    manifest.write_text(json.dumps(content))
    with pytest.raises(WeightsError, match="shape"):
        weights.verify(hub.resolve(str(tmp_path / "q")))
    content["format"] = 2
    manifest.write_text(json.dumps(content))
    with pytest.raises(WeightsError, match="format 2"):
        hub.resolve(str(tmp_path / "q"))
