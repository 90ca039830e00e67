"""fp8 against PyTorch's own dtypes, ggml's blocks against the `gguf` package that writes them."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch

from fluxmesh.storage import gguf as gguf_header
from fluxmesh.storage.numbers import float8, ggml_blocks
from fluxmesh.storage.numbers.tensor_source import read_float32
from fluxmesh.storage.tensor_files import read_header

TORCH = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
VALUES = np.random.default_rng(3).standard_normal((64, 512), dtype=np.float32)


@pytest.mark.parametrize("dtype", TORCH)
def test_every_byte_is_pytorchs_number(dtype):
    codes = torch.arange(256, dtype=torch.uint8)
    theirs = codes.view(TORCH[dtype]).to(torch.float32).numpy()
    np.testing.assert_array_equal(float8.table(dtype), theirs)
    for code in range(256):
        is_told = float8.holds_no_number(np.array([0, code], np.uint8), dtype)
        assert is_told == (not np.isfinite(theirs[code]))


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("shape", [(), (64,), (64, 1)])
def test_a_file_that_pytorch_wrote_is_read_as_pytorch_reads_it(tmp_path, dtype, shape):
    weight = torch.from_numpy(VALUES * 40).to(TORCH[dtype])
    scale = torch.rand(shape) * 0.1
    path = tmp_path / "x.safetensors"
    tensors = {"x.weight": weight, "x.weight_scale": scale, "alpha": torch.tensor(16)}
    safetensors.torch.save_file(tensors, path)
    wide = scale.reshape(-1, 1) if shape else scale
    exact = (weight.to(torch.float32) * wide).numpy()
    np.testing.assert_array_equal(read_float32(read_header(path), "x.weight"), exact)
    assert read_float32(read_header(path), "alpha") == 16


def test_ggmls_types_have_the_sizes_that_the_package_knows():
    for kind in gguf.GGMLQuantizationType:
        size = gguf_header.BLOCKS[kind.name]
        assert (size.numbers, size.nbytes) == gguf.GGML_QUANT_SIZES[kind], kind.name


@pytest.mark.parametrize("form", ggml_blocks.LAYOUTS)
def test_blocks_of_any_bits_are_the_packages_numbers(form):
    layout = ggml_blocks.LAYOUTS[form]
    rng = np.random.default_rng(5)
    raw = rng.integers(0, 256, 500 * layout.itemsize).astype(np.uint8)
    for scale in {"d", "m", "dmin"} & set(layout.names or ()):
        raw.view(layout)[scale] = rng.standard_normal(500).astype(np.float16)
    blocks = raw.reshape(500, layout.itemsize)
    theirs = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[form]).reshape(-1)
    np.testing.assert_array_equal(ggml_blocks.to_float32(raw, form), theirs)


@pytest.mark.parametrize("form", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_a_file_that_the_package_wrote_is_read(tmp_path, form):
    path = tmp_path / "x.gguf"
    kind = gguf.GGMLQuantizationType[form]
    writer = gguf.GGUFWriter(str(path), "flux")
    writer.add_quantization_version(2)
    writer.add_token_list(["a", "b"])
    data = gguf.quants.quantize(VALUES, kind)
    writer.add_tensor("double_blocks.0.img_attn.qkv.weight", data, raw_dtype=kind)
    writer.add_tensor("double_blocks.0.img_attn.qkv.bias", VALUES[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(path)
    assert header.metadata["general.architecture"] == "flux"
    exact = gguf.quants.dequantize(data, kind)
    read = read_float32(header, "double_blocks.0.img_attn.qkv.weight")
    np.testing.assert_array_equal(read, exact)
    np.testing.assert_array_equal(
        read_float32(header, "double_blocks.0.img_attn.qkv.bias"), VALUES[0]
    )
