"""A CUDA kernel that unpacks a quantized matrix as fast as memory takes it.

MLX's own unpacks a byte a thread, and reaches a third of what the memory of a large GPU can do.
Here a thread reads and writes eight numbers at once, a few times over. `ops.py` chooses.

MLX packs a row as one stream of bits, the first number in the lowest; `group_size` neighbours share
a scale and a bias. A number is scale * code + bias, in float32, rounded once.
"""

from __future__ import annotations

from typing import cast

import mlx.core as mx

from fluxmesh.kernels import cuda_transformer
from fluxmesh.kernels.cuda_transformer import PACK, THREADS

ROUNDS = 4  # packs of a thread

HEADER = """
// The eight codes of BITS bits that lie in BITS bytes.
template <int BITS> __device__ inline unsigned long long codes_at(const void* packed, long pack) {
  const unsigned char* from = static_cast<const unsigned char*>(packed) + pack * BITS;
  if (BITS == 8) return *reinterpret_cast<const unsigned long long*>(from);
  if (BITS == 4) return *reinterpret_cast<const unsigned*>(from);
  if (BITS == 2) return *reinterpret_cast<const unsigned short*>(from);
  unsigned long long codes = 0;
  #pragma unroll
  for (int i = 0; i < BITS; ++i) codes |= static_cast<unsigned long long>(from[i]) << (8 * i);
  return codes;
}
"""

# What a thread needs is read before it writes anything, so that many reads are under way at once.
UNPACK = """
  const long packs = static_cast<long>(packed_shape[0]) * packed_shape[1] * 4 / BITS;
  const long first = static_cast<long>(blockIdx.x) * (ROUNDS * THREADS) + threadIdx.x;
  unsigned long long codes[ROUNDS];
  float by[ROUNDS], up[ROUNDS];
  #pragma unroll
  for (int r = 0; r < ROUNDS; ++r) {
    const long pack = first + r * THREADS;
    if (pack < packs) {
      codes[r] = codes_at<BITS>(packed, pack);
      by[r] = static_cast<float>(scales[pack * 8 / GROUP]);
      up[r] = static_cast<float>(biases[pack * 8 / GROUP]);
    }
  }
  #pragma unroll
  for (int r = 0; r < ROUNDS; ++r) {
    const long pack = first + r * THREADS;
    if (pack < packs) {
      float value[8];
      #pragma unroll
      for (int j = 0; j < 8; ++j) {
        const unsigned code = static_cast<unsigned>(codes[r] >> (BITS * j)) & ((1u << BITS) - 1u);
        value[j] = by[r] * static_cast<float>(code) + up[r];
      }
      store(out + pack * 8, value);
    }
  }
"""


def unpacked(
    packed: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int
) -> mx.array:
    """As `ops.unpacked`."""
    rows, columns = scales.shape[0], scales.shape[1] * group_size
    packs = rows * columns // PACK
    names = ("packed", "scales", "biases"), ("out",)
    blocks = -(-packs // (ROUNDS * THREADS))
    (out,) = cuda_transformer.kernel_of("unpacked", *names, UNPACK, HEADER)(
        inputs=[packed, scales, biases],
        template=[
            ("T", scales.dtype),
            ("BITS", bits),
            ("GROUP", group_size),
            ("ROUNDS", ROUNDS),
            ("THREADS", THREADS),
        ],
        output_shapes=[(rows, columns)],
        output_dtypes=[scales.dtype],
        grid=(blocks * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
    )
    return cast(mx.array, out)
