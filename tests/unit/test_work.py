"""A request in numbers: those of FLUX.1 are the measured ones, those of memory are MLX's own."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from fluxmesh.cluster.snapshot import HostInfo, StepTiming
from fluxmesh.models.flux1.architecture import Flux1Architecture
from fluxmesh.models.flux1.transformer import Flux
from fluxmesh.planning.cost import decode_flops, decode_time, step_time
from fluxmesh.planning.workload import Workload, split_tokens, tensor_problem
from fluxmesh.request import SourceImage
from tests.unit.meshes import FLUX, ask, mac, small


def nbytes(model: nn.Module) -> int:
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))


def test_the_arithmetic_of_flux_is_that_which_was_measured() -> None:
    assert FLUX.architecture.step_flops(1024, 1024) == pytest.approx(74.4e12, rel=1e-3)
    assert FLUX.architecture.step_flops(512, 512) == pytest.approx(21.5e12, rel=1e-3)


def test_bytes_on_the_wire_follow_the_designs_formulas() -> None:
    flux = Workload.of(ask(), FLUX)
    activation = 4608 * 3072 * 2
    for hosts in (2, 3, 4, 8):
        share = 2 * (hosts - 1) / hosts * activation
        assert flux.sent_a_step("tensor", hosts) == pytest.approx(76 * share, rel=1e-9)
        assert flux.sent_a_step("sequence", hosts) == pytest.approx(57 * share, rel=1e-9)
    assert flux.sent_a_step("data", 4) == flux.sent_a_step("tensor", 1) == 0
    wide = Workload.of(ask(dtype="float32"), FLUX)
    assert wide.sent_a_step("tensor", 2) == 2 * flux.sent_a_step("tensor", 2)


def test_an_uneven_split_is_padded_to_the_longest_share() -> None:
    flux = Workload.of(ask(), FLUX)  # 4608 tokens over 7: 659 on the longest
    assert flux.sent_a_step("sequence", 7) == 57 * 2 * 6 * 659 * 3072 * 2


def test_memory_of_flux_is_that_of_its_12_billion_parameters() -> None:
    flux = Workload.of(ask(), FLUX)
    assert flux.transformer.on_each_of(1) == pytest.approx(23.8e9, rel=2e-3)
    assert flux.transformer.kept < 0.01 * flux.transformer.split
    assert flux.transformer.on_each_of(4) <= (0.25 + 0.01) * flux.transformer.on_each_of(1)
    assert flux.text_bytes == pytest.approx(9.77e9, rel=1e-2)
    quantized = Workload.of(ask(bits=4), FLUX)
    assert quantized.transformer.on_each_of(1) == pytest.approx(6.8e9, rel=0.02)
    assert quantized.transformer_file == flux.transformer  # it is quantized while it loads
    stored = Workload.of(ask(), replace(FLUX, bits=4))
    assert stored.transformer == quantized.transformer == stored.transformer_file


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_bytes_of_weights_are_those_that_mlx_holds(bits: int | None) -> None:
    sizes = small(heads=4, head_dim=16)
    assert isinstance(sizes.architecture, Flux1Architecture)
    model = Flux(sizes.architecture.transformer)
    model.set_dtype(mx.bfloat16)
    if bits:

        def in_a_block(path: str, module: nn.Module) -> bool:
            return isinstance(module, nn.Linear) and "_blocks." in path

        nn.quantize(model, group_size=64, bits=bits, class_predicate=in_a_block)
    assert Workload.of(ask(bits=bits), sizes).transformer.on_each_of(1) == nbytes(model)


def test_low_memory_and_preload_change_what_is_held_when() -> None:
    plain, low, loaded = (
        Workload.of(ask(**keys), FLUX).memory("data", 1, 1)
        for keys in ({}, {"low_memory": True}, {"preload": True})
    )
    assert low.decode < plain.decode
    assert 6.3e9 < plain.denoise - low.denoise < 6.6e9, "modulation is 27% of 23.8 GB"
    assert loaded.denoise > plain.denoise


def test_float16_holds_as_many_weights_as_bfloat16_and_wider_tokens() -> None:
    half, other = (Workload.of(ask(dtype=name), FLUX) for name in ("float16", "bfloat16"))
    assert half.transformer == other.transformer and half.text_bytes == other.text_bytes
    (denoise, decode), (least, same) = (work.memory("data", 1, 1) for work in (half, other))
    assert decode == same and denoise - least == 6 * 4608 * 3072 * 2
    assert half.sent_a_step("tensor", 2) == other.sent_a_step("tensor", 2)


def test_decoding_in_tiles_takes_no_more_memory_than_a_tile() -> None:
    large, larger = (
        Workload.of(ask(height=side, width=side), FLUX).memory("data", 1, 1).decode
        for side in (1536, 4096)
    )
    assert large == larger


def test_the_models_defaults_fill_in_what_the_user_left_out() -> None:
    flux = Workload.of(ask(), FLUX)
    assert (flux.height, flux.width, flux.steps, flux.tokens) == (1024, 1024, 4, 4608)
    picture = np.zeros((256, 512, 3), np.uint8)
    source = Workload.of(ask(steps=10, source=SourceImage(picture, 0.5)), FLUX)
    assert (source.height, source.width, source.steps) == (256, 512, 5)
    assert source.tokens == 512 + 16 * 32


@pytest.mark.parametrize(
    ("hosts", "problem"),
    [(2, ""), (3, ""), (4, ""), (5, "24 heads don't divide by 5"), (6, ""), (7, "24 heads")],
)
@pytest.mark.parametrize("bits", [None, 4])
def test_heads_of_flux_divide_or_are_told_not_to(
    hosts: int, problem: str, bits: int | None
) -> None:
    sentence = tensor_problem(Workload.of(ask(bits=bits), FLUX), hosts)
    assert sentence.startswith(problem) and bool(sentence) == bool(problem)


def test_quantization_groups_stay_whole() -> None:
    sizes = small(heads=12, head_dim=16)  # hidden size 192, the embedded checkpoint's
    assert tensor_problem(Workload.of(ask(), sizes), 4) == ""
    assert tensor_problem(Workload.of(ask(bits=4), sizes), 3) == ""
    assert tensor_problem(Workload.of(ask(bits=4), sizes), 4) == (
        "192 columns over 4 hosts are 48, not whole quantization groups of 64"
    )
    odd = small(heads=6, head_dim=16, mlp_ratio=3.03125)
    assert tensor_problem(Workload.of(ask(), odd), 2) == "291 MLP columns don't divide by 2"


@given(st.integers(1, 10**6), st.integers(1, 300))
def test_tokens_are_dealt_out_in_runs_of_one_length_and_the_last_lack_some(
    tokens: int, hosts: int
) -> None:
    shares = split_tokens(tokens, hosts)
    assert sum(shares) == tokens and len(shares) == hosts
    assert max(shares) == -(-tokens // hosts)  # what gathers are padded to
    full = tokens // max(shares)
    assert shares[:full] == (max(shares),) * full and not any(shares[full + 1 :])


def timed(*sizes: tuple[int, int, float], **keys: object) -> HostInfo:
    fields = {"model": "m", "dtype": "bfloat16", "bits": None, **keys}
    return mac(
        0,
        measured=tuple(
            StepTiming(height=h, width=w, step_seconds=seconds, **fields)  # type: ignore[arg-type]
            for h, w, seconds in sizes
        ),
    )


def test_a_step_takes_what_was_measured_at_its_size() -> None:
    host = timed((512, 512, 0.9), (1024, 1024, 2.5))
    step = step_time(host, Workload.of(ask(), FLUX))
    assert (step.seconds, step.figure, step.measured) == (2.5, "step", True)


def test_a_step_of_another_size_is_scaled_from_the_nearest() -> None:
    host = timed((512, 512, 0.9), (1024, 1024, 2.5))
    step = step_time(host, Workload.of(ask(height=1024, width=768), FLUX))
    ratio = FLUX.architecture.step_flops(1024, 768) / FLUX.architecture.step_flops(1024, 1024)
    assert step.seconds == pytest.approx(2.5 * ratio)
    assert (step.figure, step.measured) == ("step of another size", False)


@pytest.mark.parametrize("keys", [{"model": "other"}, {"dtype": "float32"}, {"bits": 4}])
def test_times_of_other_weights_tell_nothing(keys: dict[str, object]) -> None:
    host = timed((1024, 1024, 2.5), **keys)
    step = step_time(host, Workload.of(ask(), FLUX))
    assert step.seconds == pytest.approx(74.4e12 / 26e12, rel=1e-3)
    assert (step.figure, step.measured) == ("arithmetic", False)


def test_a_decode_is_measured_scaled_or_counted() -> None:
    assert decode_flops(FLUX.architecture, 1024, 1024) == pytest.approx(10.5e12, rel=0.01)
    flux = Workload.of(ask(), FLUX)
    assert decode_time(mac(0), flux) == pytest.approx(10.47e12 / 0.4 / 26e12, rel=1e-3)
    host = mac(
        0,
        measured=(
            StepTiming(
                model="m",
                height=512,
                width=512,
                dtype="bfloat16",
                bits=4,
                step_seconds=1.0,
                decode_seconds=0.25,
            ),
        ),
    )
    assert decode_time(host, flux) == pytest.approx(1.0)
