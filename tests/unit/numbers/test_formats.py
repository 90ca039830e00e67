"""Numbers as files store them, read by rows: fp8, GGUF's blocks, MLX's words, any width."""

from __future__ import annotations

import numpy as np
import pytest

from fluxmesh.storage import bfloat16, safetensors
from fluxmesh.storage.numbers import affine, float8, ggml_blocks, tensor_source
from fluxmesh.storage.numbers.tensor_source import read_float32, source_of
from fluxmesh.storage.tensor_files import read_header
from tests import ggml_reference, number_files
from tests.number_files import comfy_note, to_blocks, to_bytes, write_gguf, write_stored
from tests.unit.numbers.stored import MATRIX, RNG, rows, triple

FORMS = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


# --- bytes by a table ------------------------------------------------------------------------


def by_definition(code: int, exponent_bits: int, mantissa_bits: int, bias: int) -> float:
    """A finite small float's value, of its sign, exponent and mantissa."""
    mantissa = code & (1 << mantissa_bits) - 1
    exponent = code >> mantissa_bits & (1 << exponent_bits) - 1
    size = mantissa / (1 << mantissa_bits) + (1 if exponent else 0)
    return (-1 if code & 128 else 1) * size * 2.0 ** (max(exponent, 1) - bias)


def test_each_of_the_256_bytes_is_the_number_that_the_format_defines():
    for code in range(256):
        e4m3, e5m2 = (float8.table(dtype)[code] for dtype in ("F8_E4M3", "F8_E5M2"))
        if code & 127 == 127:
            assert np.isnan(e4m3)  # and no byte is infinity
        else:
            assert e4m3 == by_definition(code, 4, 3, 7)
        if code & 127 > 0x7C:
            assert np.isnan(e5m2)
        elif code & 127 == 0x7C:
            assert e5m2 == (-np.inf if code & 128 else np.inf)
        else:
            assert e5m2 == by_definition(code, 5, 2, 15)
    assert float8.table("F8_E4M3")[0x7E] == 448
    assert float8.table("F8_E5M2")[0x7B] == 57344


SCALES = {
    "scalar": lambda shape: (),
    "one": lambda shape: (1,),
    "one by one": lambda shape: (1, 1),
    "rows": lambda shape: (shape[0],),
    "rows by one": lambda shape: (shape[0], 1),
    "blocks of 128": lambda shape: (-(-shape[0] // 128), -(-shape[1] // 128)),
    "groups of a row": lambda shape: (shape[0], shape[1] // 4),
}


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("name", ["scale_weight", "weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("shape", SCALES)
def test_scaled_bytes_are_their_numbers_times_the_scale(tmp_path, dtype, name, shape):
    stored, exact = number_files.float8_tensors({"x.weight": MATRIX}, dtype, name, SCALES[shape])
    # What scales inputs is no part of the weight.
    stored["x.scale_input"] = stored["x.input_scale"] = (np.full((), 9, np.float32), "F32")
    stored["scaled_fp8"] = (np.zeros(2, np.uint8), dtype)
    header = read_header(write_stored(tmp_path / "x.safetensors", stored))
    source = source_of(header, "x.weight")
    np.testing.assert_array_equal(rows(source, 0, 300), exact["x.weight"])
    np.testing.assert_array_equal(rows(source, 130, 257), exact["x.weight"][130:257])
    expected = bfloat16.of_float32(exact["x.weight"])
    np.testing.assert_array_equal(rows(source, 0, 300, np.uint16), expected)
    halves = exact["x.weight"].astype(np.float16)
    np.testing.assert_array_equal(rows(source, 0, 300, np.float16), halves)


@pytest.mark.parametrize("columns", [1, 3, 260])
def test_plain_bytes_are_their_numbers_also_where_their_count_is_odd(tmp_path, columns):
    codes = to_bytes(MATRIX[:3, :columns])
    path = write_stored(tmp_path / "x.safetensors", {"x": (codes, "F8_E4M3")})
    for dtype in FORMS.values():
        source = source_of(read_header(path), "x")
        expected = float8.rounded(number_files.from_bytes(codes), np.dtype(dtype))
        np.testing.assert_array_equal(rows(source, 0, 3, dtype), expected)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_plain_weight_with_a_scale_beside_it_is_scaled_too(tmp_path, dtype):
    values = {"F32": MATRIX, "F16": MATRIX.astype(np.float16), "BF16": bfloat16.of_float32(MATRIX)}
    scale = (np.float32(0.5).reshape(()), "F32")
    tensors = {"x.weight": (values[dtype], dtype), "x.scale_weight": scale}
    header = read_header(write_stored(tmp_path / "x.safetensors", tensors))
    plain = source_of(
        read_header(write_stored(tmp_path / "y.safetensors", {"x.weight": tensors["x.weight"]})),
        "x.weight",
    )
    scaled = rows(source_of(header, "x.weight"), 0, 300)
    np.testing.assert_array_equal(scaled, rows(plain, 0, 300) / 2)


def test_eight_bit_whole_numbers_of_comfyui_are_scaled(tmp_path):
    codes = RNG.integers(-127, 128, (64, 32)).astype(np.int8)
    scale = RNG.uniform(0.1, 1, (64, 1)).astype(np.float32)
    tensors = {"x.weight": (codes, "I8"), "x.weight_scale": (scale, "F32")}
    tensors["x.comfy_quant"] = comfy_note("int8_tensorwise")
    header = read_header(write_stored(tmp_path / "x.safetensors", tensors))
    exact = codes.astype(np.float32) * scale
    np.testing.assert_array_equal(rows(source_of(header, "x.weight"), 0, 64), exact)


def test_a_note_of_comfyui_on_plain_fp8_is_read_past(tmp_path):
    tensors = {"x.weight": (to_bytes(MATRIX), "F8_E4M3"), "x.comfy_quant": comfy_note("x")}
    tensors["x.comfy_quant"] = comfy_note("float8_e4m3fn", full_precision_matrix_mult=True)
    tensors["x.weight_scale"] = (np.float32(2).reshape(()), "F32")
    header = read_header(write_stored(tmp_path / "x.safetensors", tensors))
    doubled = 2 * number_files.from_bytes(to_bytes(MATRIX))
    np.testing.assert_array_equal(rows(source_of(header, "x.weight"), 0, 300), doubled)


def test_no_more_than_a_chunk_is_held_in_another_form(tmp_path, monkeypatch):
    """Peak memory is the array that is filled and, in each thread, a few thousand numbers."""
    import tracemalloc

    monkeypatch.setattr(tensor_source, "CHUNK", 1 << 12)
    monkeypatch.setattr(safetensors, "PIECE", 1 << 12)
    scale = lambda shape: (shape[0], 1)  # noqa: E731
    big = np.tile(MATRIX[:, :256], (8, 4))
    stored, _ = number_files.float8_tensors({"x.weight": big}, "F8_E4M3", "weight_scale", scale)
    plain = {"x.weight": stored["x.weight"]}
    files = [
        write_stored(tmp_path / "scaled.safetensors", stored),
        write_stored(tmp_path / "plain.safetensors", plain),
        write_gguf(tmp_path / "x.gguf", {"x.weight": (big, "Q4_K")}),
    ]
    out = np.empty(big.shape, dtype=np.uint16)
    for file in files:
        source = source_of(read_header(file), "x.weight")
        source.read_into(out[:4])  # tables and threads
        peaks = []
        for _ in range(4):  # other threads of this process may add to one
            tracemalloc.start()
            source.read_into(out)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert min(peaks) < 0.3 * out.nbytes, (file.name, peaks, out.nbytes)


# --- GGUF ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ggml_blocks.LAYOUTS)
def test_blocks_are_what_ggmls_own_loops_make_of_them(tmp_path, form):
    values = RNG.standard_normal((6, 512), dtype=np.float32)
    path = write_gguf(tmp_path / "x.gguf", {"x.weight": (values, form)})
    raw = to_blocks(values, form)
    exact = ggml_reference.dequantize(raw.tobytes(), form).reshape(6, 512)
    source = source_of(read_header(path), "x.weight")
    np.testing.assert_array_equal(rows(source, 0, 6), exact)
    np.testing.assert_array_equal(rows(source, 2, 5), exact[2:5])
    assert np.abs(exact - values).max() < 0.3  # else the file would say nothing


@pytest.mark.parametrize("form", ggml_blocks.LAYOUTS)
def test_every_bit_of_a_block_counts(form):
    layout = ggml_blocks.LAYOUTS[form]
    raw = RNG.integers(0, 256, 3 * layout.itemsize).astype(np.uint8)
    for scale in {"d", "m", "dmin"} & set(layout.names):
        raw.view(layout)[scale] = RNG.standard_normal(3).astype(np.float16)
    exact = ggml_reference.dequantize(raw.tobytes(), form)
    np.testing.assert_array_equal(ggml_blocks.to_float32(raw, form), exact)


def test_rows_that_are_no_whole_blocks_are_read_by_the_note_of_their_shape(tmp_path):
    values = RNG.standard_normal((64, 60), dtype=np.float32)
    path = write_gguf(tmp_path / "x.gguf", {"x.weight": (values, "Q4_K")})
    entry = read_header(path).entries["x.weight"]
    assert entry.shape == (64, 60)
    exact = ggml_reference.dequantize(to_blocks(values, "Q4_K").tobytes(), "Q4_K").reshape(64, 60)
    source = source_of(read_header(path), "x.weight")
    for start, stop in ((0, 64), (5, 6), (13, 40), (63, 64)):
        np.testing.assert_array_equal(rows(source, start, stop), exact[start:stop])


@pytest.mark.parametrize("form", ["F32", "F16", "BF16"])
def test_plain_numbers_of_a_gguf_file_are_read_as_they_are(tmp_path, form):
    path = write_gguf(tmp_path / "x.gguf", {"x.weight": (MATRIX, form)})
    source = source_of(read_header(path), "x.weight")
    assert source.is_plain
    assert source.dtype == form
    bound = {"F32": 0, "F16": 2**-11, "BF16": 2**-7}[form]
    assert (np.abs(rows(source, 0, 300) - MATRIX) <= bound * np.abs(MATRIX) + 1e-7 * bound).all()


def test_a_tokenizer_in_the_header_is_passed_over(tmp_path):
    words = number_files.list_of_texts("tokenizer.ggml.tokens", ["▁a", "", "猫"] * 50)
    path = write_gguf(
        tmp_path / "x.gguf", {"x.weight": (MATRIX, "F32")}, "t5encoder", words, more_count=1
    )
    header = read_header(path)
    assert header.metadata["general.architecture"] == "t5encoder"
    np.testing.assert_array_equal(rows(source_of(header, "x.weight"), 0, 300), MATRIX)


# --- MLX's form ------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_a_row_of_words_is_a_stream_of_codes(bits, group):
    codes = RNG.integers(0, 1 << bits, (5, 256))
    words = np.zeros((5, 256 * bits // 32), np.uint32)
    for row in range(5):
        stream = 0
        for place, code in enumerate(codes[row]):
            stream |= int(code) << bits * place
        for k in range(words.shape[1]):
            words[row, k] = stream >> 32 * k & 0xFFFFFFFF
    scales, biases = RNG.standard_normal((2, 5, 256 // group)).astype(np.float32)
    spread = [np.repeat(part, group, axis=1) for part in (scales, biases)]
    exact = spread[0] * codes.astype(np.float32) + spread[1]
    packing = affine.Packing(bits, group)
    np.testing.assert_array_equal(affine.to_float32(words, scales, biases, packing), exact)


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_bits_and_groups_follow_from_shapes_once_the_columns_are_known(tmp_path, bits, group):
    header = triple(bits, group, tmp_path=tmp_path)
    source = source_of(header, "x.weight", (4, 512))
    assert source.packing == affine.Packing(bits, group)
    said = triple(bits, group, metadata={"quantization_level": str(bits)}, tmp_path=tmp_path)
    assert affine.shape_of(said, "x.weight") == (4, 512)
    assert affine.bits_of(said) == bits


def test_groups_of_64_are_taken_where_nothing_says_otherwise(tmp_path):
    assert affine.shape_of(triple(8, 64, tmp_path=tmp_path), "x.weight") == (4, 512)
    assert affine.shape_of(triple(4, 64, tmp_path=tmp_path), "x.weight") == (4, 512)


# --- whole numbers and wide ones -------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        ("F64", np.float64),
        ("F32", np.float32),
        ("F16", np.float16),
        ("I64", np.int64),
        ("I32", np.int32),
        ("I16", np.int16),
        ("I8", np.int8),
        ("U8", np.uint8),
        ("BOOL", np.bool_),
    ],
)
@pytest.mark.parametrize("shape", [(), (1,), (3, 2)])
def test_a_tensor_of_any_width_is_read_as_float32(tmp_path, dtype, kind, shape):
    values = RNG.integers(0, 2, shape).astype(kind) if dtype == "BOOL" else None
    if values is None:
        values = (RNG.standard_normal(shape) * 20).astype(kind)
    path = write_stored(tmp_path / "x.safetensors", {"x": (np.asarray(values), dtype)})
    read = read_float32(read_header(path), "x")
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, np.asarray(values).astype(np.float32))


def test_an_alpha_of_bfloat16_and_of_fp8_is_read(tmp_path):
    tensors = {
        "a": (bfloat16.of_float32(np.float32(16).reshape(1)).reshape(()), "BF16"),
        "b": (to_bytes(np.float32(16).reshape(1)).reshape(()), "F8_E4M3"),
    }
    header = read_header(write_stored(tmp_path / "x.safetensors", tensors))
    assert read_float32(header, "a") == 16
    assert read_float32(header, "b") == 16
    assert read_float32(header, "b").shape == ()


def test_an_adapters_matrix_in_fp8_is_read_with_its_scale(tmp_path):
    name = "lora_unet_double_blocks_0_img_attn_qkv.lora_down"
    stored, exact = number_files.float8_tensors({f"{name}.weight": MATRIX}, scale="weight_scale")
    header = read_header(write_stored(tmp_path / "x.safetensors", stored))
    np.testing.assert_array_equal(read_float32(header, f"{name}.weight"), exact[f"{name}.weight"])
