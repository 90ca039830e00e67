"""The source of every CUDA kernel, emulated (`tests/emulation.py`), beside its plain form."""

from __future__ import annotations

import shutil
import sys

import mlx.core as mx
import pytest

from fluxmesh.kernels import cuda_transformer, ops
from tests import fusing
from tests.emulation import Emulated

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None, reason="builds with g++ on Linux"
)
SHAPES = (fusing.Shape(2, 11, 4, 3, 16), fusing.Shape(1, 5, 2, 9, 128))  # 6 and 144 packs a row
TRANSFORMERS = [name for name in fusing.NAMES if name not in fusing.AUTOENCODERS]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def emulated(monkeypatch, libraries):
    """`ops.py` behaves as on a CUDA GPU; names of the kernels that ran."""
    ran = []

    def kernel(name, inputs, outputs, source, header=""):
        ran.append(name)
        header = cuda_transformer.HEADER + header
        return Emulated(libraries, header, source, list(inputs), list(outputs))

    monkeypatch.setattr(cuda_transformer, "kernel_of", kernel)
    monkeypatch.setattr(ops, "device", lambda: "cuda")
    monkeypatch.setattr(ops, "compiled", lambda function: function)
    ops._chosen.cache_clear()
    yield ran
    ops._chosen.cache_clear()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", fusing.NAMES)
def test_a_kernel_computes_what_the_plain_form_does(name, shape, emulated):
    case = fusing.make(name, shape, mx.float32)
    wanted = fusing.values_and_gradients(case.plain, case)
    assert not emulated
    assert fusing.worst(fusing.values_and_gradients(case.fused, case), wanted) < 3e-6
    assert emulated


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_float16_runs_the_plain_forms(name, emulated):
    case = fusing.make(name, SHAPES[0], mx.float16)
    actual = fusing.values_and_gradients(case.fused, case)
    assert fusing.worst(actual, fusing.values_and_gradients(case.plain, case)) == 0
    assert not emulated


@pytest.mark.parametrize(("places", "channels"), [(700, 64), (33, 256), (5, 2048)])
def test_groups_are_normed_over_several_chunks(places, channels, emulated):
    keys = iter(mx.random.split(mx.random.key(2), 4))
    x = 3 * mx.random.normal((2, places, channels), key=next(keys)) + 20
    weights = [mx.random.normal((channels,), key=next(keys)) for _ in range(3)]
    normed = ops.group_norm(x, *weights, groups=32, silu=True)
    wanted = ops.plain_group_norm(x, *weights, groups=32, silu=True)
    assert mx.abs(normed - wanted).max().item() < 2e-5
    assert emulated == ["group_stats", "group_join", "group_apply"]


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_a_matrix_is_unpacked_to_the_same_numbers(bits, group, emulated):
    matrix = mx.random.normal((37, 3 * 128), key=mx.random.key(bits))  # 3.5 blocks' numbers
    packed = mx.quantize(matrix, group_size=group, bits=bits)
    wanted = mx.dequantize(*packed, group, bits)
    assert mx.abs(ops.unpacked(*packed, group, bits) - wanted).max().item() < 1e-6
    assert emulated == ["unpacked"]
