"""Shards without a ring: their parts make the whole, from memory and from files."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from fluxmesh.errors import UsageError
from fluxmesh.models.collectives import Ranks
from fluxmesh.models.flux1.config import FluxConfig
from fluxmesh.models.flux1.parallel import SequenceFlux, TensorFlux
from fluxmesh.models.flux1.partition import cuts, partition
from fluxmesh.models.flux1.transformer import Flux
from fluxmesh.models.module_tree import module_at
from fluxmesh.models.partition import Shard
from fluxmesh.models.slicing import shard_of
from fluxmesh.weights import hub
from fluxmesh.weights.loading import load_transformer
from fluxmesh.weights.quantize import quantize_checkpoint
from tests.allocation import allocated, without_cache
from tests.checkpoints import make_checkpoint
from tests.flux1_adapters import Adapter, LowRank, apply_adapters, write_adapter
from tests.parallel import flux2_cases
from tests.parallel.cases import (
    LARGE,
    ON_DISK,
    ParallelCase,
    flow_of,
    noise_of,
    plan_of,
    quantizable,
)
from tests.parallel.flux2_cases import Flux2Case
from tests.parallel.worker import held
from tests.shards import copied_shard, used


def parameters(flux: Flux) -> dict[str, mx.array]:
    return dict(tree_flatten(flux.parameters()))


def assert_same(flux: Flux, other: Flux) -> None:
    mine, theirs = parameters(flux), parameters(other)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert mine[name].dtype == theirs[name].dtype, name
        assert mx.array_equal(mine[name], theirs[name]), name


@pytest.mark.parametrize("size", [2, 3, 4, 12])
def test_the_parts_of_each_linear_are_the_whole_and_none_overlaps(size):
    every = [cuts(ON_DISK, Shard(rank, size)) for rank in range(size)]
    for name, cut in every[0].items():
        places = np.concatenate([part[name].indices for part in every])
        assert sorted(places) == list(range(cut.length)), name


@pytest.mark.parametrize("layout", ["diffusers", "bfl", "quantized", "quantized on the way"])
@pytest.mark.parametrize("size", [2, 4])
def test_a_shard_from_files_is_the_shard_of_the_whole(tmp_path, layout, size):
    bits = 4 if layout == "quantized on the way" else None
    made = make_checkpoint(
        tmp_path / "model",
        seed=1,
        transformer=dataclasses.replace(LARGE, axes_dim=(4, 14, 14)),
        layout="bfl" if layout == "bfl" else "diffusers",
        guidance=True,
    )
    checkpoint = hub.resolve(str(made.path))
    if layout == "quantized":
        quantize_checkpoint(checkpoint, tmp_path / "small", bits=3)
        checkpoint = hub.resolve(str(tmp_path / "small"))
    whole = load_transformer(checkpoint, bits=bits)
    for rank in range(size):
        shard = Shard(rank, size)
        part = load_transformer(checkpoint, bits=bits, shard=shard)
        assert_same(part, copied_shard(whole, shard))


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("size", [2, 4])
def test_loading_a_shard_never_holds_more_than_it_and_one_tensor(tmp_path, size, bits):
    made = make_checkpoint(tmp_path, transformer=LARGE)
    checkpoint = hub.resolve(str(made.path))
    whole = load_transformer(checkpoint, mx.float32, bits)
    all_of_it = held(whole)
    del whole
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    with without_cache():
        part = load_transformer(checkpoint, mx.float32, bits, shard=Shard(1, size))
    peak, now = mx.get_peak_memory() - before, mx.get_active_memory() - before
    arrays = parameters(part)
    assert held(part) <= (1 / size + 0.01) * all_of_it
    assert now <= 1.02 * allocated(arrays.values())
    largest = 7 * LARGE.hidden_size**2 * 4  # a single block's matrix in, float32
    assert peak <= 1.1 * (now + largest)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("bits", [None, 4])
def test_an_adapter_on_a_shard_is_the_shard_of_the_adapted(tmp_path, fuse, bits):
    made = make_checkpoint(tmp_path / "model", transformer=LARGE)
    checkpoint = hub.resolve(str(made.path))
    rng = np.random.default_rng(0)
    adapter: Adapter = {}
    whole = load_transformer(checkpoint, mx.float32)
    for name in cuts(LARGE, Shard(0, 2)):
        out, inputs = parameters(whole)[f"{name}.weight"].shape
        if "mod" in name:
            continue
        a, b = rng.standard_normal((4, inputs)), rng.standard_normal((out, 4))
        adapter[name] = LowRank(a.astype(np.float32), b.astype(np.float32), 0.5)
    path = tmp_path / "adapter.safetensors"
    write_adapter(path, adapter, whole.config, "diffusers")
    whole = load_transformer(checkpoint, mx.float32, bits)
    apply_adapters(whole, [(path, 0.7)], fuse)
    for rank in range(2):
        part = load_transformer(checkpoint, mx.float32, bits, shard=Shard(rank, 2))
        apply_adapters(part, [(path, 0.7)], fuse)
        mine, theirs = parameters(part), parameters(copied_shard(whole, Shard(rank, 2)))
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert mx.allclose(
                mine[name].astype(mx.float32), theirs[name].astype(mx.float32), atol=1e-6
            ), name


def test_shapes_that_do_not_divide_are_refused_with_what_would_do():
    full = FluxConfig()
    assert [n for n in range(1, 9) if partition(full).obstacle(n) is None] == [1, 2, 3, 4, 6, 8]
    assert [n for n in range(1, 9) if partition(full).obstacle(n, quantized=True) is None] == [
        *(1, 2, 3, 4, 6, 8)
    ]
    with pytest.raises(UsageError, match=r"24 heads don't divide by 5; use 1, 2, 3, 4, 6, 8, 12"):
        shard_of(Flux(full), Shard(0, 5))  # lazy: nothing of the 12 B is computed


def test_quantization_groups_that_do_not_divide_are_refused(tmp_path):
    narrow = dataclasses.replace(quantizable(2), num_heads=8, axes_dim=(4, 6, 6))
    flux = flow_of(ParallelCase("narrow", "one", narrow, bits=4))
    shard_of(flux, Shard(0, 2))
    with pytest.raises(UsageError, match="are 32, not whole quantization groups of 64"):
        shard_of(flux, Shard(0, 4))
    checkpoint = hub.resolve(str(make_checkpoint(tmp_path).path))
    with pytest.raises(UsageError, match="whole quantization groups"):
        load_transformer(checkpoint, bits=4, shard=Shard(0, 2))


def test_a_group_of_one_computes_the_same_bytes_by_the_same_code():
    case = ParallelCase("odd", "one")
    flux = flow_of(case)
    plan = plan_of(case, flux)
    x = mx.concatenate([noise_of(case, 0), noise_of(case, 1)])
    txt = mx.repeat(plan.text, 2, axis=0)
    expected = flux(x, txt, plan.pe, plan.modulations.at(0))
    for kind in (TensorFlux, SequenceFlux):
        ranks = Ranks(mx.distributed.init())
        flow = kind(flux, ranks)
        plan = plan_of(case, flow)
        actual = flow(x, txt, plan.pe, plan.modulations.at(0))
        if kind is TensorFlux:
            assert mx.array_equal(actual, expected)
        assert mx.linalg.norm(actual - expected) <= 1e-6 * mx.linalg.norm(expected)
        assert ranks.traffic.bytes == 0
    again = flux(x, txt, plan.pe, plan.modulations.at(0))
    assert mx.array_equal(again, expected)  # the model itself stays as it was


def test_what_a_spread_model_held_is_free_once_it_is_dropped():
    flux = flow_of(ParallelCase("odd", "one"))
    mx.eval(flux.parameters())
    flow = TensorFlux(shard_of(flux, Shard()), Ranks(mx.distributed.init()))
    weight = weakref.ref(flow.flux)
    del flow
    assert weight() is None  # at once, without a search for cycles


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("family", ["flux1", "flux2"])
def test_a_shard_of_a_model_in_memory_holds_nothing_twice(family, bits):
    if family == "flux1":
        whole: Any = flow_of(ParallelCase("groups", "one", quantizable(4), bits=bits))
    else:
        config = flux2_cases.quantizable(4)
        whole = flux2_cases.flux_of(Flux2Case("groups", "one", config, bits=bits))
    mx.eval(whole.parameters())
    own = sum(array.nbytes for array in parameters(whole).values())
    with without_cache():
        before = mx.get_active_memory()
        parts = [shard_of(whole, Shard(rank, 4)) for rank in range(4)]
        assert mx.get_active_memory() - before < 0.05 * own  # biases of spans
    for rank, part in enumerate(parts):
        copied = copied_shard(whole, Shard(rank, 4))
        assert used(part).keys() == parameters(copied).keys()
        for name in whole.partition.modules:
            module = module_at(copied, name)
            packed = "scales" in module
            columns = module.scales.shape[1] * module.group_size if packed else 0
            x = mx.random.normal((3, columns or module.weight.shape[1]))
            assert mx.allclose(module_at(part, name)(x), module(x), atol=1e-5), name


def test_a_shard_is_refused_where_it_does_not_belong():
    ranks = Ranks(mx.distributed.init())  # rank 0 of 1
    part = shard_of(flow_of(ParallelCase("odd", "one")), Shard(1, 2))
    with pytest.raises(UsageError, match="Part 1 of 2 .* where rank 0 of 1 runs"):
        TensorFlux(part, ranks)
    with pytest.raises(UsageError, match="needs all weights on every host"):
        SequenceFlux(part, ranks)
