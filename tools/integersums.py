"""Sums of int64 across the ranks of a group, against the exact sum.

    mlx.launch -n 2 --backend nccl -- python -m tools.integersums
    mlx.launch -n 2 --backend ring -- python -m tools.integersums

Training adds gradients as int64 (`fluxmesh/training/compute/exact_sum.py`), so that hosts agree to
the byte. This shows that a backend carries such sums without rounding: the values span all 63 bits,
and every rank knows what every other one sends. Exits 1 where a number is off.
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np


def part(rank: int, count: int, size: int) -> np.ndarray:
    """What a rank sends: int64, of any magnitude whose sum over the ranks still fits."""
    random = np.random.Generator(np.random.Philox(key=rank))
    shifts = random.integers(1, 63, count)
    return random.integers(-(2**62), 2**62, count) // size >> (shifts - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="any", help="ring, nccl, jaccl, mpi")
    parser.add_argument("--count", type=int, default=38_273_024, help="numbers: FLUX at rank 8")
    parser.add_argument("--times", type=int, default=5)
    options = parser.parse_args()

    import mlx.core as mx

    group = mx.distributed.init(strict=True, backend=options.backend)
    rank, size = group.rank(), group.size()
    exact = sum(part(other, options.count, size) for other in range(size))
    mine = mx.array(part(rank, options.count, size))
    mx.eval(mine)
    assert mine.dtype == mx.int64
    wrong, taken = 0, []
    for _ in range(options.times):
        start = time.perf_counter()
        total = mx.distributed.all_sum(mine, group=group)
        mx.eval(total)
        taken.append(time.perf_counter() - start)
        wrong += int((np.array(total) != exact).sum())
    print(
        f"rank {rank} of {size}, {options.backend}, {mx.default_device()}: {options.count} numbers "
        f"of int64, {wrong} wrong in {options.times} sums, {min(taken) * 1e3:.1f} ms the best",
        flush=True,
    )
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
