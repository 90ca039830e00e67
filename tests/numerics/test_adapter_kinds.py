"""LoKr, LoHa, DoRA, differences: on a model as by hand, whole or a shard, quantized or not."""

from __future__ import annotations

import functools
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from fluxmesh.adapters.fuse import fuse_checkpoint
from fluxmesh.adapters.targets import AdapterTargets, targets_of
from fluxmesh.cluster.snapshot import ModelVariant
from fluxmesh.engine.residency import ModelStore
from fluxmesh.errors import AdapterError, ModelNotFoundError
from fluxmesh.kernels.ops import HEADROOM
from fluxmesh.models.flux1.partition import cuts
from fluxmesh.models.flux2.adapter_names import components
from fluxmesh.models.flux2.config import Flux2Config
from fluxmesh.models.flux2.transformer import Flux2
from fluxmesh.models.lora_linear import innermost
from fluxmesh.models.module_tree import module_at
from fluxmesh.models.partition import Cut, Shard
from fluxmesh.models.slicing import LentLinear, cut_linear, shard_of
from fluxmesh.models.spread import output_rows
from fluxmesh.request import AdapterRef
from fluxmesh.storage.safetensors import read_header, read_tensor
from fluxmesh.weights import hub, loading
from fluxmesh.weights.quantize import quantize_checkpoint
from tests import flux1_adapters as lora
from tests.adapter_files import KINDS, normal, write
from tests.checkpoints import make_checkpoint

STRENGTH = 0.7
# A fused matrix, one of several inputs' spans, one cut along inputs, one that is never cut.
WHOLE = (
    "double_blocks.0.img_attn.qkv",
    "single_blocks.1.linear1",
    "single_blocks.0.linear2",
    "double_blocks.1.txt_mlp.2",
    "img_in",
)
# Parts of fused matrices, and the one whose halves lie the other way round.
PARTS = {
    "transformer_blocks.1.attn.to_k": ("double_blocks.1.img_attn.qkv", [(64, 128)]),
    "transformer_blocks.0.attn.add_v_proj": ("double_blocks.0.txt_attn.qkv", [(128, 192)]),
    "single_transformer_blocks.0.proj_mlp": ("single_blocks.0.linear1", [(192, 448)]),
    "single_transformer_blocks.0.attn.to_q": ("single_blocks.0.linear1", [(0, 64)]),
    "norm_out.linear": ("final_layer.adaLN_modulation.1", [(64, 128), (0, 64)]),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    made = make_checkpoint(tmp_path_factory.mktemp("model"), seed=2, guidance=True)
    return hub.resolve(str(made.path))


@functools.lru_cache(maxsize=64)
def made(checkpoint_name: str, folder, kind: str):
    """(the file, each linear's weight as it should become at strength 1, float64)."""
    checkpoint = hub.resolve(checkpoint_name)
    rng = np.random.default_rng(4)
    expected: dict[str, np.ndarray] = {}
    arrays = {}

    def before(name: str) -> np.ndarray:
        if name not in expected:
            weight = loading.whole_weight(checkpoint, "transformer", name)
            expected[name] = weight.astype(np.float64)
        return expected[name]

    for name in WHOLE:
        stored, expected[name] = KINDS[kind](rng, before(name))
        arrays |= {f"lora_unet_{name.replace('.', '_')}.{end}": x for end, x in stored.items()}
    for part, (name, spans) in PARTS.items():
        rows = np.concatenate([np.arange(*span) for span in spans])
        stored, expected[name][rows] = KINDS[kind](rng, before(name)[rows])
        arrays |= {f"lycoris_{part.replace('.', '_')}.{end}": x for end, x in stored.items()}
    return write(folder / f"{kind}.safetensors", arrays), expected


@pytest.fixture
def file_of(checkpoint, tmp_path_factory):
    return functools.partial(made, checkpoint.name, tmp_path_factory.getbasetemp())


def weight_by_use(module) -> np.ndarray:
    """The weight that a linear has in effect: what it makes of each input alone, less the bias."""
    base = innermost(module)
    if isinstance(base, LentLinear):
        base = base.take()
    inputs = base.weight.shape[1]
    if "scales" in base:
        inputs = inputs * 32 // base.bits
    y = module(mx.eye(inputs))
    return np.array((y - base.bias if "bias" in base else y).T, np.float64)


def difference_of(flux, expected, before, strength: float = STRENGTH) -> float:
    """The largest difference from the weights merged by hand."""
    return max(
        np.abs(
            weight_by_use(module_at(flux, name))
            - (before(name) + strength * (after - before(name)))
        ).max()
        for name, after in expected.items()
    )


def original(checkpoint, name: str) -> np.ndarray:
    return loading.whole_weight(checkpoint, "transformer", name).astype(np.float64)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_does_to_every_linear_what_its_paper_says(checkpoint, file_of, kind, fuse):
    path, expected = file_of(kind)
    flux = loading.load_transformer(checkpoint, mx.float32)
    before = functools.partial(original, checkpoint)
    assert difference_of(flux, expected, before) > 0.002
    lora.apply_adapters(flux, [(path, STRENGTH)], fuse)
    assert difference_of(flux, expected, before) < 2e-6


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_quantized_model_the_adapter_beside_stays_exact(checkpoint, file_of, kind):
    path, expected = file_of(kind)
    flux = loading.load_transformer(checkpoint, mx.float32, 8)
    rounded = {name: weight_by_use(module_at(flux, name)) for name in expected}
    lora.apply_adapters(flux, [(path, STRENGTH)])

    def before(name: str) -> np.ndarray:
        return rounded[name]

    # The rounded weight is what the adapter is relative to, as the model at hand has it.
    tolerance = 2e-6 if not kind.startswith("dora") else 0.02
    for name, after in expected.items():
        change = STRENGTH * (after - original(checkpoint, name))
        difference = np.abs(weight_by_use(module_at(flux, name)) - before(name) - change).max()
        assert difference < tolerance, name


def test_on_a_folder_of_quantized_weights_dora_is_relative_to_these(checkpoint, file_of, tmp_path):
    path, _ = file_of("dora")
    quantize_checkpoint(checkpoint, tmp_path / "small", 8)
    small = hub.resolve(str(tmp_path / "small"))
    flux = loading.load_transformer(small, mx.float32)
    for name in WHOLE:
        held = weight_by_use(module_at(flux, name))
        np.testing.assert_allclose(original(small, name), held, atol=2e-6)
    weight_of = functools.partial(loading.whole_weight, small, "transformer")
    opened = lora.open_adapters([(path, 1.0)], targets_of(small.architecture))
    lora.apply_to_transformer(flux, opened, weight_of=weight_of)
    lengths = read_header(path).entries
    for name in ("double_blocks.0.img_attn.qkv", "single_blocks.0.linear2"):
        asked = read_tensor(lengths[f"lora_unet_{name.replace('.', '_')}.dora_scale"])
        rows = np.linalg.norm(weight_by_use(module_at(flux, name)), axis=1)
        np.testing.assert_allclose(rows, np.abs(asked.reshape(-1)), rtol=1e-5)


def test_in_float16_a_bias_of_what_ends_a_branch_keeps_its_room(checkpoint, tmp_path):
    rng = np.random.default_rng(8)
    bias = normal(rng, 64, size=2)
    keys = ("double_blocks.0.img_attn.proj", "double_blocks.0.img_attn.qkv")
    arrays = {f"diffusion_model.{keys[0]}.diff_b": bias,
              f"diffusion_model.{keys[1]}.diff_b": np.tile(bias, 3)}  # fmt: skip
    path = write(tmp_path / "a.safetensors", arrays)
    before, flux = (loading.load_transformer(checkpoint, mx.float16) for _ in range(2))
    lora.apply_adapters(flux, [(path, 1.0)])
    for key, expected in zip(keys, (bias / HEADROOM, np.tile(bias, 3)), strict=True):
        moved = module_at(flux, key).bias - module_at(before, key).bias
        np.testing.assert_allclose(np.array(moved), expected, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_takes_its_part(checkpoint, file_of, kind, fuse):
    path, _ = file_of(kind)
    whole = loading.load_transformer(checkpoint, mx.float32)
    lora.apply_adapters(whole, [(path, STRENGTH)])
    weight_of = functools.partial(loading.whole_weight, checkpoint, "transformer")
    for rank in range(2):
        shard = Shard(rank, 2)
        part = loading.load_transformer(checkpoint, mx.float32, shard=shard)
        opened = lora.open_adapters([(path, STRENGTH)], targets_of(checkpoint.architecture))
        lora.apply_to_transformer(part, opened, fuse, weight_of=weight_of)
        taken = shard_of(whole, shard)
        for name, cut in cuts(checkpoint.architecture.transformer, shard).items():
            expected = weight_by_use(module_at(whole, name))
            expected = expected[cut.indices] if cut.axis == 0 else expected[:, cut.indices]
            for each in (part, taken):
                actual = weight_by_use(module_at(each, name))
                np.testing.assert_allclose(actual, expected, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("kind", ["lokr_half", "loha_large", "difference", "dora", "dora_lokr"])
def test_part_of_a_part_is_that_part(checkpoint, file_of, kind):
    path, _ = file_of(kind)
    flux = loading.load_transformer(checkpoint, mx.float32)
    lora.apply_adapters(flux, [(path, STRENGTH)])
    linear = flux.single_blocks[0].linear1  # to_q and proj_mlp are adapted, to_k and to_v are not
    weight = weight_by_use(linear)
    rows = output_rows(linear, 40, 300, weight.shape[0])
    np.testing.assert_allclose(weight_by_use(rows), weight[40:300], atol=2e-6)
    again = cut_linear(rows, Cut(0, ((10, 60), (200, 260)), 260))
    np.testing.assert_allclose(
        weight_by_use(again), np.concatenate([weight[50:100], weight[240:300]]), atol=2e-6
    )
    columns = cut_linear(linear, Cut(1, ((8, 40),), 64))
    np.testing.assert_allclose(weight_by_use(columns), weight[:, 8:40], atol=2e-6)


@pytest.mark.parametrize("fuse", [False, True])
def test_adapters_of_different_kinds_come_one_after_another(checkpoint, file_of, fuse):
    """DoRA after another adapter is relative to what that one made of the weight."""
    first, _ = file_of("lokr_half")
    second, _ = file_of("dora")
    together = loading.load_transformer(checkpoint, mx.float32)
    lora.apply_adapters(together, [(first, 0.5), (second, STRENGTH), (first, 0.25)], fuse)
    apart = loading.load_transformer(checkpoint, mx.float32)
    for pair in ((first, 0.5), (second, STRENGTH), (first, 0.25)):
        lora.apply_adapters(apart, [pair], fuse=True)
    for name in (*WHOLE, *(name for name, _ in PARTS.values())):
        actual, expected = (weight_by_use(module_at(flux, name)) for flux in (together, apart))
        np.testing.assert_allclose(actual, expected, atol=5e-6, err_msg=name)


@pytest.mark.parametrize("fuse", [False, True])
def test_biases_and_norms_move_too(checkpoint, tmp_path, fuse):
    rng = np.random.default_rng(8)
    fused, split, norm = normal(rng, 192), normal(rng, 64), normal(rng, 32)
    a, b, bias = normal(rng, 4, 64), normal(rng, 64, 4), normal(rng, 64)
    path = write(
        tmp_path / "a.safetensors",
        {
            "diffusion_model.double_blocks.0.img_attn.qkv.diff_b": fused,
            "transformer.single_transformer_blocks.1.attn.to_v.diff_b": split,
            "diffusion_model.double_blocks.1.txt_attn.norm.key_norm.diff": norm,
            "transformer.transformer_blocks.0.attn.to_out.0.lora_A.weight": a,
            "transformer.transformer_blocks.0.attn.to_out.0.lora_B.weight": b,
            "transformer.transformer_blocks.0.attn.to_out.0.lora_B.bias": bias,
            "diffusion_model.img_in.diff": np.zeros((64, 64), np.float32),  # dropped
            "diffusion_model.nothing.of.ours.diff_b": np.zeros(3, np.float32),  # dropped
        },
    )
    before = loading.load_transformer(checkpoint, mx.float32)
    flux = loading.load_transformer(checkpoint, mx.float32)
    lora.apply_adapters(flux, [(path, 0.5)], fuse)

    def moved(name: str, leaf: str) -> np.ndarray:
        now, then = (innermost(module_at(each, name))[leaf] for each in (flux, before))
        return np.array(now - then)

    close = functools.partial(np.testing.assert_allclose, atol=1e-6)
    close(moved("double_blocks.0.img_attn.qkv", "bias"), fused / 2)
    close(moved("single_blocks.1.linear1", "bias")[128:192], split / 2)
    assert not moved("single_blocks.1.linear1", "bias")[:128].any()
    close(moved("double_blocks.1.txt_attn.norm.key_norm", "scale"), norm / 2)
    close(moved("double_blocks.0.img_attn.proj", "bias"), bias / 2)
    assert type(flux.img_in) is type(before.img_in) and not moved("img_in", "weight").any()
    shard = loading.load_transformer(checkpoint, mx.float32, shard=Shard(1, 2))
    held = shard.double_blocks[0].img_attn.proj.sum_bias
    lora.apply_adapters(shard, [(path, 0.5)], fuse)
    close(np.array(innermost(shard.double_blocks[0].img_attn.proj).sum_bias - held), bias / 2)
    fuse_checkpoint(checkpoint, tmp_path / "fused", [(path, 0.5)])
    flux = loading.load_transformer(hub.resolve(str(tmp_path / "fused")), mx.float32)
    close(moved("double_blocks.0.img_attn.qkv", "bias"), fused / 2)
    close(moved("double_blocks.1.txt_attn.norm.key_norm", "scale"), norm / 2)
    close(moved("double_blocks.0.img_attn.proj", "bias"), bias / 2)


@pytest.mark.parametrize("kind", ["lora", "lokr_half", "loha_large", "difference", "dora"])
def test_a_fused_folder_holds_the_changed_weights(checkpoint, file_of, tmp_path, kind):
    path, expected = file_of(kind)
    fuse_checkpoint(checkpoint, tmp_path / "fused", [(path, STRENGTH)])
    again = hub.resolve(str(tmp_path / "fused"))
    for name, after in expected.items():
        before = original(checkpoint, name)
        np.testing.assert_allclose(
            original(again, name), before + STRENGTH * (after - before), atol=2e-6, err_msg=name
        )


@pytest.mark.parametrize("kind", ["lokr_half", "loha_large", "difference", "dora", "dora_lokr"])
def test_activations_keep_the_dtype_of_the_weights(checkpoint, file_of, kind):
    path, _ = file_of(kind)
    flux = loading.load_transformer(checkpoint, mx.bfloat16)
    lora.apply_adapters(flux, [(path, STRENGTH)])
    for name in (*WHOLE, *(name for name, _ in PARTS.values())):
        module = module_at(flux, name)
        inputs = innermost(module).weight.shape[1]
        assert module(mx.ones((1, 3, inputs), mx.bfloat16)).dtype == mx.bfloat16


def test_an_adapter_that_an_engine_refuses_leaves_its_model_where_it_is(checkpoint, tmp_path):
    """An engine reads headers before anything leaves memory: the next request finds it warm."""
    rng = np.random.default_rng(0)
    wan = "diffusion_model.blocks.0.self_attn.q"
    arrays = {
        f"{wan}.lora_A.weight": normal(rng, 4, 64),
        f"{wan}.lora_B.weight": normal(rng, 64, 4),
    }
    path = write(tmp_path / "wan.safetensors", arrays)
    store, good = ModelStore(), ModelVariant(checkpoint.name, "float32")
    flow = store.open(good).flow
    for adapter in (AdapterRef(str(path)), AdapterRef(str(tmp_path / "none.safetensors"))):
        with pytest.raises((AdapterError, ModelNotFoundError)):
            store.open(replace(good, adapters=(adapter,)))
    assert store.open(good).flow is flow
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(AdapterError, match="truncated"):  # no `WeightsError`, of which hosts die
        store.open(replace(good, adapters=(AdapterRef(str(path)),)))


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("kind", ["lora", "lokr_full", "lokr_half", "dora"])
def test_a_family_whose_names_are_told_takes_adapters_as_well(tmp_path, kind, fuse):
    """FLUX.2: ai-toolkit's LoKr on fused matrices, parts of them, the swapped halves."""
    config = Flux2Config(
        in_channels=16, out_channels=16, context_in_dim=64, hidden_size=64, num_heads=2, depth=1,
        depth_single_blocks=1, axes_dim=(8, 8, 8, 8),
    )  # fmt: skip
    flux = Flux2(config)
    rng = np.random.default_rng(6)
    arrays, expected = {}, {}
    for key, name, spans in (
        ("diffusion_model.double_blocks.0.img_attn.qkv", "double_blocks.0.img_attn.qkv", None),
        ("diffusion_model.single_blocks.0.linear1", "single_blocks.0.linear1", None),
        (
            "lycoris_transformer_blocks_0_attn_add_k_proj",
            "double_blocks.0.txt_attn.qkv",
            [(64, 128)],
        ),
        ("transformer.norm_out.linear", "final_layer.adaLN_modulation.1", [(64, 128), (0, 64)]),
    ):
        weight = weight_by_use(module_at(flux, name))
        rows = np.arange(len(weight))
        if spans is not None:
            rows = np.concatenate([np.arange(*span) for span in spans])
        stored, after = KINDS[kind](rng, weight[rows])
        weight[rows] = after
        expected[name] = weight
        arrays |= {f"{key}.{end}": array for end, array in stored.items()}
    path = write(tmp_path / "a.safetensors", arrays)
    opened = lora.open_adapters([(path, 1.0)], AdapterTargets(components(config)))
    lora.apply_to(flux, "transformer", opened, mx.float32, fuse)
    for name, weight in expected.items():
        actual = weight_by_use(module_at(flux, name))
        np.testing.assert_allclose(actual, weight, atol=2e-6, err_msg=name)
