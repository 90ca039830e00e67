"""CUDA kernels on a CPU: their source, compiled as C++, with a fiber for each thread of a block.

`Emulated` stands in the place of what `mx.fast.cuda_kernel` gives. Fibers run in turn from one
point at which threads meet (`__syncthreads`, a shuffle) to the next, so that all arrive at one
before any leaves it. What it can't show is what a GPU alone does: rounding of `__expf`,
`__fdividef` and `rsqrtf`, bfloat16, races.
"""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

TYPES = {mx.float32: "float", mx.int32: "int", mx.int64: "long", mx.uint32: "unsigned"}

RUNTIME = """
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <ucontext.h>
#include <vector>

#define __device__
#define __shared__ static
using std::min;
#define __expf expf
#define __fdividef(a, b) ((a) / (b))
static inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

struct Three { int x, y, z; };
static Three threadIdx, blockIdx, gridDim;

static ucontext_t scheduler, fibers[1024];
static bool ended[1024];
static float slots[1024];
static int now;
static std::function<void()> body;

static void meet() {
  const Three mine = threadIdx;
  swapcontext(&fibers[now], &scheduler);
  threadIdx = mine;
}
static void __syncthreads() { meet(); }
static float __shfl_xor_sync(unsigned mask, float value, int away) {
  const int me = threadIdx.x, other = me ^ away;
  if (!(mask >> (other % 32) & 1)) std::abort();
  slots[me] = value;
  meet();
  const float found = slots[other];
  meet();
  return found;
}

static void fiber() {
  body();
  ended[now] = true;
  swapcontext(&fibers[now], &scheduler);
}

static void launch(int bx, int by, int threads) {
  constexpr int STACK = 1 << 16;
  static std::vector<char> stacks(1024 * STACK);
  gridDim = {bx, by, 1};
  for (int y = 0; y < by; ++y) for (int x = 0; x < bx; ++x) {
    for (int t = 0; t < threads; ++t) {
      getcontext(&fibers[t]);
      fibers[t].uc_stack.ss_sp = &stacks[t * STACK];
      fibers[t].uc_stack.ss_size = STACK;
      fibers[t].uc_link = nullptr;
      ended[t] = false;
      makecontext(&fibers[t], fiber, 0);
    }
    for (int left = threads; left > 0;) {
      left = 0;
      for (now = 0; now < threads; ++now) {
        if (ended[now]) continue;
        threadIdx = {now, 0, 0};
        blockIdx = {x, y, 0};
        swapcontext(&scheduler, &fibers[now]);
        left += !ended[now];
      }
    }
  }
}
"""


class Emulated:
    """A kernel. Arguments as those of `mx.fast.cuda_kernel` and of what it gives."""

    def __init__(
        self, folder: Path, header: str, source: str, inputs: list[str], outputs: list[str]
    ) -> None:
        """Libraries are built in `folder`."""
        self.folder, self.header, self.source = folder, header, source
        self.inputs, self.outputs = inputs, outputs

    def __call__(
        self,
        *,
        inputs: list[mx.array],
        template: list[tuple[str, Any]],
        output_shapes: list[tuple[int, ...]],
        output_dtypes: list[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
    ) -> list[mx.array]:
        function = self._built(template, [x.dtype for x in inputs], output_dtypes)
        read = [np.ascontiguousarray(np.array(x)) for x in inputs]
        written = [
            np.full(shape, np.nan, np.float32) for shape in output_shapes
        ]  # what nobody writes is not taken for a result
        shapes = [np.array(x.shape, np.int32) for x in (*read, *written)]
        pointers = [x.ctypes.data_as(ctypes.c_void_p) for x in (*read, *written, *shapes)]
        assert grid[0] % threadgroup[0] == 0 and grid[2] == threadgroup[1] == threadgroup[2] == 1
        function(*pointers, grid[0] // threadgroup[0], grid[1], threadgroup[0])
        return [mx.array(x) for x in written]

    def _built(self, template: Any, types: list[mx.Dtype], outputs: list[mx.Dtype]) -> Any:
        lines = [
            f"using {name} = {TYPES[value]};"
            if isinstance(value, mx.Dtype)
            else f"constexpr int {name} = {int(value)};"
            for name, value in template
        ]
        names = [*self.inputs, *self.outputs]
        takes = [f"const {TYPES[t]}* {n}" for t, n in zip(types, self.inputs, strict=True)]
        takes += [f"{TYPES[t]}* {n}" for t, n in zip(outputs, self.outputs, strict=True)]
        shapes = [f"{name}_shape" for name in names]
        takes += [f"const int* {name}" for name in shapes]
        given = [*names, *shapes]
        code = "\n".join(
            [
                RUNTIME,
                self.header,
                *lines,
                f"static void kernel({', '.join(takes)}) {{{self.source}}}",
                f'extern "C" void run({", ".join(takes)}, int bx, int by, int threads) {{',
                f"  body = [=] {{ kernel({', '.join(given)}); }};",
                "  launch(bx, by, threads);",
                "}",
            ]
        )
        stem = self.folder / hashlib.sha256(code.encode()).hexdigest()[:16]
        library = stem.with_suffix(".so")
        if not library.exists():
            stem.with_suffix(".cpp").write_text(code)
            command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-o", str(library)]
            subprocess.run([*command, str(stem.with_suffix(".cpp"))], check=True)
        return ctypes.CDLL(str(library)).run
