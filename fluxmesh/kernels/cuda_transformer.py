"""CUDA kernels for what stands between the transformer's matrix products.

Each is one pass over memory in the place of several: MLX's own operations write every intermediate
out, and in bfloat16 round it. Here a value is read once, computed in float32 and rounded once.
`ops.py` chooses between these and the plain forms, which say what each one computes and which
the tests compare them with; nothing else calls this module, but `cuda_group_norm.py` builds the
autoencoder's kernels with it.

MLX compiles a kernel when it first runs and keeps it. Inputs of which a kernel is not sure that
they are contiguous MLX copies first (`ensure_row_contiguous`).
"""

from __future__ import annotations

import functools
from typing import Any

import mlx.core as mx

PACK = 8  # numbers that a thread reads and writes at once: 16 bytes of bfloat16
THREADS = 128  # of a block, at most

HEADER = """
template <typename T> struct alignas(8 * sizeof(T)) Pack { T at[8]; };

template <typename T> __device__ inline void load(const T* from, float (&to)[8]) {
  const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(from);
  #pragma unroll
  for (int j = 0; j < 8; ++j) to[j] = static_cast<float>(pack.at[j]);
}

template <typename T> __device__ inline void store(T* to, const float (&from)[8]) {
  Pack<T> pack;
  #pragma unroll
  for (int j = 0; j < 8; ++j) pack.at[j] = static_cast<T>(from[j]);
  *reinterpret_cast<Pack<T>*>(to) = pack;
}

// The tanh form: 0.5 v (1 + tanh(u)) = v / (1 + exp(-2u)), u = sqrt(2 / pi) (v + 0.044715 v^3).
__device__ inline float gelu(float v) {
  return __fdividef(v, 1.0f + __expf(-1.5957691216057308f * (v + 0.044715f * v * v * v)));
}

__device__ inline float silu(float v) { return __fdividef(v, 1.0f + __expf(-v)); }

// The sum over a block of THREADS threads, in every thread.
template <int THREADS> __device__ inline float block_sum(float value) {
  __shared__ float parts[THREADS / 32];
  #pragma unroll
  for (int away = 16; away > 0; away /= 2) value += __shfl_xor_sync(0xffffffffu, value, away);
  if (THREADS == 32) return value;
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0.0f;
  #pragma unroll
  for (int i = 0; i < THREADS / 32; ++i) value += parts[i];
  return value;
}
"""

# One block of threads a token. The row stays in registers between the passes of the norm.
NORM = """
  constexpr int ROUNDS = (D / 8 + THREADS - 1) / THREADS;
  const long row = blockIdx.x;
  const long image = row / x_shape[1];
  const T* my_shift = shift + (shift_shape[0] == 1 ? 0 : image * D);
  const T* my_scale = scale + (scale_shape[0] == 1 ? 0 : image * D);
  float values[ROUNDS][8];
  float sum = 0.0f;
  #pragma unroll
  for (int r = 0; r < ROUNDS; ++r) {
    const int i = (r * THREADS + threadIdx.x) * 8;
    if (i < D) {
      load(x + row * D + i, values[r]);
      @add
      #pragma unroll
      for (int j = 0; j < 8; ++j) sum += values[r][j];
    }
  }
  const float mean = block_sum<THREADS>(sum) / D;
  sum = 0.0f;
  #pragma unroll
  for (int r = 0; r < ROUNDS; ++r) {
    if ((r * THREADS + threadIdx.x) * 8 < D) {
      #pragma unroll
      for (int j = 0; j < 8; ++j) {
        values[r][j] -= mean;
        sum += values[r][j] * values[r][j];
      }
    }
  }
  const float inverse = rsqrtf(block_sum<THREADS>(sum) / D + eps);
  #pragma unroll
  for (int r = 0; r < ROUNDS; ++r) {
    const int i = (r * THREADS + threadIdx.x) * 8;
    if (i < D) {
      float up[8], by[8];
      load(my_shift + i, up);
      load(my_scale + i, by);
      #pragma unroll
      for (int j = 0; j < 8; ++j) values[r][j] = values[r][j] * inverse * (1.0f + by[j]) + up[j];
      store(normed + row * D + i, values[r]);
    }
  }
"""

# What a branch has computed is gated and added first; the norm is of the sum as it is stored.
ADD = """
      float more[8], by[8];
      load(y + row * D + i, more);
      load(gate + (gate_shape[0] == 1 ? 0 : image * D) + i, by);
      #pragma unroll
      for (int j = 0; j < 8; ++j)
        values[r][j] = static_cast<float>(static_cast<T>(values[r][j] + by[j] * more[j]));
      store(sums + row * D + i, values[r]);
"""

GATED_SUM = """
  const int i = (blockIdx.y * THREADS + threadIdx.x) * 8;
  if (i >= D) return;
  const long row = blockIdx.x;
  const long image = row / x_shape[1];
  float value[8], more[8], by[8];
  load(x + row * D + i, value);
  load(y + row * D + i, more);
  load(gate + (gate_shape[0] == 1 ? 0 : image * D) + i, by);
  #pragma unroll
  for (int j = 0; j < 8; ++j) value[j] += by[j] * more[j];
  store(sums + row * D + i, value);
"""

# LANES neighbouring threads take one head of one token: eight channels each. GROUPS of HEADS heads
# lie side by side in a row of the input; the first NORMED of them are normed and turned, the
# others are copied. Rows come from `x`, and after its last token from `x2`, where there is one.
TURN = """
  constexpr int LANES = HEAD / 8;
  const int lane = blockIdx.y * THREADS + threadIdx.x;
  const int head = lane / LANES, first = lane % LANES * 8;
  if (head >= GROUPS * HEADS) return;
  const int group = head / HEADS;
  const int tokens = pe_shape[1];
  const long row = blockIdx.x;
  const long image = blockIdx.x / tokens;
  const int token = blockIdx.x % tokens;
  @rows
  float value[8];
  load(from + head * HEAD + first, value);
  if (group < NORMED) {
    float sum = 0.0f;
    #pragma unroll
    for (int j = 0; j < 8; ++j) sum += value[j] * value[j];
    // All lanes of a head are in one warp, and in the same branch.
    const unsigned lanes = LANES == 32 ? 0xffffffffu
        : ((1u << LANES) - 1u) << (threadIdx.x % 32 / LANES * LANES);
    #pragma unroll
    for (int away = LANES / 2; away > 0; away /= 2) sum += __shfl_xor_sync(lanes, sum, away);
    const float inverse = rsqrtf(sum / HEAD + eps);
    float by[8], turn[8];
    load((group ? key_scale : query_scale) + first, by);
    load(pe + ((pe_shape[0] == 1 ? 0 : image) * tokens + token) * HEAD + first, turn);
    #pragma unroll
    for (int j = 0; j < 8; ++j) value[j] *= inverse * by[j];
    #pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const float a = value[j], b = value[j + 1];
      value[j] = a * turn[j] - b * turn[j + 1];
      value[j + 1] = b * turn[j] + a * turn[j + 1];
    }
  }
  store(turned + (row * GROUPS * HEADS + head) * HEAD + first, value);
"""
ONE_STREAM = """
  const T* from = x + row * x_shape[2];
  const T *query_scale = scale0, *key_scale = scale1;
"""
TWO_STREAMS = """
  const int texts = x_shape[1];
  const T* from = token < texts ? x + (image * texts + token) * x_shape[2]
      : x2 + (image * x2_shape[1] + token - texts) * x2_shape[2];
  const T* query_scale = token < texts ? scale0 : scale2;
  const T* key_scale = token < texts ? scale1 : scale3;
"""

# An activation: WIDTH columns of a row, of which a thread has eight, from those at `from` on.
GELU = """
    load(from, value);
    #pragma unroll
    for (int j = 0; j < 8; ++j) value[j] = gelu(value[j]);
"""
SWIGLU = """
    float up[8];
    load(from, value);
    load(from + WIDTH, up);
    #pragma unroll
    for (int j = 0; j < 8; ++j) value[j] = silu(value[j]) * up[j];
"""

ALONE = """
  const int i = (blockIdx.y * THREADS + threadIdx.x) * 8;
  if (i >= WIDTH) return;
  const long row = blockIdx.x;
  const T* from = x + row * COLUMNS + i;
  float value[8];
  @activation
  store(out + row * WIDTH + i, value);
"""

# Rows of `attn`, and beside them the activation of the columns of `x` from START on.
BESIDE = """
  const int i = (blockIdx.y * THREADS + threadIdx.x) * 8;
  const int D = attn_shape[2];
  if (i >= D + WIDTH) return;
  const long row = blockIdx.x;
  float value[8];
  if (i < D) {
    load(attn + row * D + i, value);
  } else {
    const T* from = x + row * x_shape[2] + START + i - D;
    @activation
  }
  store(joined + row * (D + WIDTH) + i, value);
"""


@functools.cache
def kernel_of(
    name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], source: str, header: str = ""
) -> Any:
    """The kernel, built once: calls as `mx.fast.cuda_kernel` describes. `header` is its own."""
    return mx.fast.cuda_kernel(
        name=f"fluxmesh_{name}",
        input_names=list(inputs),
        output_names=list(outputs),
        source=source,
        header=HEADER + header,
    )


def _blocks(
    rows: int, width: int, *, whole: bool
) -> tuple[list[tuple[str, Any]], dict[str, tuple[int, int, int]]]:
    """Template arguments and grid: rows along x, packs of a row along its threads and along y.

    With `whole`, one block of threads takes a row, as a norm needs; it loops.
    """
    packs = width // PACK
    threads = min(THREADS, -(-packs // 32) * 32)
    blocks = 1 if whole else -(-packs // threads)
    grid = {"grid": (rows * threads, blocks, 1), "threadgroup": (threads, 1, 1)}
    return [("THREADS", threads)], grid


def modulated_norm(x: mx.array, shift: mx.array, scale: mx.array, eps: float) -> mx.array:
    """As `fused.modulated_norm`."""
    source = f"constexpr float eps = {eps}f;" + NORM.replace("@add", "")
    kernel = kernel_of("modulated_norm", ("x", "shift", "scale"), ("normed",), source)
    B, S, D = x.shape
    threads, grid = _blocks(B * S, D, whole=True)
    (normed,) = kernel(
        inputs=[x, shift, scale],
        template=[("T", x.dtype), ("D", D), *threads],
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
        **grid,
    )
    return normed


def gated_norm(
    x: mx.array, gate: mx.array, y: mx.array, shift: mx.array, scale: mx.array, eps: float
) -> tuple[mx.array, mx.array]:
    """As `fused.gated_norm`."""
    source = f"constexpr float eps = {eps}f;" + NORM.replace("@add", ADD)
    names = ("x", "gate", "y", "shift", "scale")
    kernel = kernel_of("gated_norm", names, ("sums", "normed"), source)
    B, S, D = x.shape
    threads, grid = _blocks(B * S, D, whole=True)
    sums, normed = kernel(
        inputs=[x, gate, y, shift, scale],
        template=[("T", x.dtype), ("D", D), *threads],
        output_shapes=[x.shape] * 2,
        output_dtypes=[x.dtype] * 2,
        **grid,
    )
    return sums, normed


def gated_sum(x: mx.array, gate: mx.array, y: mx.array) -> mx.array:
    """As `fused.gated_sum`."""
    kernel = kernel_of("gated_sum", ("x", "gate", "y"), ("sums",), GATED_SUM)
    B, S, D = x.shape
    threads, grid = _blocks(B * S, D, whole=False)
    (sums,) = kernel(
        inputs=[x, gate, y],
        template=[("T", x.dtype), ("D", D), *threads],
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
        **grid,
    )
    return sums


def turned(
    pe: mx.array, *arrays: mx.array, heads: int, groups: int, normed: int, eps: float
) -> mx.array:
    """As `fused.plain_turned`, for one or two streams, and one or two groups to be normed."""
    each = 1 + normed
    x, *more = arrays[::each]
    B, hd = x.shape[0], arrays[1].shape[0]
    S = sum(stream.shape[1] for stream in arrays[::each])
    scales = []
    for i in range(0, len(arrays), each):
        scales += [arrays[i + 1], arrays[i + normed]]  # the same where one group is normed
    rows = TWO_STREAMS if more else ONE_STREAM
    names = ["pe", "x", "scale0", "scale1", *(["x2", "scale2", "scale3"] if more else [])]
    inputs = [pe.reshape(-1, S, hd), x, *scales[:2], *more, *scales[2:]]
    source = f"constexpr float eps = {eps}f;" + TURN.replace("@rows", rows)
    name = "turned_two" if more else "turned_one"
    kernel = kernel_of(name, tuple(names), ("turned",), source)
    threads, grid = _blocks(B * S, groups * heads * hd, whole=False)
    (out,) = kernel(
        inputs=inputs,
        template=[
            ("T", x.dtype),
            ("HEAD", hd),
            ("HEADS", heads),
            ("GROUPS", groups),
            ("NORMED", normed),
            *threads,
        ],
        output_shapes=[(B, S, groups, heads, hd)],
        output_dtypes=[x.dtype],
        **grid,
    )
    return out


def gelu(x: mx.array) -> mx.array:
    """As `fused.gelu`."""
    return _alone("gelu", GELU, x, x.shape[-1])


def swiglu(x: mx.array) -> mx.array:
    """As `fused.swiglu`."""
    return _alone("swiglu", SWIGLU, x, x.shape[-1] // 2)


def gelu_beside(attn: mx.array, x: mx.array, start: int) -> mx.array:
    """As `fused.gelu_beside`."""
    return _beside("gelu_beside", GELU, attn, x, start, x.shape[-1] - start)


def swiglu_beside(attn: mx.array, x: mx.array, start: int) -> mx.array:
    """As `fused.swiglu_beside`."""
    return _beside("swiglu_beside", SWIGLU, attn, x, start, (x.shape[-1] - start) // 2)


def _alone(name: str, activation: str, x: mx.array, width: int) -> mx.array:
    """An activation that gives rows of `width` columns."""
    columns = x.shape[-1]
    threads, grid = _blocks(x.size // columns, width, whole=False)
    source = ALONE.replace("@activation", activation)
    (out,) = kernel_of(name, ("x",), ("out",), source)(
        inputs=[x],
        template=[("T", x.dtype), ("COLUMNS", columns), ("WIDTH", width), *threads],
        output_shapes=[(*x.shape[:-1], width)],
        output_dtypes=[x.dtype],
        **grid,
    )
    return out


def _beside(
    name: str, activation: str, attn: mx.array, x: mx.array, start: int, width: int
) -> mx.array:
    """attn, and beside it `width` columns: an activation of those of x from `start` on."""
    B, S, D = attn.shape
    threads, grid = _blocks(B * S, D + width, whole=False)
    source = BESIDE.replace("@activation", activation)
    (joined,) = kernel_of(name, ("attn", "x"), ("joined",), source)(
        inputs=[attn, x],
        template=[("T", attn.dtype), ("START", start), ("WIDTH", width), *threads],
        output_shapes=[(B, S, D + width)],
        output_dtypes=[attn.dtype],
        **grid,
    )
    return joined


def suits(*widths: int) -> bool:
    """Whether rows of these widths are whole packs."""
    return all(width % PACK == 0 for width in widths)


def suits_heads(head_dim: int) -> bool:
    """Whether a head is 1, 2, 4, 8, 16 or 32 packs: what neighbouring threads can share."""
    return head_dim % PACK == 0 and head_dim // PACK in (1, 2, 4, 8, 16, 32)
