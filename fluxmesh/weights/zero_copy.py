"""An array whose own memory a function fills: bytes of a file reach the device in one copy.

MLX reads whole tensors of safetensors files, straight into the memory that the array will have:
on a Mac and on a CPU that is the array itself, with CUDA a buffer that goes to the GPU. A NumPy
array on the way would cost a second copy and a third of the speed, and on CUDA leave the weights
in managed memory. So MLX is given a file of one tensor that exists only here, and where it reads
that tensor's bytes, a function puts them, from whatever file, rows or columns. Below `loading.py`.
"""

from __future__ import annotations

import functools
import io
import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from fluxmesh.storage.safetensors import ITEM_BYTES, NUMPY

Fill = Callable[[np.ndarray], None]


def filled(shape: tuple[int, ...], dtype: str, fill: Fill) -> mx.array:
    """An evaluated array of `shape`, of the dtype that safetensors calls `dtype`.

    `fill` is given a NumPy array on the memory (bfloat16 as uint16) and must write all of it and
    not keep it; it may be called in another thread. What it raises is raised here.
    """
    file: Any = _OneTensor(shape, dtype, fill)
    own = sys.getrefcount(file.tell)
    loaded: Any = mx.load(file, format="safetensors")  # evaluated, for it is no path
    # MLX's thread lets go of the file a moment later, for which it needs the interpreter: were
    # that at its end by then, the process would abort. With CUDA it is this thread that read.
    while sys.getrefcount(file.tell) > own and not _reads_here():
        time.sleep(0)
    if file.error is not None:
        raise file.error
    return loaded[_OneTensor.KEY]


def _reads_here() -> bool:
    return mx.cuda.is_available() and mx.default_device() == mx.Device(mx.gpu)


class _OneTensor:
    """A safetensors file for MLX to read: a header, and then what `fill` writes."""

    KEY = "x"
    closed = False

    def __init__(self, shape: tuple[int, ...], dtype: str, fill: Fill) -> None:
        nbytes = math.prod(shape) * ITEM_BYTES[dtype]
        entry = {"dtype": dtype, "shape": list(shape), "data_offsets": [0, nbytes]}
        text = json.dumps({self.KEY: entry}).encode()
        self.error: BaseException | None = None
        self._head = len(text).to_bytes(8, "little") + text
        self._size = len(self._head) + nbytes
        self._at = 0
        self._shape, self._dtype, self._fill = shape, NUMPY[dtype], fill
        self.tell = functools.partial(getattr, self, "_at")  # one object, to count who holds it

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = start + offset
        return self._at

    def readinto(self, view: memoryview) -> int:
        """Never raises: what is raised under MLX's threads would end the process."""
        begin, self._at = self._at, self._at + len(view)
        if begin < len(self._head):
            view[:] = self._head[begin : self._at]
            return len(view)
        try:
            self._fill(np.frombuffer(view, dtype=self._dtype).reshape(self._shape))
        except BaseException as error:
            self.error = error
        return len(view)
