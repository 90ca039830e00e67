"""Numbers that are not read, each refused in words: other forms, broken files, NaN and infinity."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from fluxmesh.errors import WeightsError
from fluxmesh.storage import safetensors
from fluxmesh.storage.numbers import finite, ggml_blocks
from fluxmesh.storage.numbers.tensor_source import source_of
from fluxmesh.storage.tensor_files import read_header
from tests import number_files
from tests.number_files import comfy_note, to_bytes, write_gguf, write_stored
from tests.unit.numbers.stored import MATRIX, RNG, gguf_file, refused, rows, triple

# --- fp8 and ComfyUI's notes -----------------------------------------------------------------


@pytest.mark.parametrize("where", ["note", "metadata", "metadata without prefix"])
@pytest.mark.parametrize(
    ("form", "more", "words"),
    [
        ("mxfp8", {}, "ComfyUI's mxfp8"),
        ("nvfp4", {}, "ComfyUI's nvfp4"),
        ("int8_tensorwise", {"convrot": True}, "rotated (convrot) int8_tensorwise"),
        ("int8_tensorwise", {"params": {"convrot": True}}, "rotated (convrot)"),
    ],
)
def test_a_form_of_comfyui_that_needs_more_is_called_by_its_name(
    tmp_path, where, form, more, words
):
    import json

    tensors = {"model.x.weight": (to_bytes(MATRIX), "F8_E4M3")}
    metadata = {}
    if where == "note":
        tensors["model.x.comfy_quant"] = comfy_note(form, **more)
    else:
        layer = "x" if "without" in where else "model.x"
        layers = {layer: {"format": form, **more}}
        metadata["_quantization_metadata"] = json.dumps({"layers": layers})
    header = read_header(write_stored(tmp_path / "x.safetensors", tensors, metadata))
    refused(lambda: source_of(header, "model.x.weight"), words, str(tmp_path), "model.x.weight")


@pytest.mark.parametrize("shape", [(7,), (300, 7, 2), (299, 1), (0,)])
def test_scales_of_another_matrix_are_refused(tmp_path, shape):
    tensors = {
        "x.weight": (to_bytes(MATRIX), "F8_E4M3"),
        "x.weight_scale": (np.ones(shape, np.float32), "F32"),
    }
    header = read_header(write_stored(tmp_path / "x.safetensors", tensors))
    refused(lambda: source_of(header, "x.weight"), "x.weight_scale", "shape")


def test_scales_of_eight_bits_are_mxfp8s(tmp_path):
    tensors = {
        "x.weight": (to_bytes(MATRIX), "F8_E4M3"),
        "x.weight_scale": (np.ones((300, 8), np.uint8), "U8"),
    }
    header = read_header(write_stored(tmp_path / "x.safetensors", tensors))
    refused(lambda: source_of(header, "x.weight"), "mxfp8")


# --- GGUF ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["Q2_K", "IQ4_NL"])
def test_blocks_that_are_not_read_are_called_by_their_name(tmp_path, form):
    size = {"Q2_K": 84, "IQ4_NL": 18 * 8}[form]
    path = tmp_path / "x.gguf"
    blob = np.zeros(2 * size, np.uint8)
    write_gguf(path, {"x.weight": (_Shaped(blob, (2, 256)), form)})
    refused(lambda: source_of(read_header(path), "x.weight"), form, str(path), "Q4_K")


class _Shaped:
    """Bytes that a file's header gives another shape."""

    def __init__(self, blob: np.ndarray, shape: tuple[int, ...]) -> None:
        self.blob, self.shape, self.ndim = blob, shape, len(shape)
        self.size = int(np.prod(shape))

    def tobytes(self) -> bytes:
        return self.blob.tobytes()


@pytest.mark.parametrize("kept", [3, 4, 11, 24, 40, 100, -32, -600])
def test_a_gguf_file_that_is_cut_off_is_refused(tmp_path, kept):
    path = gguf_file(tmp_path)
    path.write_bytes(path.read_bytes()[:kept])
    refused(lambda: read_header(path), "again" if kept == 3 else "truncated", str(path))


@pytest.mark.parametrize(
    ("at", "value", "word"),
    [
        (4, struct.pack("<I", 1), "version 1"),
        (4, struct.pack(">I", 3), "big-endian"),
        (4, struct.pack("<I", 4), "version 4"),
        (8, struct.pack("<Q", 1 << 60), "corrupt"),
        (16, struct.pack("<Q", 1 << 60), "corrupt"),
        (24, struct.pack("<Q", 1 << 62), "corrupt"),
        (52, struct.pack("<I", 77), "corrupt"),
    ],
)
def test_a_header_of_gguf_that_says_nonsense_is_refused(tmp_path, at, value, word):
    path = gguf_file(tmp_path)
    content = bytearray(path.read_bytes())
    content[at : at + len(value)] = value
    path.write_bytes(bytes(content))
    with pytest.raises(WeightsError) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert word in str(caught.value) or "truncated" in str(caught.value)


def test_a_gguf_file_of_random_bytes_is_refused_and_nothing_else(tmp_path):
    path = gguf_file(tmp_path)
    whole = path.read_bytes()
    for trial in range(300):
        content = bytearray(whole)
        for at in RNG.integers(4, 260, 3):
            content[at] = RNG.integers(256)
        path.write_bytes(bytes(content))
        try:
            header = read_header(path)
        except WeightsError as error:
            assert "\n" not in str(error), trial
        else:
            assert all(entry.end <= len(whole) for entry in header.entries.values())


# --- MLX's form ------------------------------------------------------------------------------


def test_a_packed_matrix_of_other_columns_is_refused(tmp_path):
    header = triple(4, 64, tmp_path=tmp_path)
    refused(lambda: source_of(header, "x.weight", (4, 768)), "shape", "(4, 768)", "x.weight")


def test_a_packed_matrix_without_biases_is_refused_by_name(tmp_path):
    tensors = {
        "x.weight": (np.zeros((4, 64), np.uint32), "U32"),
        "x.scales": (np.zeros((4, 16), np.uint8), "U8"),
    }
    header = read_header(write_stored(tmp_path / "x.safetensors", tensors))
    refused(lambda: source_of(header, "x.weight"), "mxfp4", "x.scales")


# --- forms of others -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        (("x.weight", "x.weight.absmax", "x.weight.quant_state.bitsandbytes__nf4"), "nf4"),
        (("x.weight", "x.weight.quant_state.bitsandbytes__fp4"), "bitsandbytes' fp4"),
        (("x.weight", "x.SCB", "x.weight_format"), "bitsandbytes' int8"),
        (("x.qweight", "x.wscales", "x.smooth_factor"), "SVDQuant"),
        (("x.qweight", "x.qzeros", "x.scales", "x.g_idx"), "GPTQ"),
        (("x.qweight", "x.qzeros", "x.scales"), "AWQ"),
        (("x.weight_packed", "x.weight_shape", "x.weight_scale"), "compressed-tensors"),
        (("x.weight", "x.weight_scale", "x.weight_scale_2"), "NVFP4"),
        (("x.weight._data", "x.weight._scale"), "quanto"),
        (("x._weight_qdata", "x._weight_scale"), "torchao"),
        (("x.weight:qdata", "x.weight:scale"), "torchao"),
        (("x.W_q", "x.meta"), "HQQ"),
    ],
)
def test_a_foreign_form_is_called_by_its_name(tmp_path, keys, name):
    from fluxmesh.storage.numbers import foreign

    tensors = {key: (np.zeros((2, 2), np.uint8), "U8") for key in keys}
    path = write_stored(tmp_path / "x.safetensors", tensors)
    refused(lambda: foreign.refuse(read_header(path)), name, str(path), "bfloat16")


def test_what_is_read_is_no_foreign_form(tmp_path):
    from fluxmesh.storage.numbers import foreign

    scale = number_files.float8_tensors({"x.weight": MATRIX}, scale="scale_weight")[0]
    foreign.refuse(read_header(write_stored(tmp_path / "x.safetensors", scale)))
    foreign.refuse(triple(4, 64, tmp_path=tmp_path))
    foreign.refuse(read_header(gguf_file(tmp_path)))


# --- NaN and infinity ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64"])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_number_that_is_none_is_told_from_all_that_are(dtype, value):
    kinds = {"F32": np.float32, "F16": np.float16, "F64": np.float64}
    if dtype == "BF16":
        largest = np.array([0x7F7F, 0xFF7F, 0, 0x8000, 1, 0x8001], np.uint16)
        bad = np.array([np.float32(value)]).view(np.uint32) >> 16
        bad = bad.astype(np.uint16)
    else:
        info = np.finfo(kinds[dtype])
        largest = np.array([info.max, info.min, 0, -0.0, info.tiny], kinds[dtype])
        bad = np.array([value], kinds[dtype])
    assert finite.is_finite(largest, dtype)
    assert finite.is_finite(largest[:0], dtype)
    for place in range(len(largest)):
        assert not finite.is_finite(np.insert(largest, place, bad[0]), dtype)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_byte_that_is_no_number_is_found_with_and_without_scales(tmp_path, code):
    codes = to_bytes(MATRIX)
    codes[200, 7] = code
    for scale in (None, np.ones((300, 1), np.float32)):
        tensors = {"x.weight": (codes, "F8_E4M3")}
        if scale is not None:
            tensors["x.weight_scale"] = (scale, "F32")
        source = source_of(
            read_header(write_stored(tmp_path / "x.safetensors", tensors)), "x.weight"
        )
        refused(lambda source=source: rows(source, 0, 300), "x.weight", "NaN", str(tmp_path))
        rows(source, 0, 200)  # the rows before it are numbers


@pytest.mark.parametrize("scale", [np.nan, np.inf, 1e38])
def test_a_scale_that_is_no_number_or_makes_none_is_found(tmp_path, scale):
    tensors = {
        "x.weight": (to_bytes(MATRIX), "F8_E4M3"),
        "x.weight_scale": (np.float32(scale).reshape(()), "F32"),
    }
    source = source_of(read_header(write_stored(tmp_path / "x.safetensors", tensors)), "x.weight")
    refused(lambda: rows(source, 0, 300), "x.weight" if scale == 1e38 else "weight_scale", "NaN")


@pytest.mark.parametrize("form", ggml_blocks.LAYOUTS)
def test_a_blocks_scale_that_is_no_number_is_found(tmp_path, form):
    path = write_gguf(tmp_path / "x.gguf", {"x.weight": (MATRIX[:4, :256], form)})
    entry = read_header(path).entries["x.weight"]
    content = bytearray(path.read_bytes())
    layout = ggml_blocks.LAYOUTS[form]
    at = entry.begin + layout.itemsize + layout.fields["d"][1]
    content[at : at + 2] = np.float16(np.nan).tobytes()
    path.write_bytes(bytes(content))
    refused(lambda: rows(source_of(read_header(path), "x.weight"), 0, 4), "x.weight", "NaN")


def test_of_a_large_tensor_a_row_a_column_and_a_run_are_seen():
    entry = safetensors.Entry("f", "x.weight", "BF16", (4096, 4096), 0, 1 << 25)
    piece = np.zeros((512, 4096), np.uint16)  # what a thread reads at once
    finite.glance(entry, piece.reshape(-1))
    column = piece.copy()
    column[:, 77] = 0x7FC0
    refused(lambda: finite.glance(entry, column.reshape(-1)), "x.weight")
    run = piece.copy()
    run[100 : 100 + finite.ONE_IN * finite.RUN // 4096] = 0xFF80
    refused(lambda: finite.glance(entry, run.reshape(-1)), "x.weight")
    whole = np.full_like(piece, 0xFFC0)
    refused(lambda: finite.glance(entry, whole.reshape(-1)), "x.weight")
    small = safetensors.Entry("f", "x.bias", "BF16", (1 << 21,), 0, 1 << 22)
    for place in (0, 70_000, piece.size - 1):
        alone = piece.reshape(-1).copy()
        alone[place] = 0x7FC0
        refused(lambda alone=alone: finite.glance(small, alone), "x.bias")
