"""Files of numbers as people have them, what is read of their rows, and what a refusal must say."""

from __future__ import annotations

import numpy as np
import pytest

from fluxmesh.errors import WeightsError
from fluxmesh.storage.tensor_files import read_header
from tests.number_files import write_gguf, write_stored

RNG = np.random.default_rng(11)
MATRIX = RNG.standard_normal((300, 260), dtype=np.float32)


def rows(source, start, stop, dtype=np.float32):
    out = np.empty((stop - start, *source.shape[1:]), dtype=dtype)
    source.read_into(out, start)
    return out


def refused(call, *words):
    with pytest.raises(WeightsError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def gguf_file(tmp_path):
    return write_gguf(tmp_path / "x.gguf", {"a": (MATRIX, "F32"), "b": (MATRIX[:2, :256], "Q8_0")})


def triple(bits, group, columns=512, rows=4, metadata=None, tmp_path=None):
    tensors = {
        "x.weight": (np.zeros((rows, columns * bits // 32), np.uint32), "U32"),
        "x.scales": (np.zeros((rows, columns // group), np.float32), "F32"),
        "x.biases": (np.zeros((rows, columns // group), np.float32), "F32"),
    }
    return read_header(write_stored(tmp_path / "x.safetensors", tensors, metadata))
