"""CUDA kernels for the autoencoder: group norm, and the sum that ends a residual block.

Beside `cuda_transformer.py`, which has the transformer's, says what all of them are for, and builds
them. A picture's channels are few and its places many: a block of threads takes several places,
whole.
"""

from __future__ import annotations

import math

import mlx.core as mx

from fluxmesh.kernels import cuda_transformer
from fluxmesh.kernels.cuda_transformer import PACK

THREADS = 256  # of a block
ROWS = 128  # places whose statistics one block takes: few enough that a cache holds them

# x + y + offset, a number for each channel.
OFFSET_SUM = """
  const long i = (static_cast<long>(blockIdx.x) * THREADS + threadIdx.x) * 8;
  if (i >= size[0]) return;
  float value[8], more[8], up[8];
  load(x + i, value);
  load(y + i, more);
  load(offset + i % C, up);
  #pragma unroll
  for (int j = 0; j < 8; ++j) value[j] += more[j] + up[j];
  store(sums + i, value);
"""

# Statistics of a chunk of ROWS places for each group of channels: mean, and sum of squares from it.
# Threads keep eight channels each; what they have summed meets in shared memory, in one order.
GROUP_STATS = """
  constexpr int PACKS = C / 8, LINES = THREADS / PACKS, WIDTH = C / GROUPS;
  __shared__ float parts[LINES][C];
  __shared__ float means[GROUPS];
  const int places = x_shape[1];
  const int start = blockIdx.x * ROWS, stop = min(start + ROWS, places);
  const int pack = threadIdx.x % PACKS, line = threadIdx.x / PACKS;
  const T* mine = x + static_cast<long>(blockIdx.y) * places * C + pack * 8;
  float sums[8], up[8];
  load(offset + pack * 8, up);
  for (int pass = 0; pass < 2; ++pass) {
    float mean[8];
    #pragma unroll
    for (int j = 0; j < 8; ++j) {
      sums[j] = 0.0f;
      mean[j] = pass ? means[(pack * 8 + j) / WIDTH] : 0.0f;
    }
    #pragma unroll 4
    for (int row = start + line; row < stop; row += LINES) {
      float value[8];
      load(mine + static_cast<long>(row) * C, value);
      #pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float away = value[j] + up[j] - mean[j];
        sums[j] += pass ? away * away : away;
      }
    }
    #pragma unroll
    for (int j = 0; j < 8; ++j) parts[line][pack * 8 + j] = sums[j];
    __syncthreads();
    for (int group = threadIdx.x; group < GROUPS; group += THREADS) {
      float sum = 0.0f;
      for (int i = 0; i < LINES; ++i)
        for (int c = 0; c < WIDTH; ++c) sum += parts[i][group * WIDTH + c];
      if (pass == 0) sum /= (stop - start) * WIDTH;
      if (pass == 0) means[group] = sum;
      const long chunk = static_cast<long>(blockIdx.y) * gridDim.x + blockIdx.x;
      stats[(chunk * GROUPS + group) * 2 + pass] = sum;
    }
    __syncthreads();
  }
"""

# The chunks' statistics of one group of one picture, joined (Chan et al. 1979), and what they make
# of the norm: a factor and an offset for each channel.
GROUP_JOIN = """
  constexpr int WIDTH = C / GROUPS;
  const int group = blockIdx.x, chunks = stats_shape[1], all = places[0];
  const float* mine = stats + (static_cast<long>(blockIdx.y) * chunks * GROUPS + group) * 2;
  float sum = 0.0f;
  for (int i = threadIdx.x; i < chunks; i += THREADS)
    sum += mine[i * GROUPS * 2] * min(ROWS, all - i * ROWS);
  const float mean = block_sum<THREADS>(sum) / all;
  sum = 0.0f;
  for (int i = threadIdx.x; i < chunks; i += THREADS) {
    const float away = mine[i * GROUPS * 2] - mean;
    sum += mine[i * GROUPS * 2 + 1] + away * away * (min(ROWS, all - i * ROWS) * WIDTH);
  }
  const float inverse = rsqrtf(block_sum<THREADS>(sum) / (static_cast<float>(all) * WIDTH) + eps);
  for (int c = group * WIDTH + threadIdx.x; c < (group + 1) * WIDTH; c += THREADS) {
    const float by = static_cast<float>(weight[c]) * inverse;
    affine[blockIdx.y * 2 * C + c] = by;
    affine[blockIdx.y * 2 * C + C + c] =
        static_cast<float>(bias[c]) - (mean - static_cast<float>(offset[c])) * by;
  }
"""

GROUP_APPLY = """
  const long pack = static_cast<long>(blockIdx.x) * THREADS + threadIdx.x;
  if (pack >= static_cast<long>(x_shape[1]) * (C / 8)) return;
  const int first = pack % (C / 8) * 8;
  const long at = static_cast<long>(blockIdx.y) * x_shape[1] * C + pack * 8;
  float value[8], by[8], up[8];
  load(x + at, value);
  load(affine + blockIdx.y * 2 * C + first, by);
  load(affine + blockIdx.y * 2 * C + C + first, up);
  #pragma unroll
  for (int j = 0; j < 8; ++j) {
    value[j] = value[j] * by[j] + up[j];
    if (SILU) value[j] /= 1.0f + __expf(-value[j]);
  }
  store(normed + at, value);
"""


def offset_sum(x: mx.array, y: mx.array, offset: mx.array) -> mx.array:
    """As `fused.offset_sum`."""
    blocks = -(-x.size // PACK // THREADS)
    (sums,) = cuda_transformer.kernel_of(
        "offset_sum", ("x", "y", "offset", "size"), ("sums",), OFFSET_SUM
    )(
        inputs=[x, y, offset, mx.array([x.size], dtype=mx.int64)],
        template=[("T", x.dtype), ("C", x.shape[-1]), ("THREADS", THREADS)],
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
        grid=(blocks * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
    )
    return sums


def group_norm(
    x: mx.array,
    weight: mx.array,
    bias: mx.array,
    offset: mx.array,
    *,
    groups: int,
    silu: bool,
    eps: float,
) -> mx.array:
    """As `fused.plain_group_norm`, in three passes: statistics, their sum, the norm itself."""
    B, *sides, C = x.shape
    places = math.prod(sides)
    flat = x.reshape(B, places, C)
    rows = ROWS if places >= 512 * ROWS else ROWS // 4
    chunks = -(-places // rows)
    block = {"threadgroup": (THREADS, 1, 1)}
    common = [("C", C), ("GROUPS", groups), ("ROWS", rows), ("THREADS", THREADS)]
    (stats,) = cuda_transformer.kernel_of("group_stats", ("x", "offset"), ("stats",), GROUP_STATS)(
        inputs=[flat, offset],
        template=[("T", x.dtype), *common],
        output_shapes=[(B, chunks, groups, 2)],
        output_dtypes=[mx.float32],
        grid=(chunks * THREADS, B, 1),
        **block,
    )
    names = ("stats", "weight", "bias", "offset", "places")
    join = f"constexpr float eps = {eps}f;" + GROUP_JOIN
    (affine,) = cuda_transformer.kernel_of("group_join", names, ("affine",), join)(
        inputs=[stats, weight, bias, offset, mx.array([places], dtype=mx.int32)],
        template=common,
        output_shapes=[(B, 2, C)],
        output_dtypes=[mx.float32],
        grid=(groups * THREADS, B, 1),
        **block,
    )
    blocks = -(-places * C // PACK // THREADS)
    (normed,) = cuda_transformer.kernel_of(
        "group_apply", ("x", "affine"), ("normed",), GROUP_APPLY
    )(
        inputs=[flat, affine],
        template=[("T", x.dtype), ("C", C), ("THREADS", THREADS), ("SILU", silu)],
        output_shapes=[flat.shape],
        output_dtypes=[x.dtype],
        grid=(blocks * THREADS, B, 1),
        **block,
    )
    return normed.reshape(x.shape)


def suits_groups(channels: int) -> bool:
    """Whether a block of threads shares rows of so many channels evenly."""
    return channels % PACK == 0 and THREADS % (channels // PACK) == 0
