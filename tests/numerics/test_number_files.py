"""Models out of fp8, GGUF and MLX-quantized files: the numbers, the memory, the pictures."""

from __future__ import annotations

import dataclasses
import gc
import tracemalloc
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from fluxmesh.engine import lazy_models
from fluxmesh.engine.pipeline import FluxPipeline
from fluxmesh.errors import UsageError, WeightsError
from fluxmesh.models.flux1.quantization import group_size
from fluxmesh.models.partition import Shard
from fluxmesh.storage import bfloat16
from fluxmesh.storage.numbers import finite, tensor_source
from fluxmesh.storage.tensor_files import read_header
from fluxmesh.weights import hub, loading
from fluxmesh.weights.checkpoint import Checkpoint, Component
from fluxmesh.weights.quantize import quantize_checkpoint
from fluxmesh.weights.reader import ComponentReader, first_not_finite, table_of
from tests import checkpoints, number_files
from tests.allocation import allocated
from tests.checkpoints import Arrays, make_checkpoint, write_safetensors
from tests.number_files import float8_tensors, gguf_tensors, write_gguf, write_stored
from tests.numerics.loading import (
    assert_refused,
    assert_same,
    load_t5,
    parameters,
    resolved,
    rewrite,
)


def scaled(dtype, name, shape):
    def write(path: Path, arrays: Arrays) -> tuple[Path, Arrays]:
        stored, exact = float8_tensors(arrays, dtype, name, shape)
        return write_stored(path.with_suffix(".safetensors"), stored), exact

    return write


def everything(dtype):
    def write(path: Path, arrays: Arrays) -> tuple[Path, Arrays]:
        stored, exact = float8_tensors(arrays, dtype, everything=True)
        return write_stored(path.with_suffix(".safetensors"), stored), exact

    return write


def gguf(form):
    def write(path: Path, arrays: Arrays) -> tuple[Path, Arrays]:
        file = write_gguf(path.with_suffix(".gguf"), gguf_tensors(arrays, form))
        header = read_header(file)
        exact = {name: tensor_source.read_float32(header, name) for name in arrays}
        return file, exact

    return write


FORMS = {
    "fp8 everywhere": everything("F8_E4M3"),
    "e5m2 everywhere": everything("F8_E5M2"),
    "fp8 matrices": scaled("F8_E4M3", "", None),
    "scale_weight": scaled("F8_E4M3", "scale_weight", lambda shape: ()),
    "weight_scale by rows": scaled("F8_E4M3", "weight_scale", lambda shape: (shape[0], 1)),
    "weight_scale_inv": scaled("F8_E4M3", "weight_scale_inv", lambda s: (-(-s[0] // 128), 1)),
    "Q8_0": gguf("Q8_0"),
    "Q4_0": gguf("Q4_0"),
    "Q4_K": gguf("Q4_K"),
    "Q5_K": gguf("Q5_K"),
    "Q6_K": gguf("Q6_K"),
    "BF16": gguf("BF16"),
}


def with_file(checkpoint: Checkpoint, component: str, file: Path) -> Checkpoint:
    """The checkpoint with another file for one of its models, by the model's own names."""
    layout = "bfl" if component in ("transformer", "vae") else "diffusers"
    components = {**checkpoint.components, component: Component((file,), layout)}
    return dataclasses.replace(checkpoint, components=components)


def arrays_of(checkpoint: Checkpoint, component: str) -> Arrays:
    """A model's tensors in float32, by its own names."""
    reader = ComponentReader(checkpoint, component)
    return {name: reader.rows(name, dtype="F32").values for name in reader.targets}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_a_transformer_of_any_form_is_that_of_its_numbers(tmp_path, form, dtype):
    made = make_checkpoint(tmp_path / "model", layout="bfl", guidance=True)
    checkpoint = resolved(made)
    file, exact = FORMS[form](tmp_path / "stored", arrays_of(checkpoint, "transformer"))
    write_safetensors(tmp_path / "exact.safetensors", exact)
    pair = [with_file(checkpoint, "transformer", f) for f in (file, tmp_path / "exact.safetensors")]
    actual, expected = (parameters(loading.load_transformer(c, dtype)) for c in pair)
    assert_same(actual, expected)
    assert len({str(value.dtype) for value in actual.values()}) == 1


@pytest.mark.parametrize("form", ["scale_weight", "fp8 everywhere", "Q8_0", "Q4_K"])
def test_a_single_file_of_any_form_is_found_by_its_name(tmp_path, form):
    made = make_checkpoint(tmp_path, layout="bfl", guidance=True)
    arrays = arrays_of(resolved(made), "transformer")
    file, exact = FORMS[form](tmp_path / "flux1-stored", arrays)
    checkpoint = hub.resolve(str(file))
    loading.verify(checkpoint)
    assert checkpoint.architecture.transformer == made.transformer
    assert checkpoint.bits is None
    loaded = parameters(loading.load_transformer(checkpoint, mx.float32))
    for name, values in exact.items():
        np.testing.assert_array_equal(np.array(loaded[name]), values)


@pytest.mark.parametrize("form", ["fp8 everywhere", "weight_scale by rows", "Q8_0", "Q4_K"])
def test_a_t5_of_any_form_is_that_of_its_numbers(tmp_path, form):
    checkpoint = resolved(make_checkpoint(tmp_path / "model"))
    file, exact = FORMS[form](tmp_path / "t5", arrays_of(checkpoint, "text_encoder_2"))
    loaded = parameters(load_t5(with_file(checkpoint, "text_encoder_2", file), mx.float32))
    for name, values in exact.items():
        np.testing.assert_array_equal(np.array(loaded[name]), values)


LLAMA_CPP = {
    "shared.weight": "token_embd.weight",
    "encoder.final_layer_norm.weight": "enc.output_norm.weight",
    "encoder.block.{}.layer.0.SelfAttention.q.weight": "enc.blk.{}.attn_q.weight",
    "encoder.block.{}.layer.0.SelfAttention.k.weight": "enc.blk.{}.attn_k.weight",
    "encoder.block.{}.layer.0.SelfAttention.v.weight": "enc.blk.{}.attn_v.weight",
    "encoder.block.{}.layer.0.SelfAttention.o.weight": "enc.blk.{}.attn_o.weight",
    "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight": (
        "enc.blk.{}.attn_rel_b.weight"
    ),
    "encoder.block.{}.layer.0.layer_norm.weight": "enc.blk.{}.attn_norm.weight",
    "encoder.block.{}.layer.1.layer_norm.weight": "enc.blk.{}.ffn_norm.weight",
    "encoder.block.{}.layer.1.DenseReluDense.wi_0.weight": "enc.blk.{}.ffn_gate.weight",
    "encoder.block.{}.layer.1.DenseReluDense.wi_1.weight": "enc.blk.{}.ffn_up.weight",
    "encoder.block.{}.layer.1.DenseReluDense.wo.weight": "enc.blk.{}.ffn_down.weight",
}


def test_a_t5_under_llama_cpps_names_is_the_same_model(tmp_path):
    checkpoint = resolved(make_checkpoint(tmp_path / "model"))
    arrays = arrays_of(checkpoint, "text_encoder_2")
    names = {
        theirs.format(i): mine.format(i) for mine, theirs in LLAMA_CPP.items() for i in range(2)
    }
    renamed = {theirs: arrays[mine] for theirs, mine in names.items() if mine in arrays}
    assert len(renamed) == len(arrays)
    file = write_gguf(tmp_path / "t5.gguf", gguf_tensors(renamed, "Q8_0"), "t5encoder")
    header = read_header(file)
    loaded = parameters(load_t5(with_file(checkpoint, "text_encoder_2", file), mx.float32))
    for theirs in renamed:
        exact = tensor_source.read_float32(header, theirs)
        np.testing.assert_array_equal(np.array(loaded[names[theirs]]), exact)


@pytest.mark.parametrize("form", ["weight_scale by rows", "Q4_K"])
@pytest.mark.parametrize("bits", [4, 8])
def test_bits_on_top_of_a_form_quantize_its_numbers(tmp_path, form, bits):
    checkpoint = resolved(make_checkpoint(tmp_path / "model", layout="bfl"))
    file, exact = FORMS[form](tmp_path / "stored", arrays_of(checkpoint, "transformer"))
    write_safetensors(tmp_path / "exact.safetensors", exact)
    pair = [with_file(checkpoint, "transformer", f) for f in (file, tmp_path / "exact.safetensors")]
    assert_same(*(parameters(loading.load_transformer(c, bits=bits)) for c in pair))
    quantize_checkpoint(pair[0], tmp_path / "folder", bits)
    folder = hub.resolve(str(tmp_path / "folder"))
    assert_same(*(parameters(loading.load_transformer(c, bits=bits)) for c in (folder, pair[1])))


@pytest.mark.parametrize("form", ["scale_weight", "weight_scale by rows", "Q8_0", "Q4_K"])
def test_a_shard_is_the_part_of_the_numbers_and_reads_no_more(tmp_path, form, monkeypatch):
    checkpoint = resolved(make_checkpoint(tmp_path / "model", layout="bfl"))
    file, exact = FORMS[form](tmp_path / "stored", arrays_of(checkpoint, "transformer"))
    write_safetensors(tmp_path / "exact.safetensors", exact)
    pair = [with_file(checkpoint, "transformer", f) for f in (file, tmp_path / "exact.safetensors")]
    for rank in range(2):
        how = {"shard": Shard(rank, 2)}
        assert_same(*(parameters(loading.load_transformer(c, mx.float32, **how)) for c in pair))
    name = "single_blocks.1.linear1.weight"
    reader = ComponentReader(pair[0], "transformer")
    read = []
    original = tensor_source.read_bytes_into
    monkeypatch.setattr(
        tensor_source,
        "read_bytes_into",
        lambda view, entry, offset: read.append(len(view)) or original(view, entry, offset),
    )
    rows = loading.read_rows(reader, name, mx.float32, 64, 128)
    np.testing.assert_array_equal(np.array(rows), exact[name][64:128])
    if form != "weight_scale by rows":  # whose rows come as any plain tensor's
        assert sum(read) <= reader.stored_bytes(name) * 64 // exact[name].shape[0] + 256


def test_loading_fp8_holds_the_model_and_little_more(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_source, "CHUNK", 1 << 13)
    config = dataclasses.replace(
        checkpoints.TRANSFORMER, hidden_size=192, num_heads=6, depth=4, depth_single_blocks=8
    )
    made = make_checkpoint(tmp_path / "model", layout="bfl", transformer=config)
    arrays = arrays_of(resolved(made), "transformer")
    peaks = {}
    for form in ("bfloat16", "weight_scale by rows", "Q8_0"):
        file = tmp_path / "plain.safetensors"
        if form == "bfloat16":
            write_safetensors(file, arrays, "bfloat16")
        else:
            file, _ = FORMS[form](tmp_path / "stored", arrays)
        checkpoint = with_file(resolved(made), "transformer", file)
        loading.load_transformer(checkpoint)
        gc.collect()  # what other tests have left
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        tracemalloc.start()
        model = loading.load_transformer(checkpoint)
        beside = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        peaks[form] = mx.get_peak_memory() - before
        size = allocated(parameters(model).values())
        largest = max(value.nbytes for value in parameters(model).values())
        assert beside < 3 * largest < 0.1 * size, form  # tables, objects and chunks
        del model
    assert max(peaks.values()) <= 1.005 * peaks["bfloat16"], peaks
    assert peaks["bfloat16"] <= 1.1 * size


def test_parts_of_one_tensor_may_be_stored_in_different_forms(tmp_path):
    made = make_checkpoint(tmp_path)
    checkpoint = resolved(made)
    key = "single_transformer_blocks.0.attn.to_k.weight"
    file = made.folder / "transformer/diffusion_pytorch_model.safetensors"
    header = read_header(file)
    tensors = {name: (tensor_source.read_float32(header, name), "F32") for name in header.entries}
    codes = number_files.to_bytes(tensors[key][0])
    bits = bfloat16.of_float32(tensors["single_transformer_blocks.0.attn.to_q.weight"][0])
    tensors[key] = (codes, "F8_E4M3")
    tensors["single_transformer_blocks.0.attn.to_q.weight"] = (bits, "BF16")
    before = parameters(loading.load_transformer(checkpoint, mx.float32))
    write_stored(file, tensors)
    loaded = parameters(loading.load_transformer(resolved(made), mx.float32))
    name = "single_blocks.0.linear1.weight"
    np.testing.assert_array_equal(np.array(loaded[name])[:64], bfloat16.to_float32(bits))
    np.testing.assert_array_equal(np.array(loaded[name])[64:128], number_files.from_bytes(codes))
    assert mx.array_equal(loaded[name][128:], before[name][128:])


# --- MLX's quantized form --------------------------------------------------------------------


def triples(arrays: Arrays, bits: int, group: int, component="transformer", everything=False):
    """(tensors of a file in MLX's form, what they mean in float32, the triples)."""
    stored, exact, packed = {}, {}, {}
    for name, values in arrays.items():
        is_wanted = everything or group_size(component, name, values.shape)
        if values.ndim != 2 or not is_wanted or values.shape[1] % group:
            stored[name], exact[name] = (values, "F32"), values
            continue
        parts = mx.quantize(mx.array(values).astype(mx.bfloat16), group_size=group, bits=bits)
        module = name.removesuffix(".weight")
        wide = [parts[0], *(part.astype(mx.float32) for part in parts[1:])]
        exact[name] = np.array(mx.dequantize(*wide, group_size=group, bits=bits))
        for leaf, part in zip(("weight", "scales", "biases"), parts, strict=True):
            packed[f"{module}.{leaf}"] = part
            is_words = leaf == "weight"
            array = np.array(part) if is_words else np.array(part.view(mx.uint16))
            stored[f"{module}.{leaf}"] = (array, "U32" if is_words else "BF16")
    return stored, exact, packed


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64])
def test_mlx_triples_stay_what_they_are(tmp_path, bits, group):
    made = make_checkpoint(tmp_path, layout="bfl")
    stored, exact, packed = triples(arrays_of(resolved(made), "transformer"), bits, group)
    metadata = {"quantization_level": str(bits), "group_size": str(group)}
    file = write_stored(tmp_path / "flux1-mlx.safetensors", stored, metadata)
    checkpoint = hub.resolve(str(file))
    loading.verify(checkpoint)
    assert (checkpoint.bits, checkpoint.architecture.transformer) == (bits, made.transformer)
    model = loading.load_transformer(checkpoint)
    linear = model.single_blocks[0].linear1
    assert (linear.bits, linear.group_size) == (bits, group)
    loaded = parameters(model)
    for name, value in packed.items():
        assert loaded[name].dtype == value.dtype
        assert mx.array_equal(loaded[name], value), name
    assert loaded.keys() == exact.keys() | packed.keys()
    with pytest.raises(UsageError, match=f"{bits} bits"):
        loading.load_transformer(checkpoint, bits=4 if bits != 4 else 8)


def test_a_triple_is_read_as_the_numbers_that_it_stands_for(tmp_path):
    values = np.random.default_rng(2).standard_normal((8, 256), dtype=np.float32)
    stored, exact, _ = triples({"x.weight": values}, 6, 64, everything=True)
    header = read_header(write_stored(tmp_path / "x.safetensors", stored))
    read = tensor_source.read_float32(header, "x.weight")
    np.testing.assert_array_equal(read, exact["x.weight"])


def test_groups_of_128_stay_what_they_are_also_in_a_shard(tmp_path):
    config = dataclasses.replace(checkpoints.TRANSFORMER, hidden_size=512, num_heads=16)
    config = dataclasses.replace(config, depth=1, depth_single_blocks=1)
    made = make_checkpoint(tmp_path, layout="bfl", transformer=config)
    stored, _, packed = triples(arrays_of(resolved(made), "transformer"), 4, 128)
    file = write_stored(tmp_path / "flux1-mlx.safetensors", stored, {"group_size": "128"})
    checkpoint = hub.resolve(str(file))
    model = loading.load_transformer(checkpoint)
    assert model.single_blocks[0].linear2.group_size == 128
    parts = [loading.load_transformer(checkpoint, shard=Shard(rank, 2)) for rank in range(2)]
    whole = packed["double_blocks.0.img_mlp.2.scales"]
    halves = [part.double_blocks[0].img_mlp[2].scales for part in parts]
    assert mx.array_equal(mx.concatenate(halves, axis=1), whole)
    with pytest.raises(UsageError, match="groups of 128"):
        loading.load_transformer(checkpoint, shard=Shard(0, 8))


def test_matrices_that_fluxmesh_keeps_whole_are_dequantized_exactly(tmp_path):
    """mflux quantizes every linear; T5's embedding and the layers around the blocks too."""
    checkpoint = resolved(make_checkpoint(tmp_path / "model", layout="bfl"))
    for component, load in (
        ("transformer", loading.load_transformer),
        ("text_encoder_2", load_t5),
    ):
        arrays = arrays_of(checkpoint, component)
        stored, exact, packed = triples(arrays, 8, 32, component, everything=True)
        file = write_stored(tmp_path / f"{component}.safetensors", stored)
        loaded = parameters(load(with_file(checkpoint, component, file), mx.float32))
        plain = [name for name in loaded if name in exact and name not in packed]
        kept = [name for name in packed if name in loaded and name.endswith(".scales")]
        dequantized = [
            name
            for name in exact
            if name in loaded
            and loaded[name].dtype != mx.uint32
            and exact[name] is not arrays[name]
        ]
        assert plain
        assert kept
        assert {"txt_in.weight", "shared.weight"} & set(dequantized)
        for name in dequantized:
            np.testing.assert_array_equal(np.array(loaded[name]), exact[name])


def test_quantized_parts_of_a_fused_matrix_are_stacked(tmp_path):
    """Under diffusers' names, q, k and v are triples of their own."""
    made = make_checkpoint(tmp_path / "model")
    checkpoint = resolved(made)
    file = made.folder / "transformer/diffusion_pytorch_model.safetensors"
    header = read_header(file)
    arrays = {name: tensor_source.read_float32(header, name) for name in header.entries}
    stored, exact, _ = triples(arrays, 4, 32, everything=True)
    write_stored(file, stored)
    model = loading.load_transformer(resolved(made), mx.float32)
    linear = model.double_blocks[0].img_attn.qkv
    parts = [exact[f"transformer_blocks.0.attn.to_{part}.weight"] for part in "qkv"]
    values = mx.dequantize(linear.weight, linear.scales, linear.biases, 32, 4)
    np.testing.assert_array_equal(np.array(values), np.concatenate(parts))
    assert checkpoint.bits is None


def test_a_quantized_model_is_not_quantized_or_fused_again(tmp_path):
    from fluxmesh.adapters.fuse import fuse_checkpoint

    made = make_checkpoint(tmp_path / "model")
    file = made.folder / "transformer/diffusion_pytorch_model.safetensors"
    header = read_header(file)
    arrays = {name: tensor_source.read_float32(header, name) for name in header.entries}
    write_stored(file, triples(arrays, 4, 32, everything=True)[0])
    checkpoint = resolved(made)
    with pytest.raises(UsageError, match="4 bits already"):
        quantize_checkpoint(checkpoint, tmp_path / "q", 8)
    with pytest.raises(UsageError, match="is quantized"):
        fuse_checkpoint(checkpoint, tmp_path / "f", [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


# --- what is broken --------------------------------------------------------------------------


def test_a_weight_that_is_no_number_stops_the_load_and_is_named(tmp_path):
    made = make_checkpoint(tmp_path, layout="bfl")
    names = ("double_blocks.1.img_attn.qkv.weight", "single_blocks.0.linear1.bias")

    def spoil(arrays):
        for name in names:
            arrays[name].reshape(-1)[5] = np.nan

    rewrite(made.path, spoil)
    checkpoint = hub.resolve(str(made.path))
    loading.verify(checkpoint)  # headers say nothing of it
    with pytest.raises(WeightsError) as caught:
        loading.load_transformer(checkpoint)
    assert str(made.path) in str(caught.value)
    assert names[0] in str(caught.value)
    assert "NaN" in str(caught.value)
    assert names[0] in str(first_not_finite(checkpoint))


def test_one_number_of_a_large_matrix_is_found_by_who_looks_at_all(tmp_path, monkeypatch):
    made = make_checkpoint(tmp_path, layout="bfl")
    name = "single_blocks.0.linear1.weight"

    def spoil(arrays):
        arrays[name].reshape(-1)[200] = -np.inf

    heard = []
    checkpoint = resolved(made)
    assert first_not_finite(checkpoint, lambda done, total: heard.append((done, total))) is None
    assert heard == sorted(heard) and len({total for _, total in heard}) == 1
    assert heard[-1][0] == heard[-1][1] and len(heard) > 50
    rewrite(made.path, spoil)
    monkeypatch.setattr(finite, "PIECE", 1000)
    monkeypatch.setattr(finite, "RUN", 100)
    checkpoint = hub.resolve(str(made.path))
    loading.load_transformer(checkpoint)  # a quarter of the matrix is looked at
    assert name in str(first_not_finite(checkpoint))


@pytest.mark.parametrize("form", ["scale_weight", "Q4_K"])
def test_a_file_that_is_cut_off_is_refused_by_its_path_once(tmp_path, form):
    made = make_checkpoint(tmp_path, layout="bfl", guidance=True)
    arrays = arrays_of(resolved(made), "transformer")
    file, _ = FORMS[form](tmp_path / "flux1-stored", arrays)
    file.write_bytes(file.read_bytes()[:-700])
    with pytest.raises(WeightsError, match="truncated") as caught:
        loading.verify(hub.resolve(str(file)))
    assert str(caught.value).count(str(file)) == 1
    assert "\n" not in str(caught.value)


def test_bitsandbytes_is_refused_by_its_name_before_a_shape_is_told(tmp_path):
    made = make_checkpoint(tmp_path, layout="bfl")

    def pack(arrays):
        weight = arrays.pop("img_in.weight")
        arrays["img_in.weight"] = weight.reshape(-1, 1)
        arrays["img_in.weight.quant_state.bitsandbytes__nf4"] = np.zeros(80, np.float32)

    rewrite(made.path, pack)
    with pytest.raises(WeightsError, match="bitsandbytes' nf4"):
        hub.resolve(str(made.path))


def test_bitsandbytes_in_a_folder_is_refused_by_its_name(tmp_path):
    made = make_checkpoint(tmp_path)
    file = made.folder / "text_encoder_2/model.safetensors"

    def pack(arrays):
        key = "encoder.block.0.layer.0.SelfAttention.q"
        arrays[f"{key}.weight"] = arrays[f"{key}.weight"].reshape(-1, 1)
        arrays[f"{key}.SCB"] = np.zeros(8, np.float32)

    rewrite(file, pack)
    assert_refused(made, "bitsandbytes' int8", str(file))


def test_weights_in_float64_are_read(tmp_path):
    checkpoint = resolved(make_checkpoint(tmp_path / "model", layout="bfl"))
    arrays = arrays_of(checkpoint, "vae")
    wide = {name: (values * np.float64(1 + 1e-12), "F64") for name, values in arrays.items()}
    file = write_stored(tmp_path / "ae64.safetensors", wide)
    pair = [checkpoint, with_file(checkpoint, "vae", file)]
    assert_same(*(parameters(loading.load_autoencoder(c, mx.float32)) for c in pair))


# --- pictures --------------------------------------------------------------------------------


def picture(monkeypatch, checkpoint: Checkpoint, **options) -> np.ndarray:
    monkeypatch.setattr(lazy_models.hub, "resolve", lambda *_, **__: checkpoint)
    pipeline = FluxPipeline("tiny", **options)
    return np.array(
        pipeline.generate_images("a robot", n_images=1, num_steps=2, latent_size=(8, 8), seed=3)
    )


@pytest.fixture(scope="module")
def tiny() -> Checkpoint:
    return hub.resolve("tiny")


@pytest.mark.parametrize("form", ["scale_weight", "fp8 everywhere", "Q8_0", "Q4_K"])
def test_tiny_in_any_form_paints_what_its_numbers_paint(tmp_path, monkeypatch, tiny, form):
    file, exact = FORMS[form](tmp_path / "stored", arrays_of(tiny, "transformer"))
    write_safetensors(tmp_path / "exact.safetensors", exact)
    pair = [with_file(tiny, "transformer", f) for f in (file, tmp_path / "exact.safetensors")]
    stored, plain = (picture(monkeypatch, checkpoint) for checkpoint in pair)
    assert stored.tobytes() == plain.tobytes()
    usual = picture(monkeypatch, tiny)
    difference = np.abs(stored - usual).mean()
    assert 0 < difference < 0.1, difference


def test_tiny_in_mlx_form_paints_what_quantizing_on_the_way_paints(tmp_path, monkeypatch, tiny):
    stored, _, _ = triples(arrays_of(tiny, "transformer"), 8, 64)
    file = write_stored(tmp_path / "tiny.safetensors", stored)
    checkpoint = with_file(tiny, "transformer", file)
    pair = [picture(monkeypatch, checkpoint, bits=8), picture(monkeypatch, tiny, bits=8)]
    assert pair[0].tobytes() == pair[1].tobytes()


def test_the_tables_are_those_of_the_checkpoint(tiny):
    """`arrays_of` gives every tensor that the model holds."""
    assert arrays_of(tiny, "transformer").keys() == table_of(tiny, "transformer").keys()
