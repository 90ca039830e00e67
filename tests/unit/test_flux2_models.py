"""What holds for FLUX.2's models by themselves: sizes, dtypes, layouts, what they refuse.

That they compute what they should is held by tests/parity, against other implementations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from fluxmesh.errors import UsageError, WeightsError
from fluxmesh.kernels.ops import HEADROOM, swiglu, swiglu_beside
from fluxmesh.models import layers
from fluxmesh.models.autoencoder import convolutional
from fluxmesh.models.autoencoder.convolutional import Decoder
from fluxmesh.models.autoencoder.tiling import tiles
from fluxmesh.models.flux2 import layers as flux2_layers
from fluxmesh.models.flux2 import text_encoder
from fluxmesh.models.flux2.autoencoder import Flux2AutoEncoder
from fluxmesh.models.flux2.config import (
    Flux2AutoencoderConfig,
    Flux2Config,
    Flux2Schedule,
    TextEncoderConfig,
)
from fluxmesh.models.flux2.positions import image_positions, text_positions
from fluxmesh.models.flux2.quantization import group_size
from fluxmesh.models.flux2.tensor_maps import (
    autoencoder_tensors,
    modulates,
    text_encoder_tensors,
    transformer_tensors,
)
from fluxmesh.models.flux2.text_encoder import TextEncoder, reach
from fluxmesh.models.flux2.transformer import Flux2
from fluxmesh.models.lora_linear import LoRALinear
from fluxmesh.models.module_tree import replace_module
from fluxmesh.models.step_cache import StepCache
from fluxmesh.models.tensor_map import Rows, parameter_count, to_diffusers
from fluxmesh.sampling.schedule import timesteps
from tests.flux2_models import SMALL, random_flux2, randomize

KLEIN_9B = Flux2Config(
    hidden_size=4096, num_heads=32, depth=8, depth_single_blocks=24, context_in_dim=12288
)
DEV = Flux2Config(
    hidden_size=6144,
    num_heads=48,
    depth=8,
    depth_single_blocks=48,
    context_in_dim=15360,
    guidance_embed=True,
)
TEXT = TextEncoderConfig(
    vocab_size=30,
    hidden_size=16,
    intermediate_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    states=(1, 2, 3),
)
AE = Flux2AutoencoderConfig(
    widths=(8, 16), decoder_widths=(4, 8), num_res_blocks=1, z_channels=4, norm_groups=4
)
IDS = text_positions(5), image_positions(2, 3)


def flux_step(flux: Flux2, steps: int = 1, cache: StepCache | None = None) -> mx.array:
    """One denoising step on float32 latents and features."""
    pe = flux.rope(*IDS)
    assert pe.dtype == mx.float32
    times = mx.array(np.linspace(1, 0.3, steps, dtype=np.float32))
    modulations = flux.modulations(times, guidance=4.0)
    img, txt = mx.ones((1, 6, 16)), mx.ones((1, 5, 20))
    return flux(img, txt, pe, modulations.at(steps - 1), cache)


# Sizes and layouts


@pytest.mark.parametrize(
    ("tensors", "count"),
    [
        (transformer_tensors(Flux2Config()), 3_875_544_576),
        (transformer_tensors(KLEIN_9B), 9_078_581_248),
        (transformer_tensors(DEV), 32_223_281_152),
        # published parameters, and the batch norm's statistics of 128 channels
        (autoencoder_tensors(Flux2AutoencoderConfig()), 84_046_115 + 256),
    ],
    ids=["klein 4B", "klein 9B", "dev", "autoencoder"],
)
def test_the_full_models_have_their_published_number_of_parameters(tensors, count) -> None:
    assert parameter_count(tensors) == count


@pytest.mark.parametrize("qk_norm", [True, False])
def test_every_parameter_stands_in_the_table(qk_norm: bool) -> None:
    text = replace(TEXT, qk_norm=qk_norm)
    for model, tensors in (
        (Flux2(SMALL), transformer_tensors(SMALL)),
        (Flux2(replace(SMALL, guidance_embed=False)), None),
        (TextEncoder(text), text_encoder_tensors(text)),
        (Flux2AutoEncoder(AE), autoencoder_tensors(AE)),
    ):
        if tensors is None:
            tensors = transformer_tensors(replace(SMALL, guidance_embed=False))
        held = dict(tree_flatten(model.parameters()))
        assert held.keys() == tensors.keys()
        for name, array in held.items():
            shape = array.shape
            if array.ndim == 4:
                shape = (shape[0], shape[3], *shape[1:3])
            assert shape == tensors[name].shape, name


def test_splitting_into_diffusers_tensors_and_stacking_gives_the_model_back() -> None:
    tensors = transformer_tensors(SMALL)
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(target.shape) for name, target in tensors.items()}
    files = {
        key: np.concatenate([arrays[rows.key][rows.start : rows.stop] for rows in parts])
        for key, parts in to_diffusers(tensors).items()
    }
    for name, target in tensors.items():
        parts = [files[piece.key][piece.start : piece.stop] for piece in target.pieces]
        np.testing.assert_array_equal(np.concatenate(parts), arrays[name])
    assert sum(a.size for a in files.values()) == sum(a.size for a in arrays.values())


def test_the_last_modulation_is_stored_in_the_other_order() -> None:
    width = SMALL.hidden_size
    assert transformer_tensors(SMALL)["final_layer.adaLN_modulation.1.weight"].pieces == (
        Rows("norm_out.linear.weight", width, 2 * width),
        Rows("norm_out.linear.weight", 0, width),
    )


def test_what_is_quantized_is_the_matrices_of_blocks_and_layers() -> None:
    tables = {
        "transformer": transformer_tensors(Flux2Config()),
        "text_encoder": text_encoder_tensors(TextEncoderConfig()),
        "vae": autoencoder_tensors(Flux2AutoencoderConfig()),
    }
    groups = {
        (component, name): group_size(component, name, target.shape)
        for component, tensors in tables.items()
        for name, target in tensors.items()
    }
    assert groups["transformer", "double_blocks.4.txt_mlp.2.weight"] == 64
    assert groups["transformer", "single_blocks.19.linear2.weight"] == 64
    assert groups["text_encoder", "layers.26.mlp.down_proj.weight"] == 64
    for whole in ("img_in", "txt_in", "time_in.in_layer", "single_stream_modulation.lin"):
        assert groups["transformer", f"{whole}.weight"] is None
    assert groups["text_encoder", "layers.0.self_attn.q_norm.weight"] is None
    assert {group for (component, _), group in groups.items() if component == "vae"} == {None}


def test_text_counts_on_an_axis_of_its_own_and_every_reference_begins_anew() -> None:
    assert text_positions(3).tolist() == [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 2]]
    assert image_positions(1, 2).tolist() == [[0, 0, 0, 0], [0, 0, 1, 0]]
    assert image_positions(2, 1, picture=3).tolist() == [[30, 0, 0, 0], [30, 1, 0, 0]]


# Configs


def test_a_config_s_own_numbers_are_read() -> None:
    config = Flux2Config.from_dict(
        {
            "in_channels": 16,
            "out_channels": None,
            "joint_attention_dim": 96,
            "num_attention_heads": 4,
            "attention_head_dim": 16,
            "num_layers": 2,
            "num_single_layers": 3,
            "axes_dims_rope": [4, 4, 4, 4],
            "rope_theta": 300,
            "mlp_ratio": 2.5,
        }
    )
    assert (config.out_channels, config.theta, config.mlp_hidden_dim) == (16, 300, 160)
    assert config.guidance_embed  # diffusers' default


QWEN = {
    "model_type": "qwen3",
    "vocab_size": 10,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 28,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5e5,
}


def test_text_encoders_of_both_kinds_and_of_both_versions_of_transformers_are_read() -> None:
    older = TextEncoderConfig.from_dict(QWEN)
    newer = {**QWEN, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    del newer["rope_theta"]
    assert TextEncoderConfig.from_dict(newer) == older
    assert (older.rope_theta, older.qk_norm, older.width, older.layers) == (5e5, True, 48, 27)
    text = {**QWEN, "model_type": "mistral", "num_hidden_layers": 30, "head_dim": None}
    dev = TextEncoderConfig.from_dict({"model_type": "mistral3", "text_config": text})
    assert (dev.states, dev.qk_norm, dev.head_dim) == ((10, 20, 30), False, 4)


@pytest.mark.parametrize(
    "extra", [{"attention_bias": True}, {"sliding_window": 4096}, {"hidden_act": "gelu"}]
)
def test_a_text_encoder_with_more_than_both_kinds_have_is_refused(extra: dict) -> None:
    plain = {"attention_bias": False, "sliding_window": None, "hidden_act": "silu"}
    assert TextEncoderConfig.from_dict({**QWEN, **plain}) == TextEncoderConfig.from_dict(QWEN)
    with pytest.raises(ValueError, match="attention_bias|sliding_window|gelu"):
        TextEncoderConfig.from_dict({**QWEN, **plain, **extra})


def test_the_shift_is_dynamic_unless_the_scheduler_says_otherwise() -> None:
    schedule = Flux2Schedule.from_dict({"use_dynamic_shifting": True, "shift": 3.0, "beta": 1})
    assert schedule == Flux2Schedule()
    # published: klein's four steps at 1024 x 1024, and the fall of mu above 4300 tokens
    assert timesteps(4, 4096, schedule) == pytest.approx([1, 0.967384, 0.908144, 0.7672, 0], 1e-5)
    assert schedule.mu(4300, 50) > 2.0 and schedule.mu(4301, 50) == pytest.approx(1.184697, 1e-6)
    fixed = Flux2Schedule.from_dict({"use_dynamic_shifting": False, "shift": 3})
    assert timesteps(2, 4096, fixed) == pytest.approx([1, 0.75, 0])


def test_another_language_model_or_a_shallow_one_is_refused() -> None:
    with pytest.raises(ValueError, match="gemma"):
        TextEncoderConfig.from_dict({**QWEN, "model_type": "gemma"})
    with pytest.raises(ValueError, match="26 layers, not 27"):
        TextEncoderConfig.from_dict({**QWEN, "num_hidden_layers": 26})


def test_an_autoencoder_without_quant_convolutions_is_refused() -> None:
    sizes = {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "latent_channels": 4,
    }
    config = Flux2AutoencoderConfig.from_dict({**sizes, "decoder_block_out_channels": [4, 8]})
    assert (config.widths, config.decoder.widths) == ((8, 16), (4, 8))
    assert Flux2AutoencoderConfig.from_dict(sizes).decoder_widths == (8, 16)
    with pytest.raises(ValueError, match="quant"):
        Flux2AutoencoderConfig.from_dict({**sizes, "use_quant_conv": False})


@pytest.mark.parametrize("change", [{"num_heads": 3}, {"axes_dim": (4, 4, 4)}])
def test_heads_and_axes_that_do_not_divide_are_refused(change: dict) -> None:
    with pytest.raises(WeightsError, match="rotary axes"):
        Flux2(replace(SMALL, **change))


# Dtypes


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, set[mx.Dtype]]]:
    """The dtypes that each kind of block returned while the test ran."""
    dtypes: dict[str, set[mx.Dtype]] = {}

    def recording(call, name: str):
        def wrapped(*args, **kwargs):
            result = call(*args, **kwargs)
            arrays = [value for _, value in tree_flatten(result)]
            dtypes.setdefault(name, set()).update(array.dtype for array in arrays)
            return result

        return wrapped

    for module in (layers, flux2_layers, text_encoder, convolutional):
        for name, kind in vars(module).items():
            if isinstance(kind, type) and issubclass(kind, nn.Module) and "__call__" in vars(kind):
                monkeypatch.setattr(kind, "__call__", recording(kind.__call__, name))
    yield dtypes


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
def test_every_block_returns_the_dtype_of_the_weights(seen, dtype: mx.Dtype) -> None:
    """Inputs are float32 here: one that leaks doubles the cost of everything after it."""
    flux, encoder, ae = Flux2(SMALL), TextEncoder(TEXT), Flux2AutoEncoder(AE)
    for model in (flux, encoder, ae):
        model.set_dtype(dtype)
    memory = flux.remember(
        mx.ones((1, 6, 16)), image_positions(2, 3, 1), flux.reference_modulation(4.0)
    )
    results = [
        flux_step(flux),
        *(array for kept in (*memory.double, *memory.single) for array in kept),
        encoder(mx.zeros((1, 4, 16)), np.array([False, True, True, True])),
        encoder(mx.zeros((1, 4, 16)), np.array([True, True, False, False])),
        ae.encode(mx.zeros((1, 8, 8, 3))),
        ae.decode(mx.zeros((1, 4, 4, 4))),
    ]
    assert {result.dtype for result in results} == {dtype}
    assert seen.keys() >= {
        "DoubleBlock", "SingleBlock", "GatedMLP", "LastLayer", "MLPEmbedder",
        "Modulation", "DecoderLayer", "CausalAttention", "GatedFeedForward", "ResnetBlock",
        "AttnBlock", "Level", "Middle", "Upsample", "Downsample",
    }  # fmt: skip
    assert {name: dtypes for name, dtypes in seen.items() if dtypes != {dtype}} == {}


def test_the_gate_of_the_mlp_is_the_first_half() -> None:
    x = np.random.default_rng(0).standard_normal((1, 3, 8)).astype(np.float32)
    gate, up = x[..., :4], x[..., 4:]
    expected = gate / (1 + np.exp(-gate)) * up
    np.testing.assert_allclose(np.array(swiglu(mx.array(x))), expected, rtol=1e-5)
    attn = mx.zeros((1, 3, 2))
    beside = np.array(swiglu_beside(attn, mx.array(np.concatenate([x, x], -1)), 8))
    np.testing.assert_allclose(beside[..., 2:], expected, rtol=1e-5)
    assert not beside[..., :2].any()


def test_a_gated_product_beyond_float16_stays_finite_there() -> None:
    """Products go into the linear divided by HEADROOM, which the sum of the branch undoes."""
    large = mx.array([[300.0, 600.0]], dtype=mx.float16)
    assert (300.0 * 600.0) > 65504
    assert swiglu(large).item() == pytest.approx(300 * 600 / HEADROOM, rel=1e-3)


def test_float16_gives_what_float32_gives_to_its_accuracy() -> None:
    flux = random_flux2()
    expected = np.array(flux_step(flux))
    flux.set_dtype(mx.float16)
    result = flux_step(flux)
    assert result.dtype == mx.float16
    error = np.linalg.norm(np.array(result, dtype=np.float32) - expected)
    assert error < 1e-2 * np.linalg.norm(expected)


# What blocks may hold, and what may leave


def test_modulation_weights_may_leave_once_they_have_been_used() -> None:
    flux = random_flux2()
    pe, img, txt = flux.rope(*IDS), mx.ones((1, 6, 16)), mx.ones((1, 5, 20))
    modulation = flux.modulations(mx.array([0.7]), 4.0).at(0)
    before = np.array(flux(img, txt, pe, modulation))
    flux.release_modulation()
    flux.release_modulation()  # twice does no harm
    assert np.array_equal(np.array(flux(img, txt, pe, modulation)), before)
    left = {name for name, _ in tree_flatten(flux.parameters())}
    assert left == {name for name in transformer_tensors(SMALL) if not modulates(name)}
    with pytest.raises(RuntimeError, match="released"):
        flux.modulations(mx.array([0.7]), 4.0)


def test_a_model_with_a_guidance_embedding_asks_for_a_number() -> None:
    with pytest.raises(UsageError, match="guidance"):
        Flux2(SMALL).modulations(mx.array([0.7]))


def test_blocks_run_quantized_and_with_adapters_beside_them() -> None:
    flux = random_flux2(replace(SMALL, hidden_size=64, num_heads=4))
    expected = np.array(flux_step(flux))

    def chosen(name: str, module: nn.Module) -> bool | dict:
        if not isinstance(module, nn.Linear):
            return False
        group = group_size("transformer", f"{name}.weight", module.weight.shape)
        return {"group_size": group, "bits": 8} if group else False

    nn.quantize(flux, class_predicate=chosen)
    quantized = np.array(flux_step(flux))
    assert 0 < np.linalg.norm(quantized - expected) < 0.05 * np.linalg.norm(expected)
    for name, module in list(flux.named_modules()):
        if isinstance(module, nn.QuantizedLinear):
            columns = module.weight.shape[1] * 32 // 8
            low = mx.zeros((columns, 2)), mx.ones((2, module.weight.shape[0]))
            replace_module(flux, name, LoRALinear(module, *low, 1.0))
    assert np.array_equal(np.array(flux_step(flux)), quantized)


def test_a_step_cache_skips_all_blocks_but_the_first() -> None:
    flux = random_flux2()
    cache = StepCache(threshold=1e9)
    plain = np.array(flux_step(flux, 2))
    assert np.array_equal(np.array(flux_step(flux, 2, cache)), plain) and not cache.reused
    for block in (*flux.double_blocks[1:], *flux.single_blocks):
        block.outputs = None  # calling one would fail
    np.testing.assert_allclose(np.array(flux_step(flux, 2, cache)), plain, rtol=1e-4, atol=1e-5)
    assert cache.reused


def test_remembered_references_do_not_change_from_step_to_step_but_change_the_result() -> None:
    flux = random_flux2()
    memory = flux.remember(
        mx.ones((1, 6, 16)), image_positions(2, 3, 1), flux.reference_modulation(4.0)
    )
    assert len(memory.double) == len(memory.single) == 2
    assert memory.double[0].k.shape == (1, 2, 6, 16)
    pe, img, txt = flux.rope(*IDS), mx.ones((1, 6, 16)), mx.ones((1, 5, 20))
    modulation = flux.modulations(mx.array([0.7]), 4.0).at(0)
    plain = np.array(flux(img, txt, pe, modulation))
    remembered = np.array(flux(img, txt, pe, modulation, memory=memory))
    assert plain.shape == remembered.shape and np.abs(plain - remembered).max() > 1e-3
    for blocks in ("double", "single"):  # every block reads its own
        for i, kept in enumerate(getattr(memory, blocks)):
            others = list(getattr(memory, blocks))
            others[i] = kept._replace(v=-kept.v)
            changed = memory._replace(**{blocks: others})
            result = np.array(flux(img, txt, pe, modulation, memory=changed))
            assert np.abs(result - remembered).max() > 1e-4, (blocks, i)


# The text encoder's padding


def test_padding_after_a_prompt_reads_the_prompt_and_padding_before_it_reads_nothing() -> None:
    after = reach(np.array([True, True, False]))
    assert np.array(after.mask).tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 0]]
    assert after.attends is None
    before = reach(np.array([False, True, True]))
    assert np.array(before.mask).tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert np.array(before.attends).ravel().tolist() == [False, True, True]


def test_a_prompt_s_features_do_not_depend_on_its_padding() -> None:
    encoder = TextEncoder(TEXT)
    randomize(encoder, 3)
    x = mx.random.normal((1, 6, 16))
    expected = np.array(encoder(x[:, 1:4], np.ones(3, dtype=bool)))
    for real in ([0, 1, 1, 1], [0, 1, 1, 1, 0, 0]):
        features = np.array(encoder(x[:, : len(real)], np.array(real, dtype=bool)))
        np.testing.assert_allclose(features[:, 1:4], expected, rtol=1e-4, atol=1e-5)
        assert np.isfinite(features).all()


# The autoencoder


def test_a_picture_decoded_in_tiles_that_cut_tokens_is_restored_as_a_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tile may begin at any latent, also at an odd one, where another statistic begins."""
    assert any(tile.start % 2 for tile in tiles(12, 5, 1))
    ae = Flux2AutoEncoder(AE)
    randomize(ae, 4)
    monkeypatch.setattr(
        Decoder, "__call__", lambda _, z: mx.repeat(mx.repeat(z[..., :3], 2, axis=1), 2, axis=2)
    )
    z = mx.random.normal((1, 12, 6, 4))
    whole = np.array(ae.decode_tiled(z, tile=5, overlap=1))
    monkeypatch.setattr("fluxmesh.models.autoencoder.convolutional.UNTILED_LATENTS", 5)
    tiled = np.array(ae.decode_tiled(z, tile=5, overlap=1))
    np.testing.assert_allclose(tiled, whole, rtol=1e-5, atol=1e-6)
