"""From how many rows on is it faster to unpack a quantized matrix than to multiply it packed?

    python -m benchmarks.packed                      # FLUX.1-dev's matrices; 2 minutes on a GPU
    python -m benchmarks.packed --small              # tiny sizes, to try this program

For each number of bits and of rows: MLX's quantized product, unpacking and a plain product
(`kernels/packed_linear.py`, whatever its threshold), and the plain product of a matrix that never
was packed. "pays from" is the least number of rows from which on unpacking is the faster one at
every larger number: `MANY_ROWS` should be near the largest of these. Random numbers, bfloat16.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import harness
from benchmarks.harness import Result, emit, say

BITS = (3, 4, 5, 6, 8)
ROWS = (1, 8, 32, 64, 128, 192, 256, 384, 512, 1024, 2048, 4608, 8192)
MATRICES = (
    (3072, 21504),
    (15360, 3072),
    (3072, 3072),
)  # inputs, outputs: the widest, the narrowest


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=int, nargs="+", choices=BITS, default=list(BITS))
    parser.add_argument("--rows", type=int, nargs="+", help="1 to 8192 unless --small")
    parser.add_argument("--steps", type=int, default=3, help="times twelve products, timed")
    parser.add_argument("--warmup", type=int, default=1, help="times twelve before them")
    options = harness.options_of(parser, measure, "tiny matrices")
    say(f"{harness.machine()}\n")
    results: list[Result] = []
    for inputs, outputs in ((128, 96),) if options.small else MATRICES:
        for bits in options.bits:
            case = {
                "inputs": inputs,
                "outputs": outputs,
                "bits": bits,
                "rows": sorted(options.rows or ((1, 16) if options.small else ROWS)),
                "steps": options.steps,
                "warmup": options.warmup,
            }
            own = list(harness.results_of("benchmarks.packed", case))
            results += own
            harness.write_json(options.json, results)
            say(report(own) + "\n")


def measure(case: Result) -> None:
    """Times a matrix of so many bits with every number of rows, few first."""
    import mlx.core as mx
    import mlx.nn as nn

    from benchmarks.products import SETS, seconds_of
    from fluxmesh.kernels.packed_linear import PackedLinear, unpacked, unpacked_product

    inputs, outputs, bits = case["inputs"], case["outputs"], case["bits"]
    plain = [nn.Linear(inputs, outputs) for _ in range(SETS)]
    for linear in plain:
        linear.set_dtype(mx.bfloat16)
    packed = [PackedLinear.from_linear(linear, 64, bits) for linear in plain]
    mx.eval([linear.parameters() for linear in (*plain, *packed)])
    none = mx.zeros((1,))
    unpacking = seconds_of(lambda i: unpacked(packed[i], none), case)
    for rows in case["rows"]:
        x = mx.random.normal((1, rows, inputs), dtype=mx.bfloat16)
        mx.eval(x)
        ways: dict[str, Callable[[int, mx.array], mx.array]] = {
            "quantized": lambda i, x: nn.QuantizedLinear.__call__(packed[i], x),
            "unpacked": lambda i, x: unpacked_product(packed[i], x),
            "plain": lambda i, x: plain[i](x),
        }
        times = {
            name: seconds_of(lambda i, way=way, x=x: way(i, x), case)  # type: ignore[misc]
            for name, way in ways.items()
        }
        apart = mx.linalg.norm(
            (ways["quantized"](0, x) - ways["unpacked"](0, x)).astype(mx.float32)
        )
        size = mx.linalg.norm(ways["quantized"](0, x).astype(mx.float32))
        emit(number=rows, **times, unpacking=unpacking, apart=(apart / size).item())


def pays_from(results: Sequence[Result]) -> int | None:
    """The least number of rows from which on unpacking is faster; None where it never is."""
    least = None
    for result in sorted(results, key=lambda result: -result["number"]):
        if result["unpacked"] >= result["quantized"]:
            break
        least = int(result["number"])
    return least


def report(results: Sequence[Result]) -> str:
    """One matrix in one number of bits."""
    measured = [result for result in results if "number" in result]
    problems = [f"{result.get('failed') or result.get('skipped')}" for result in results
                if "number" not in result]  # fmt: skip
    if not measured:
        return "\n".join(problems)
    first = measured[0]
    name = f"{first['inputs']}→{first['outputs']}, {first['bits']} bits"
    written = 2 * first["inputs"] * first["outputs"] / first["unpacking"] / 1e9
    rows = [
        [
            str(result["number"]),
            *(f"{1000 * result[way]:.3f}" for way in ("quantized", "unpacked", "plain")),
            f"{result['apart']:.1e}",
        ]
        for result in measured
    ]
    about: list[Any] = [
        f"{name}: unpacking alone {1000 * first['unpacking']:.3f} ms ({written:.0f} GB/s written); "
        f"pays from {pays_from(measured)} rows",
        harness.table(["rows", "quantized ms", "unpacked ms", "plain ms", "apart"], rows),
        *problems,
    ]
    return "\n".join(about)


if __name__ == "__main__":
    main()
