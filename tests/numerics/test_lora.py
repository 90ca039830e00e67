"""Adapters: every key format in and out, beside and fused, stacked, plain and quantized bases."""

from __future__ import annotations

import dataclasses
import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from fluxmesh.adapters.changes import LowRank
from fluxmesh.errors import AdapterError, ModelNotFoundError, OutputError
from fluxmesh.models.flux1.tensor_maps import to_diffusers, transformer_tensors
from fluxmesh.models.lora_linear import LoRALinear
from fluxmesh.storage.safetensors import read_header
from fluxmesh.weights import hub, loading
from tests import checkpoints
from tests import flux1_adapters as lora
from tests.checkpoints import make_checkpoint, write_safetensors

CONFIG = dataclasses.replace(checkpoints.TRANSFORMER, guidance_embed=True)
TENSORS = transformer_tensors(CONFIG)
MODULES = [name.removesuffix(".weight") for name in TENSORS if name.endswith(".weight")]
RANK = 4


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def random_adapter(seed: int = 0, names=MODULES, scale: float = 1.0) -> dict[str, LowRank]:
    """An adapter of every linear of the small transformer."""
    rng = np.random.default_rng(seed)
    adapter = {}
    for name in names:
        out, into = TENSORS[f"{name}.weight"].shape
        a, b = normal(rng, RANK, into) / 8, normal(rng, out, RANK) / 8
        adapter[name] = LowRank(a, b, scale)
    return adapter


def delta(low: LowRank) -> np.ndarray:
    return low.scale * (low.b.astype(np.float64) @ low.a.astype(np.float64))


def assert_same_change(adapter: dict[str, LowRank], other: dict[str, LowRank]) -> None:
    assert adapter.keys() == other.keys()
    for name in adapter:
        np.testing.assert_allclose(
            delta(adapter[name]), delta(other[name]), atol=1e-6, err_msg=name
        )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    made = make_checkpoint(tmp_path_factory.mktemp("model"), seed=2, guidance=True)
    return hub.resolve(str(made.path))


def velocity(flux) -> np.ndarray:
    """One forward pass on fixed random input, as float32."""
    return np.array(forward(flux).astype(mx.float32))


def forward(flux) -> mx.array:
    rng = np.random.default_rng(11)
    ids = np.stack([np.zeros(6), np.repeat([0, 1], 3), np.tile([0, 1, 2], 2)], axis=-1)
    return flux.forward(
        img=mx.array(normal(rng, 1, 6, CONFIG.in_channels)),
        img_ids=mx.array(ids),
        txt=mx.array(normal(rng, 1, 5, CONFIG.context_in_dim)),
        txt_ids=mx.zeros((5, 3)),
        timesteps=mx.array([0.7]),
        y=mx.array(normal(rng, 1, CONFIG.vec_in_dim)),
        guidance=3.5,
    )


def distance(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("file_format", lora.FORMATS)
def test_every_format_brings_back_what_was_written(tmp_path, file_format, scale):
    adapter = random_adapter(scale=scale)
    path = tmp_path / "adapter.safetensors"
    lora.write_adapter(path, adapter, CONFIG, file_format)
    assert_same_change(lora.read_adapter(path, CONFIG), adapter)


@pytest.mark.parametrize(
    ("file_format", "key"),
    [
        ("diffusers", "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"),
        ("kohya", "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"),
        ("kohya", "lora_unet_double_blocks_0_img_attn_qkv.alpha"),
        ("bfl", "diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight"),
        ("apple", "double_blocks.0.img_attn.qkv.lora_a"),
        ("apple", "double_blocks.0.img_mlp.layers.2.lora_b"),
    ],
)
def test_written_keys_are_those_that_others_read(tmp_path, file_format, key):
    path = tmp_path / "adapter.safetensors"
    lora.write_adapter(path, random_adapter(), CONFIG, file_format, {"lora_rank": "4"})
    header = read_header(path)
    assert key in header.entries
    assert header.metadata["lora_rank"] == "4"


def test_an_adapter_is_never_written_over_a_file(tmp_path):
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(b"precious")
    with pytest.raises(OutputError, match="exists already"):
        lora.write_adapter(path, random_adapter(), CONFIG)
    assert path.read_bytes() == b"precious"


def test_kohyas_alpha_scales_by_alpha_over_rank(tmp_path):
    (plain,) = random_adapter(names=["img_in"]).values()
    path = tmp_path / "kohya.safetensors"
    arrays = {
        "lora_unet_img_in.lora_down.weight": plain.a,
        "lora_unet_img_in.lora_up.weight": plain.b,
        "lora_unet_img_in.alpha": np.array(1.0, dtype=np.float32),
    }
    write_safetensors(path, arrays)
    expected = {"img_in": dataclasses.replace(plain, scale=1 / RANK)}
    assert_same_change(lora.read_adapter(path, CONFIG), expected)


@pytest.mark.parametrize("prefix", ["lora_unet_", "lora_transformer_"])
def test_separate_queries_keys_and_values_become_one_matrix_of_all_their_ranks(tmp_path, prefix):
    rng = np.random.default_rng(3)
    width = CONFIG.hidden_size
    arrays, blocks = {}, []
    for part, rank, alpha in (("to_q", 2, 1.0), ("to_k", 3, 3.0), ("to_v", 4, 8.0)):
        key = f"{prefix}single_transformer_blocks_1_attn_{part}"
        a, b = normal(rng, rank, width), normal(rng, width, rank)
        arrays |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
        arrays[f"{key}.alpha"] = np.array(alpha, dtype=np.float32)
        blocks.append(alpha / rank * b.astype(np.float64) @ a.astype(np.float64))
    path = tmp_path / "kohya.safetensors"
    write_safetensors(path, arrays)
    merged = lora.read_adapter(path, CONFIG)["single_blocks.1.linear1"]
    assert merged.rank == 9
    mlp = np.zeros((CONFIG.mlp_hidden_dim, width))
    np.testing.assert_allclose(delta(merged), np.concatenate([*blocks, mlp]), atol=1e-5)


def test_diffusers_gets_the_separate_ranks_back(tmp_path):
    rng = np.random.default_rng(3)
    width = CONFIG.hidden_size
    arrays = {}
    for part, rank in (("to_q", 2), ("to_v", 5)):
        key = f"transformer.transformer_blocks.0.attn.{part}"
        arrays[f"{key}.lora_A.weight"] = normal(rng, rank, width)
        arrays[f"{key}.lora_B.weight"] = normal(rng, width, rank)
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    write_safetensors(first, arrays)
    lora.write_adapter(second, lora.read_adapter(first, CONFIG), CONFIG)
    entries = read_header(second).entries
    for key, array in arrays.items():
        assert entries[key].shape == array.shape


def test_pefts_settings_in_the_header_scale_the_adapter(tmp_path):
    from fluxmesh.storage.safetensors import write_tensors

    (plain,) = random_adapter(names=["img_in"]).values()
    key = "transformer.x_embedder"
    arrays = {f"{key}.lora_A.weight": (plain.a, "F32"), f"{key}.lora_B.weight": (plain.b, "F32")}
    settings = {"transformer.r": RANK, "transformer.lora_alpha": 2.0}
    for name, more, scale in (
        ("plain", {}, 2 / RANK),
        ("pattern", {"transformer.alpha_pattern": {"x_embedder": 8}}, 8 / RANK),
        ("rslora", {"transformer.use_rslora": True}, 2 / RANK**0.5),
    ):
        path = tmp_path / f"{name}.safetensors"
        write_tensors(path, arrays, {"lora_adapter_metadata": json.dumps(settings | more)})
        expected = {"img_in": dataclasses.replace(plain, scale=scale)}
        assert_same_change(lora.read_adapter(path, CONFIG), expected)


@pytest.mark.parametrize(
    "prefix",
    ["", "transformer.", "diffusion_model.", "base_model.model.", "model.diffusion_model."],
)
@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("lora_A.weight", "lora_B.weight"),
        ("lora_A.default.weight", "lora_B.default.weight"),
        ("lora_down.weight", "lora_up.weight"),
        ("lora.down.weight", "lora.up.weight"),
    ],
)
def test_common_spellings_mean_the_same(tmp_path, prefix, a, b):
    adapter = random_adapter(names=["double_blocks.1.txt_mlp.2"])
    (low,) = adapter.values()
    path = tmp_path / "adapter.safetensors"
    for module in ("double_blocks.1.txt_mlp.2", "transformer_blocks.1.ff_context.net.2"):
        write_safetensors(path, {f"{prefix}{module}.{a}": low.a, f"{prefix}{module}.{b}": low.b})
        assert_same_change(lora.read_adapter(path, CONFIG), adapter)


def test_bfloat16_adapters_are_read(tmp_path):
    adapter = random_adapter(names=["txt_in"])
    (low,) = adapter.values()
    path = tmp_path / "adapter.safetensors"
    arrays = {"txt_in.lora_down.weight": low.a, "txt_in.lora_up.weight": low.b}
    write_safetensors(path, arrays, "bfloat16")
    change = lora.read_adapter(path, CONFIG)["txt_in"]
    np.testing.assert_allclose(delta(change), delta(low), atol=2e-3)


def test_a_folder_stands_for_the_adapter_in_it(tmp_path):
    lora.write_adapter(tmp_path / "final_adapters.safetensors", random_adapter(), CONFIG)
    lora.write_adapter(tmp_path / "0000100_adapters.safetensors", random_adapter(1), CONFIG)
    assert lora.find_adapter(tmp_path).name == "final_adapters.safetensors"
    (tmp_path / "final_adapters.safetensors").unlink()
    assert lora.find_adapter(tmp_path).name == "0000100_adapters.safetensors"
    lora.write_adapter(tmp_path / "0000200_adapters.safetensors", random_adapter(1), CONFIG)
    with pytest.raises(ModelNotFoundError, match="2 .safetensors files"):
        lora.find_adapter(tmp_path)


# --- refusals --------------------------------------------------------------------------------


def refused(tmp_path, arrays: dict[str, np.ndarray], *words: str) -> None:
    path = tmp_path / "adapter.safetensors"
    write_safetensors(path, arrays)
    with pytest.raises(AdapterError) as caught:
        lora.read_adapter(path, CONFIG)
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(path), *words):
        assert word in message


PAIR = {"a": np.ones((4, 64)), "b": np.ones((64, 4))}


@pytest.mark.parametrize(
    "module",
    [
        "transformer.transformer_blocks.2.attn.to_q",  # the model has two
        "lora_unet_double_blocks_7_img_attn_proj",
        "diffusion_model.double_blocks.0.img_attn.norm.query_norm",
        "guidance",
    ],
)
def test_keys_that_match_nothing_are_named(tmp_path, module):
    keys = (f"{module}.lora_down.weight", f"{module}.lora_up.weight")
    refused(tmp_path, dict(zip(keys, PAIR.values(), strict=True)), *keys, "match nothing")


def test_an_adapter_of_stable_diffusion_is_called_so(tmp_path):
    module = "lora_unet_down_blocks_0_attentions_0_proj_in"
    keys = (f"{module}.lora_down.weight", f"{module}.lora_up.weight")
    arrays = dict(zip(keys, PAIR.values(), strict=True))
    refused(tmp_path, arrays, keys[0], "another model", "Stable Diffusion")


@pytest.mark.parametrize(
    ("key", "word"),
    [
        ("transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector.weight", "incomplete"),
        ("lora_unet_double_blocks_0_img_attn_proj.hada_w1_a", "incomplete"),
        ("lora_unet_double_blocks_0_img_attn_proj.dora_scale", "incomplete"),
        ("lora_unet_double_blocks_0_img_attn_proj.oft_blocks", "OFT"),
    ],
)
def test_half_an_adapter_and_other_kinds_are_refused_by_module(tmp_path, key, word):
    refused(tmp_path, {key: np.ones((4, 4))}, key.rpartition(".")[0].rpartition(".lora_")[0], word)


def test_many_unknown_keys_are_counted_not_listed(tmp_path):
    arrays = {f"unknown.{i}.lora_down.weight": PAIR["a"] for i in range(40)}
    refused(tmp_path, arrays, "and 35 more")


def test_a_lone_matrix_is_refused(tmp_path):
    refused(tmp_path, {"img_in.lora_A.weight": PAIR["a"]}, "img_in", "lacks the other")


def test_matrices_of_another_model_are_refused_with_both_sizes(tmp_path):
    arrays = {"txt_in.lora_A.weight": PAIR["a"], "txt_in.lora_B.weight": PAIR["b"]}
    refused(tmp_path, arrays, "txt_in", "64x64", "64x32")


def test_a_file_without_lora_is_refused(tmp_path):
    refused(tmp_path, {}, "no LoRA")


def test_a_truncated_adapter_is_refused(tmp_path):
    path = tmp_path / "adapter.safetensors"
    lora.write_adapter(path, random_adapter(), CONFIG)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(AdapterError, match="truncated"):
        lora.read_adapter(path, CONFIG)


def test_a_missing_adapter_is_refused(tmp_path):
    with pytest.raises(ModelNotFoundError, match="absent"):
        lora.check_adapters([(tmp_path / "absent.safetensors", 1.0)], CONFIG)


def test_a_refused_adapter_changes_nothing(tmp_path, checkpoint):
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    lora.write_adapter(good, random_adapter(), CONFIG)
    write_safetensors(bad, {"nothing.lora_A.weight": PAIR["a"]})
    flux = loading.load_transformer(checkpoint, mx.float32)
    before = velocity(flux)
    with pytest.raises(AdapterError):
        lora.apply_adapters(flux, [(good, 1.0), (bad, 1.0)])
    np.testing.assert_array_equal(velocity(flux), before)


# --- on a model ----------------------------------------------------------------------------------


@pytest.fixture
def adapter_file(tmp_path):
    path = tmp_path / "adapter.safetensors"
    lora.write_adapter(path, random_adapter(5), CONFIG)
    return path


def changed_by_hand(checkpoint, *adapters: tuple[dict[str, LowRank], float]):
    """The model whose weights were changed with NumPy."""
    flux = loading.load_transformer(checkpoint, mx.float32)
    for adapter, strength in adapters:
        for name, low in adapter.items():
            module = loading.module_at(flux, name)
            module.weight = module.weight + mx.array((strength * delta(low)).astype(np.float32))
    return flux


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("file_format", lora.FORMATS)
def test_an_adapter_adds_its_product_to_every_linear(tmp_path, checkpoint, file_format, fuse):
    path = tmp_path / "adapter.safetensors"
    lora.write_adapter(path, random_adapter(5), CONFIG, file_format)
    flux = loading.load_transformer(checkpoint, mx.float32)
    plain = velocity(flux)
    lora.apply_adapters(flux, [(path, 0.8)], fuse=fuse)
    expected = velocity(changed_by_hand(checkpoint, (random_adapter(5), 0.8)))
    assert distance(plain, expected) > 0.1
    assert distance(velocity(flux), expected) < 1e-5
    has_adapters = any(isinstance(m, LoRALinear) for _, m in flux.named_modules())
    assert has_adapters is not fuse


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("fuse", [False, True])
def test_adapters_stack_with_strengths_of_their_own(tmp_path, checkpoint, together, fuse):
    some = random_adapter(6, MODULES[::2])
    pairs = []
    for number, (adapter, strength) in enumerate(((random_adapter(5), 0.8), (some, -0.5))):
        path = tmp_path / f"{number}.safetensors"
        lora.write_adapter(path, adapter, CONFIG)
        pairs.append((path, strength))
    flux = loading.load_transformer(checkpoint, mx.float32)
    for batch in [pairs] if together else [[pair] for pair in pairs]:
        lora.apply_adapters(flux, batch, fuse=fuse)
    expected = changed_by_hand(checkpoint, (random_adapter(5), 0.8), (some, -0.5))
    assert distance(velocity(flux), velocity(expected)) < 1e-5


def test_a_float32_adapter_does_not_lift_bfloat16_activations():
    linear = nn.Linear(8, 6)
    linear.set_dtype(mx.bfloat16)
    adapted = LoRALinear(linear, mx.ones((8, 2)), mx.ones((2, 6)), 0.7)
    assert adapted.lora_a.dtype == mx.float32
    assert adapted(mx.ones((3, 8), dtype=mx.bfloat16)).dtype == mx.bfloat16


def test_the_velocity_of_an_adapted_bfloat16_model_is_bfloat16(checkpoint, adapter_file):
    flux = loading.load_transformer(checkpoint)
    lora.apply_adapters(flux, [(adapter_file, 1.0)])
    dtypes = {value.dtype for _, value in tree_flatten(flux.parameters())}
    assert dtypes == {mx.bfloat16}
    assert forward(flux).dtype == mx.bfloat16


@pytest.mark.parametrize("bits", [4, 8])
def test_beside_a_quantized_base_the_adapter_stays_exact(checkpoint, adapter_file, bits):
    flux = loading.load_transformer(checkpoint, mx.float32, bits)
    name = "single_blocks.0.linear1"
    base = loading.module_at(flux, name)
    x = mx.array(normal(np.random.default_rng(1), 3, CONFIG.hidden_size))
    expected = np.array(base(x)) + np.array(x) @ delta(random_adapter(5)[name]).T
    lora.apply_adapters(flux, [(adapter_file, 1.0)])
    adapted = loading.module_at(flux, name)
    assert isinstance(adapted.linear, nn.QuantizedLinear)
    assert distance(np.array(adapted(x)), expected) < 1e-5


def test_fusing_into_a_quantized_base_rounds_the_sum(checkpoint, adapter_file):
    flux = loading.load_transformer(checkpoint, mx.float32, 8)
    lora.apply_adapters(flux, [(adapter_file, 1.0)], fuse=True)
    assert isinstance(flux.single_blocks[0].linear1, nn.QuantizedLinear)
    expected = velocity(changed_by_hand(checkpoint, (random_adapter(5), 1.0)))
    quantized = velocity(loading.load_transformer(checkpoint, mx.float32, 8))
    assert distance(velocity(flux), expected) < 0.05
    assert distance(quantized, expected) > 0.1


def test_a_rank_reaches_every_tensor_that_a_diffusers_file_has(tmp_path):
    path = tmp_path / "adapter.safetensors"
    lora.write_adapter(path, random_adapter(), CONFIG)
    modules = {
        key.removeprefix("transformer.").removesuffix(".lora_A.weight")
        for key in read_header(path).entries
        if key.endswith(".lora_A.weight")
    }
    linears = {
        key.removesuffix(".weight")
        for key, rows in to_diffusers(TENSORS).items()
        if rows[0].key.endswith(".weight")
    }
    assert modules == linears
