"""`--dtype float16`: nothing grows beyond 65504, and nothing is less exact than in bfloat16."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from fluxmesh.cluster.snapshot import ModelVariant
from fluxmesh.engine.pipeline import FluxPipeline
from fluxmesh.engine.worker import Worker
from fluxmesh.errors import UsageError, WeightsError
from fluxmesh.kernels import ops
from fluxmesh.models import double_stream
from fluxmesh.models.flux1.autoencoder import AutoEncoder
from fluxmesh.models.flux1.config import FluxConfig
from fluxmesh.models.flux1.t5 import T5Encoder
from fluxmesh.models.flux1.transformer import Flux
from fluxmesh.models.partition import Shard
from fluxmesh.models.step_cache import StepCache
from fluxmesh.request import AdapterRef
from fluxmesh.sampling.denoise import denoise
from fluxmesh.training.request import TrainRequest
from fluxmesh.weights import hub, loading
from tests.checkpoints import AUTOENCODER, T5, make_checkpoint
from tests.flux1_adapters import LowRank, write_adapter
from tests.numerics.units import latents, painting
from tests.parallel.cases import ODD, ParallelCase, noise_of, plan_of, random_flux
from tests.shards import copied_shard

LARGEST = 65504  # of float16
GROWS = 300.0
CASE = ParallelCase("float16", "one", steps=2)
DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}


def grown(dtype: str, by: float) -> Flux:
    """A random transformer in whose branches numbers grow `by` times, and once more as they end.

    In FLUX a few channels of the text do.
    """
    flux = random_flux(CASE)  # float32
    D = flux.config.hidden_size
    for double in flux.double_blocks:
        for into, out in (double.txt_mlp[::2], double.img_mlp[::2]):
            into.weight, out.weight, out.bias = by * into.weight, by * out.weight, by * out.bias
    for single in flux.single_blocks:
        rows = single.linear1.weight
        single.linear1.weight = mx.concatenate([rows[: 3 * D], by * rows[3 * D :]])
        single.linear2.weight = by * single.linear2.weight
    flux.set_dtype(DTYPES[dtype])
    flux.make_room()
    mx.eval(flux.parameters())
    assert all(mx.isfinite(x).all().item() for _, x in tree_flatten(flux.parameters()))
    return flux


def painted(flux: Flux, cache: float = 0.0) -> np.ndarray:
    """Latents after the case's steps."""
    case = replace(CASE, cache=cache, steps=6) if cache else CASE
    stores = [StepCache(cache)] if cache else []
    *_, step = denoise(flux, plan_of(case, flux), noise_of(case), caches=stores)
    return np.array(step.x)


def error(actual: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(actual - exact) / np.linalg.norm(exact))


def largest(flux: Flux, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """The largest number among tokens, and among what branches give before their gates."""
    tokens, products = [0.0], [0.0]

    def gated_sum(x: mx.array, gate: mx.array, y: mx.array) -> mx.array:
        total = x + gate * y
        tokens.append(mx.abs(total).max().item())
        products.append(mx.abs(y).max().item())
        return total

    def gated_norm(x: mx.array, gate: mx.array, y: mx.array, *rest: mx.array) -> Any:
        total = gated_sum(x, gate, y)
        return total, ops.modulated_norm(total, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(double_stream, "gated_sum", gated_sum)
        patch.setattr(double_stream, "gated_norm", gated_norm)
        painted(flux)
    return max(tokens), max(products)


def test_tokens_and_products_beyond_float16_stay_numbers_and_exact(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exact = grown("float32", GROWS)
    tokens, products = largest(exact, monkeypatch)
    assert tokens > 4 * LARGEST and 2 * LARGEST < products < ops.HEADROOM * LARGEST
    wanted = painted(exact)
    ours, other = (error(painted(grown(name, GROWS)), wanted) for name in ("float16", "bfloat16"))
    assert ours < other / 3


@pytest.mark.parametrize("without", ["wide tokens", "room"])
def test_each_of_the_two_is_needed(without: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if without == "room":
        monkeypatch.setattr(ops, "HEADROOM", 1.0)
    else:
        monkeypatch.setattr(double_stream, "tokens_dtype", lambda dtype: dtype)
    assert not np.isfinite(painted(grown("float16", GROWS))).all()


@pytest.mark.parametrize("cache", [0.0, 0.608])
def test_an_ordinary_model_is_nearer_to_float32_than_in_bfloat16(cache: float) -> None:
    wanted = painted(grown("float32", 1.0), cache)
    ours, other = (
        error(painted(grown(name, 1.0), cache), wanted) for name in ("float16", "bfloat16")
    )
    assert ours < other / 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [None, 4])
def test_every_block_gives_tokens_and_every_linear_the_weights_dtype(
    dtype: str, bits: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    flux = random_flux(
        replace(
            CASE,
            dtype=dtype,
            config=replace(ODD, hidden_size=64, num_heads=2, axes_dim=(8, 12, 12)),
            bits=bits,
        )
    )
    linears: set[mx.Dtype] = set()
    for kind in (nn.Linear, nn.QuantizedLinear):

        def watched(module: Any, x: mx.array, call: Any = kind.__call__) -> mx.array:
            y: mx.array = call(module, x)
            linears.update((x.dtype, y.dtype))
            return y

        monkeypatch.setattr(kind, "__call__", watched)
    blocks: list[mx.Dtype] = []

    def call(block: Any, *arrays: mx.array) -> Any:
        out = block(*arrays)
        blocks.extend(x.dtype for x in (out if isinstance(out, tuple) else (out,)))
        return out

    monkeypatch.setattr(flux, "call", call)
    case = replace(CASE, config=flux.config)
    plan = plan_of(case, flux)
    velocity = flux(noise_of(case), plan.text, plan.pe, plan.modulations.at(0))
    assert set(blocks) == {mx.float32 if dtype == "float16" else DTYPES[dtype]}
    assert len(blocks) == 2 * flux.config.depth + flux.config.depth_single_blocks
    assert linears == {DTYPES[dtype]} and velocity.dtype == DTYPES[dtype]
    assert all(mod.dtype == DTYPES[dtype] for mod in plan.modulations.single)


def test_gelu_of_large_numbers_is_those_numbers() -> None:
    x = mx.array([[-6e4, -300.0, -1.0, 0.0, 1.0, 300.0, 6e4]])
    wanted = nn.gelu_approx(x) / ops.HEADROOM
    activated = ops.gelu(x.astype(mx.float16)).astype(mx.float32)
    assert mx.allclose(activated, wanted, rtol=1e-3, atol=1e-6).item()


# What stands beside the transformer


def test_what_runs_once_a_prompt_or_picture_is_what_bfloat16_has(tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path, guidance=True)
    half, other = (FluxPipeline(str(made.path), dtype=name) for name in ("float16", "bfloat16"))
    for feature, same in zip(
        half.encode("two dogs").values(), other.encode("two dogs").values(), strict=True
    ):
        assert feature.dtype == mx.bfloat16 and mx.array_equal(feature, same).item()
    x = half.noise(1, (4, 4))
    assert mx.array_equal(half.decode(x, (4, 4)), other.decode(x, (4, 4))).item()
    assert half.flow.dtype == mx.float16


def test_t5_and_the_autoencoder_would_not_survive_float16() -> None:
    """Why they stay in bfloat16: the same weights, a few times larger, overflow."""
    mx.random.seed(3)
    t5, ae = T5Encoder(T5), AutoEncoder(AUTOENCODER)
    for block in t5.encoder.block:
        block.layer[1].DenseReluDense.wo.weight *= 3e5
    ae.decoder.conv_in.weight *= 3e5
    z, tokens = mx.random.normal((1, 4, 4, AUTOENCODER.z_channels)), mx.array([[1, 2, 3]])
    for made, x in ((t5, tokens), (ae.decoder, z)):
        for dtype, fits in ((mx.bfloat16, True), (mx.float16, False)):
            made.set_dtype(dtype)
            y = made(x if made is t5 else x.astype(dtype))
            assert mx.isfinite(y).all().item() is fits
            if fits:
                made.set_dtype(mx.float32)


# Weights


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("model"), guidance=True).path)


def test_weights_are_rounded_once_and_the_biases_that_end_branches_have_room(stored: str) -> None:
    checkpoint = hub.resolve(stored)
    wide, half = (
        loading.load_transformer(checkpoint, DTYPES[name]) for name in ("float32", "float16")
    )
    rounded = dict(tree_flatten(half.parameters()))
    for name, value in tree_flatten(wide.parameters()):
        ends = name.endswith(("proj.bias", "mlp.2.bias", "linear2.bias"))
        wanted = (value / ops.HEADROOM if ends else value).astype(mx.float16)
        close = (
            mx.allclose(rounded[name], wanted, rtol=2e-3, atol=1e-7)
            if ends
            else mx.array_equal(rounded[name], wanted)
        )
        assert close.item() and rounded[name].dtype == mx.float16, name


@pytest.mark.parametrize("bits", [None, 4])
def test_a_shard_from_files_has_the_room_that_a_slice_of_the_whole_has(
    bits: int | None, tmp_path: Path
) -> None:
    wide = FluxConfig(
        in_channels=64,
        vec_in_dim=32,
        context_in_dim=32,
        hidden_size=128,
        num_heads=4,
        depth=1,
        depth_single_blocks=1,
        axes_dim=(4, 14, 14),
    )
    checkpoint = hub.resolve(str(make_checkpoint(tmp_path, transformer=wide).path))
    whole = loading.load_transformer(checkpoint, mx.float16, bits)
    for rank in range(2):
        part = loading.load_transformer(checkpoint, mx.float16, bits, shard=Shard(rank, 2))
        mine = dict(tree_flatten(part.parameters()))
        theirs = dict(tree_flatten(copied_shard(whole, Shard(rank, 2)).parameters()))
        assert mine.keys() == theirs.keys() and "single_blocks.0.linear2.sum_bias" in mine
        for name, value in theirs.items():
            assert mx.array_equal(mine[name], value).item(), name


def test_metals_compiled_forms_paint_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = painted(grown("float32", GROWS))
    monkeypatch.setattr(ops, "device", lambda: "metal")
    ops._chosen.cache_clear()
    try:
        assert error(painted(grown("float16", GROWS)), wanted) < 2e-3
    finally:
        ops._chosen.cache_clear()


def test_a_number_beyond_float16_is_refused_by_name(
    stored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = hub.resolve(stored)
    own = loading.read_rows

    def spoiled(reader: Any, name: str, *more: Any) -> mx.array:
        array = own(reader, name, *more)
        return (array * 1e7).astype(array.dtype) if name == "txt_in.weight" else array

    monkeypatch.setattr(loading, "read_rows", spoiled)
    with pytest.raises(WeightsError, match=r"txt_in.weight holds numbers .* float16; use bfloat16"):
        loading.load_transformer(checkpoint, mx.float16)
    loading.load_transformer(checkpoint, mx.bfloat16)


@pytest.fixture(scope="module")
def adapter_file(stored: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    config = hub.resolve(stored).architecture.transformer
    rng = np.random.default_rng(5)

    def low(rows: int, columns: int) -> LowRank:
        a, b = rng.standard_normal((4, columns)) / 8, rng.standard_normal((rows, 4)) / 8
        return LowRank(a.astype(np.float32), b.astype(np.float32), 0.5)

    D, M = config.hidden_size, config.mlp_hidden_dim
    adapter = {
        "double_blocks.0.img_attn.qkv": low(3 * D, D),
        "double_blocks.1.txt_mlp.2": low(D, M),
        "single_blocks.1.linear2": low(D, D + M),
    }
    path = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
    write_adapter(path, adapter, config)
    return str(path)


@pytest.mark.parametrize(
    "kind", ["plain", "quantized", "low memory", "adapted", "fused", "quantized, fused"]
)
def test_an_engine_paints_in_float16(kind: str, stored: str, adapter_file: str) -> None:
    given = ModelVariant(stored, "float32", 4 if "quantized" in kind else None)
    if kind != "plain" and ("adapted" in kind or "fused" in kind):
        given = replace(
            given, adapters=(AdapterRef(adapter_file, 0.5),), fuse_adapters="fused" in kind
        )
    exact, ours, other = (
        latents(worker, painting(worker, wanted, low_memory=kind == "low memory"))[-1]
        for worker, wanted in (
            (Worker(), replace(given, dtype=name)) for name in ("float32", "float16", "bfloat16")
        )
    )
    assert 0 < error(ours, exact) < error(other, exact)


def test_training_is_refused_with_the_reason() -> None:
    with pytest.raises(UsageError, match="float16, in which small gradients are lost; train in"):
        TrainRequest("data", 1, dtype="float16")
