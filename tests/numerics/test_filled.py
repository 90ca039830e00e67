"""`filled`: an array that a function writes, and what becomes of the file that MLX is shown."""

from __future__ import annotations

import sys
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from fluxmesh.errors import WeightsError
from fluxmesh.weights import zero_copy as module
from fluxmesh.weights.zero_copy import filled


@pytest.mark.parametrize(
    ("dtype", "kept"), [("F32", mx.float32), ("F16", mx.float16), ("U32", mx.uint32)]
)
def test_the_array_holds_what_was_written(dtype: str, kept: mx.Dtype) -> None:
    def fill(out: np.ndarray) -> None:
        out[:] = np.arange(6).reshape(2, 3)

    array = filled((2, 3), dtype, fill)
    assert array.dtype == kept
    assert array.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_bfloat16_is_written_as_its_bits() -> None:
    def fill(out: np.ndarray) -> None:
        assert out.dtype == np.uint16
        out[:] = 0x3F80

    array = filled((4,), "BF16", fill)
    assert array.dtype == mx.bfloat16
    assert array.tolist() == [1.0] * 4


def test_what_the_function_raises_is_raised_here() -> None:
    def fill(out: np.ndarray) -> None:
        raise WeightsError("flux.safetensors ended in the middle of it.")

    with pytest.raises(WeightsError, match="in the middle"):
        filled((4,), "F32", fill)


def test_no_thread_of_mlx_holds_the_file_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that let go of it while the interpreter ends would abort the process."""
    shown: list[tuple[Any, int]] = []

    class Watched(module._OneTensor):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            shown.append((self, sys.getrefcount(self.tell)))

    monkeypatch.setattr(module, "_OneTensor", Watched)
    for _ in range(200):
        filled((4,), "F32", lambda out: out.fill(1))
        file, own = shown.pop()
        held = sys.getrefcount(file.tell)
        assert held == own
