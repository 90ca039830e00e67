"""Loading: equal from every layout, and small in memory."""

from __future__ import annotations

import dataclasses
import gc

import mlx.core as mx
import numpy as np
import pytest

from fluxmesh.weights import loading
from fluxmesh.weights.reader import ComponentReader, table_of
from tests import checkpoints
from tests.allocation import allocated
from tests.checkpoints import make_checkpoint
from tests.numerics.loading import (
    FILES,
    LOADERS,
    assert_same,
    load_clip,
    load_t5,
    parameters,
    resolved,
    rewrite,
)


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
    models = [parameters(loading.load_transformer(resolved(made))) for made in (plain, prefixed)]
    assert_same(*models)


@pytest.mark.parametrize("component", LOADERS)
def test_the_models_hold_exactly_the_tensors_of_the_tables(tmp_path, component):
    checkpoint = resolved(make_checkpoint(tmp_path, guidance=True))
    loaded = parameters(LOADERS[component](checkpoint))
    targets = table_of(checkpoint, component)
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
        parameters(loading.load_transformer(whole)), parameters(loading.load_transformer(parts))
    )


def test_a_bfloat16_file_is_read_bit_for_bit(tmp_path):
    stored = resolved(make_checkpoint(tmp_path / "bf16", seed=5, dtype="bfloat16"))
    full = resolved(make_checkpoint(tmp_path / "f32", seed=5))
    assert_same(parameters(load_t5(stored)), parameters(load_t5(full)))
    lifted = parameters(load_t5(stored, mx.float32))
    assert all(value.dtype == mx.float32 for value in lifted.values())


def test_a_float16_file_is_read(tmp_path):
    made = make_checkpoint(tmp_path)
    path = made.folder / FILES["text_encoder_2"]
    arrays = checkpoints.random_arrays(
        table_of(resolved(made), "text_encoder_2"), np.random.default_rng(1)
    )
    from fluxmesh.storage.safetensors import write_tensors

    path.unlink()
    halves = {key: (value.astype(np.float16), "F16") for key, value in arrays.items()}
    write_tensors(path, halves, {})
    loaded = parameters(load_t5(resolved(made), mx.float32))
    for name, (value, _) in halves.items():
        np.testing.assert_array_equal(np.array(loaded[name]), value.astype(np.float32))


@pytest.mark.parametrize("spelling", ["text_model.{}", "{}"])
def test_clip_is_found_under_both_of_its_spellings(tmp_path, spelling):
    made = make_checkpoint(tmp_path)
    path = made.folder / FILES["text_encoder"]
    arrays = checkpoints.random_arrays(
        table_of(resolved(made), "text_encoder"), np.random.default_rng(1)
    )
    named = {spelling.format(key): value for key, value in arrays.items()}
    checkpoints.write_safetensors(path, named)
    loaded = parameters(load_clip(resolved(made), mx.float32))
    for name, value in arrays.items():
        np.testing.assert_array_equal(np.array(loaded[name]), value)


def test_t5_is_found_when_only_its_encoder_has_the_embedding(tmp_path):
    made = make_checkpoint(tmp_path)
    path = made.folder / FILES["text_encoder_2"]
    arrays = checkpoints.random_arrays(
        table_of(resolved(made), "text_encoder_2"), np.random.default_rng(1)
    )
    embedding = arrays.pop("shared.weight")
    checkpoints.write_safetensors(path, arrays | {"encoder.embed_tokens.weight": embedding})
    loaded = load_t5(resolved(made), mx.float32)
    np.testing.assert_array_equal(np.array(loaded.shared.weight), embedding)


def test_a_shard_reads_its_rows_and_nothing_else(tmp_path, monkeypatch):
    checkpoint = resolved(make_checkpoint(tmp_path, seed=7))
    reader = ComponentReader(checkpoint, "transformer")
    name = "single_blocks.1.linear1.weight"
    whole = loading.read_rows(reader, name, mx.float32)
    read = []
    from fluxmesh.weights import reader as components

    original = components.read_each_into

    def counting(reads, check):
        read.extend(out.nbytes for out, _, _ in reads)
        original(reads, check)

    monkeypatch.setattr(components, "read_each_into", counting)
    part = loading.read_rows(reader, name, mx.float32, 60, 200)  # of q, k, v and the MLP
    assert mx.array_equal(part, whole[60:200])
    assert sum(read) == part.nbytes
    assert len(read) == 4


def test_loading_holds_the_model_and_one_tensor_more(tmp_path):
    config = dataclasses.replace(
        checkpoints.TRANSFORMER, hidden_size=192, num_heads=6, depth=4, depth_single_blocks=8
    )
    checkpoint = resolved(make_checkpoint(tmp_path, transformer=config))
    gc.collect()  # what other tests have left
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = loading.load_transformer(checkpoint)  # the file is float32: twice the model's bytes
    peak = mx.get_peak_memory() - before
    active, cached = mx.get_active_memory() - before, mx.get_cache_memory()
    size = allocated(parameters(model).values())
    largest = max(value.nbytes for value in parameters(model).values())
    in_file = 2 * largest
    assert size > 20 * largest  # else the bound below would say nothing
    assert size <= active <= size * 1.02
    assert peak <= size * 1.02 + in_file
    assert cached == 0


def test_quantizing_while_loading_never_holds_the_plain_model(tmp_path):
    config = dataclasses.replace(
        checkpoints.TRANSFORMER, hidden_size=192, num_heads=6, depth=4, depth_single_blocks=8
    )
    checkpoint = resolved(make_checkpoint(tmp_path, transformer=config))
    plain = sum(v.nbytes for v in parameters(loading.load_transformer(checkpoint)).values())
    gc.collect()  # what other tests have left
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = loading.load_transformer(checkpoint, bits=4)
    assert mx.get_peak_memory() - before < 0.5 * plain
    assert model.double_blocks[0].img_attn.qkv.bits == 4


def test_progress_ends_at_all_the_bytes(tmp_path):
    checkpoint = resolved(make_checkpoint(tmp_path))
    for component, load in LOADERS.items():
        progress: list[tuple[int, int]] = []
        load(
            checkpoint,
            on_bytes=lambda done, total, progress=progress: progress.append((done, total)),
        )
        done = [number for number, _ in progress]
        assert done == sorted(done)
        total = checkpoint.components[component].nbytes
        assert {number for _, number in progress} == {total}
        assert 0.9 * total < done[-1] <= total  # the rest is the header
