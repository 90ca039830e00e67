"""What holds for the models by themselves: dtypes, names, sizes, modulation that may leave.

That they compute what they should is held by tests/parity, against other implementations.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from fluxmesh.errors import UsageError, WeightsError
from fluxmesh.models import double_stream, layers
from fluxmesh.models.autoencoder import convolutional
from fluxmesh.models.flux1 import clip, positions, t5
from fluxmesh.models.flux1 import layers as flux1_layers
from fluxmesh.models.flux1.autoencoder import AutoEncoder
from fluxmesh.models.flux1.clip import ClipTextModel
from fluxmesh.models.flux1.config import AutoencoderConfig, ClipConfig, FluxConfig, T5Config
from fluxmesh.models.flux1.t5 import T5Encoder
from fluxmesh.models.flux1.transformer import Flux

FLUX = FluxConfig(
    in_channels=16,
    out_channels=16,
    vec_in_dim=12,
    context_in_dim=20,
    hidden_size=32,
    num_heads=2,
    depth=2,
    depth_single_blocks=2,
    axes_dim=(4, 6, 6),
    guidance_embed=True,
)
T5 = T5Config(vocab_size=20, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=3)
CLIP = ClipConfig(
    vocab_size=20,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=8,
    eos_token_id=19,
)
AE = AutoencoderConfig(widths=(8, 16), num_res_blocks=1, z_channels=4, norm_groups=4)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, set[mx.Dtype]]]:
    """The dtypes that each kind of block returned while the test ran."""
    dtypes: dict[str, set[mx.Dtype]] = {}
    for module in (layers, double_stream, flux1_layers, t5, clip, convolutional):
        for name, kind in vars(module).items():
            if isinstance(kind, type) and issubclass(kind, nn.Module) and "__call__" in vars(kind):
                monkeypatch.setattr(kind, "__call__", recording(kind.__call__, name, dtypes))
    yield dtypes


def recording(call, name: str, dtypes: dict[str, set[mx.Dtype]]):
    def wrapped(*args, **kwargs):
        result = call(*args, **kwargs)
        arrays = (
            [value for _, value in tree_flatten(list(result))]
            if isinstance(result, tuple)
            else [result]
        )
        dtypes.setdefault(name, set()).update(array.dtype for array in arrays)
        return result

    return wrapped


def flux_step(flux: Flux, steps: int = 1) -> mx.array:
    """One denoising step on float32 latents and features, as the pipeline does it."""
    pe = flux.rope(positions.text_positions(5), positions.image_positions(2, 3))
    assert pe.dtype == mx.float32
    times = mx.array(np.linspace(1, 0.3, steps, dtype=np.float32))
    modulations = flux.modulations(times, mx.ones((1, 12)), guidance=4.0)
    return flux(mx.ones((1, 6, 16)), mx.ones((1, 5, 20)), pe, modulations.at(steps - 1))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
def test_every_block_returns_the_dtype_of_the_weights(seen, dtype: mx.Dtype) -> None:
    """Inputs are float32 here: one that leaks doubles the cost of everything after it."""
    flux, t5_encoder, clip_model, ae = (
        Flux(FLUX),
        T5Encoder(T5),
        ClipTextModel(CLIP),
        AutoEncoder(AE),
    )
    for model in (flux, t5_encoder, clip_model, ae):
        model.set_dtype(dtype)
    outputs = [
        flux_step(flux),
        t5_encoder(mx.zeros((1, 4), dtype=mx.int32)),
        *clip_model(mx.zeros((1, 4), dtype=mx.int32)),
        ae.encode(mx.zeros((1, 8, 8, 3))),
        ae.decode(mx.zeros((1, 4, 4, 4))),
    ]
    assert {output.dtype for output in outputs} == {dtype}
    assert seen.keys() >= {
        "DoubleBlock", "SingleBlock", "LastLayer", "MLPEmbedder", "Modulation",
        "T5Block", "T5Attention", "T5FeedForward", "ClipLayer", "ClipAttention",
        "ClipMLP", "ResnetBlock", "AttnBlock", "Level", "Middle", "Upsample", "Downsample",
    }  # fmt: skip
    assert {name: dtypes for name, dtypes in seen.items() if dtypes != {dtype}} == {}


def test_quantized_models_keep_activations_in_bfloat16(seen) -> None:
    config = FluxConfig(**{**vars(FLUX), "hidden_size": 64, "axes_dim": (8, 12, 12)})
    flux, t5_encoder = Flux(config), T5Encoder(T5Config(**{**vars(T5), "d_model": 64}))
    for model in (flux, t5_encoder):
        model.set_dtype(mx.bfloat16)
        nn.quantize(
            model,
            group_size=32,
            bits=4,
            class_predicate=lambda _, layer: (
                isinstance(layer, nn.Linear) and layer.weight.shape[1] % 32 == 0
            ),
        )
    assert isinstance(flux.double_blocks[0].img_attn.qkv, nn.QuantizedLinear)
    assert flux_step(flux).dtype == mx.bfloat16
    assert t5_encoder(mx.zeros((1, 4), dtype=mx.int32)).dtype == mx.bfloat16
    assert all(dtypes == {mx.bfloat16} for dtypes in seen.values())


def test_time_embedding_tells_neighbouring_steps_apart() -> None:
    """In bfloat16 both arguments would round to 992."""
    a, b = layers.timestep_embedding(mx.array([0.9911, 0.9921], dtype=mx.float32))
    assert a.dtype == mx.float32
    assert float(mx.abs(a - b).max()) > 0.5


def test_parameters_are_called_as_bfl_s_files_call_them() -> None:
    config = FluxConfig(**{**vars(FLUX), "depth": 1, "depth_single_blocks": 1})
    names = {name for name, _ in tree_flatten(Flux(config).parameters())}
    linears = [
        *("img_in", "txt_in", "final_layer.linear", "final_layer.adaLN_modulation.1"),
        *(
            f"{embedder}.{layer}"
            for embedder in ("time_in", "vector_in", "guidance_in")
            for layer in ("in_layer", "out_layer")
        ),
        *(
            f"double_blocks.0.{stream}_{part}"
            for stream in ("img", "txt")
            for part in ("mod.lin", "attn.qkv", "attn.proj", "mlp.0", "mlp.2")
        ),
        *(f"single_blocks.0.{part}" for part in ("linear1", "linear2", "modulation.lin")),
    ]
    norms = ["double_blocks.0.img_attn.norm", "double_blocks.0.txt_attn.norm"]
    norms.append("single_blocks.0.norm")
    assert names == {f"{name}.{leaf}" for name in linears for leaf in ("weight", "bias")} | {
        f"{name}.{which}_norm.scale" for name in norms for which in ("query", "key")
    }


def test_released_modulation_gives_the_same_step_and_says_so_when_asked_again() -> None:
    flux = Flux(FLUX)
    pe = flux.rope(positions.text_positions(5), positions.image_positions(2, 3))
    img, txt, y = mx.ones((1, 6, 16)), mx.ones((1, 5, 20)), mx.ones((1, 12))
    modulation = flux.modulations(mx.array([0.5]), y, guidance=4.0).at(0)
    before = flux(img, txt, pe, modulation)
    mx.eval(before, modulation)
    total = sum(array.size for _, array in tree_flatten(flux.parameters()))

    flux.release_modulation()
    assert flux.modulation_released
    left = sum(array.size for _, array in tree_flatten(flux.parameters()))
    D = FLUX.hidden_size
    assert total - left == (2 * 12 + 2 * 3 + 2) * D * (D + 1)
    assert mx.array_equal(flux(img, txt, pe, modulation), before)
    with pytest.raises(RuntimeError, match="load the transformer again"):
        flux.modulations(mx.array([0.5]), y, guidance=4.0)


def test_a_distilled_model_asks_for_guidance() -> None:
    with pytest.raises(UsageError, match="`guidance`"):
        Flux(FLUX).modulations(mx.array([0.5]), mx.ones((1, 12)), guidance=None)


def test_configs_that_fit_no_model_are_refused() -> None:
    with pytest.raises(WeightsError, match="rotary axes"):
        Flux(FluxConfig(**{**vars(FLUX), "axes_dim": (4, 4, 4)}))
    with pytest.raises(WeightsError, match="hidden_act"):
        ClipTextModel(ClipConfig(**{**vars(CLIP), "hidden_act": "relu"}))


def test_more_tokens_than_clip_has_positions_are_refused() -> None:
    with pytest.raises(UsageError, match="9 CLIP tokens"):
        ClipTextModel(CLIP)(mx.zeros((1, 9), dtype=mx.int32))
