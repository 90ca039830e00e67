"""Quantized linears whose matrix is unpacked first where that is faster, and the same values.

A CPU stands for the GPU: only which road is taken depends on the device.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from fluxmesh.adapters.changes import LowRank
from fluxmesh.adapters.lora_on_linear import beside
from fluxmesh.engine.pipeline import FluxPipeline
from fluxmesh.kernels import packed_linear
from fluxmesh.kernels.packed_linear import MANY_ROWS, PackedLinear
from fluxmesh.models.partition import Cut
from fluxmesh.models.registry import runtime_of
from fluxmesh.models.slicing import cut_linear
from fluxmesh.training.compute.custom_gradients import frozen
from fluxmesh.weights import hub, loading
from tests.checkpoints import make_checkpoint
from tests.flux2_checkpoint import make_flux2

INPUTS, OUTPUTS = 128, 24


def drawn(*shape: int, seed: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def packed(bits: int, bias: bool = True, dtype: mx.Dtype = mx.float32) -> PackedLinear:
    linear = nn.Linear(INPUTS, OUTPUTS, bias)
    linear.weight = drawn(OUTPUTS, INPUTS, seed=8, dtype=dtype)
    if bias:
        linear.bias = drawn(OUTPUTS, seed=9, dtype=dtype)
    made = PackedLinear.from_linear(linear, 64, bits)
    assert type(made) is PackedLinear
    return made


@pytest.fixture
def unpackings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of matrices that are unpacked from here on."""
    shapes: list[tuple[int, ...]] = []
    dequantize = mx.dequantize

    def watched(*arguments: Any) -> mx.array:
        shapes.append(dequantize(*arguments).shape)
        return dequantize(*arguments)

    monkeypatch.setattr(mx, "dequantize", watched)
    return shapes


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_linear, "device", lambda: "cuda")


def apart(actual: mx.array, expected: mx.array) -> float:
    actual, expected = (np.array(x.astype(mx.float32)) for x in (actual, expected))
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 5, 6, 8])
def test_many_rows_give_what_few_at_a_time_do(bits, bias, on_cuda, unpackings):
    linear, x = packed(bits, bias), drawn(2, MANY_ROWS // 2, INPUTS, seed=1)
    few = mx.concatenate([linear(x[:1]), linear(x[1:])])
    assert not unpackings
    many = linear(x)
    assert unpackings == [(OUTPUTS, INPUTS)]
    assert many.shape == few.shape and apart(many, few) < 1e-6


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_rounds_no_more_than_the_quantized_product(dtype, on_cuda):
    linear, x = packed(4, dtype=dtype), drawn(MANY_ROWS, INPUTS, seed=1, dtype=dtype)
    wide = packed(4, dtype=dtype)
    wide.set_dtype(mx.float32)
    exact = nn.QuantizedLinear.__call__(wide, x.astype(mx.float32))
    many = linear(x)
    assert many.dtype == dtype
    assert apart(many, exact) < 1.5 * apart(nn.QuantizedLinear.__call__(linear, x), exact)


@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", mx.float32), ("metal", mx.float32), ("metal", mx.bfloat16)]
)
def test_other_devices_multiply_as_they_did(device, dtype, monkeypatch, unpackings):
    monkeypatch.setattr(packed_linear, "device", lambda: device)
    linear, x = packed(4, dtype=dtype), drawn(4 * MANY_ROWS, INPUTS, seed=1, dtype=dtype)
    assert mx.array_equal(linear(x), nn.QuantizedLinear.__call__(linear, x))
    assert not unpackings


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_a_cpu_unpacks_for_any_number_of_rows_in_half_precision(dtype, rows, unpackings):
    linear, x = packed(4, dtype=dtype), drawn(rows, INPUTS, seed=1, dtype=dtype)
    wide = packed(4, dtype=dtype)
    wide.set_dtype(mx.float32)
    exact = nn.QuantizedLinear.__call__(wide, x.astype(mx.float32))
    assert apart(linear(x), exact) < 1.5 * apart(nn.QuantizedLinear.__call__(linear, x), exact)
    assert unpackings == [(OUTPUTS, INPUTS)]


@pytest.mark.parametrize("scales", [mx.float32, mx.bfloat16])
def test_a_cpu_multiplies_packed_where_one_side_has_32_bits(scales, unpackings):
    rows = mx.bfloat16 if scales == mx.float32 else mx.float32
    linear, x = packed(4, dtype=scales), drawn(7, INPUTS, seed=1, dtype=rows)
    assert linear(x).dtype == mx.float32
    assert not unpackings


@pytest.mark.parametrize("axis", [0, 1])
def test_a_part_of_a_linear_unpacks_its_own_matrix(axis, on_cuda, unpackings):
    spans, length = (((4, 12),), OUTPUTS) if axis == 0 else (((64, 128),), INPUTS)
    linear, x = packed(4), drawn(MANY_ROWS, INPUTS, seed=1)
    low = LowRank(np.ones((3, INPUTS), np.float32), np.ones((OUTPUTS, 3), np.float32), 0.5)
    adapted = beside(linear, low, mx.float32)
    part = cut_linear(adapted, Cut(axis, spans, length))
    x = x if axis == 0 else x[:, 64:]
    expected = part(x[: MANY_ROWS // 2])
    assert not unpackings
    assert apart(part(x)[: MANY_ROWS // 2], expected) < 1e-6
    assert unpackings == [(8, INPUTS) if axis == 0 else (OUTPUTS, 64)]


@pytest.mark.parametrize("call", ["linear", "frozen"])
def test_a_gradient_unpacks_again_and_is_that_of_the_quantized_product(call, on_cuda, unpackings):
    linear, x = packed(4), drawn(MANY_ROWS, INPUTS, seed=1)
    above = drawn(MANY_ROWS, OUTPUTS, seed=2)
    function = linear if call == "linear" else frozen(linear)
    _, (actual,) = mx.vjp(lambda x: [function(x)], [x], [above])
    assert len(unpackings) == 2  # one of them was not kept from the way there
    _, (expected,) = mx.vjp(lambda x: [nn.QuantizedLinear.__call__(linear, x)], [x], [above])
    assert apart(actual, expected) < 1e-6


# In a model


@pytest.fixture(scope="module", params=["FLUX.1", "FLUX.2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("models")
    if request.param == "FLUX.1":
        return str(make_checkpoint(place / "made", guidance=True).path)
    return str(make_flux2(place / "made"))


def kinds(model: nn.Module) -> set[type]:
    """Of its quantized linears."""
    return {type(m) for m in model.modules() if isinstance(m, nn.QuantizedLinear)}


def test_a_transformer_and_a_text_encoder_are_loaded_with_these(folder):
    checkpoint = hub.resolve(folder)
    assert kinds(loading.load_transformer(checkpoint, bits=8)) == {PackedLinear}
    text = runtime_of(checkpoint.architecture).text_models[-1]
    assert kinds(loading.load_text_encoder(checkpoint, text, bits=8)) == {PackedLinear}


def test_a_step_computes_the_same_either_way(folder, on_cuda, monkeypatch, unpackings):
    pipeline = FluxPipeline(folder, dtype="float32", bits=8)

    def latents() -> mx.array:
        *_, last = pipeline.generate_latents("a cat", num_steps=1, latent_size=(8, 8), seed=1)
        return last

    expected = latents()
    assert not unpackings
    monkeypatch.setattr(packed_linear, "MANY_ROWS", 2)  # a modulation has one row
    assert apart(latents(), expected) < 1e-5
    shape = pipeline.checkpoint.architecture.shape
    assert len(unpackings) >= 4 * shape.blocks
