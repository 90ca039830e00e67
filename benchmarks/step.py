"""How long is a denoising step of FLUX, and how much memory does it take? Beside its peers.

    python -m benchmarks.step                              # full size, a GPU or a Mac of 64 GB
    python -m benchmarks.step --apple mlx-examples/flux    # Apple's example from that folder too
    python -m benchmarks.step --model klein-4b             # FLUX.2 klein; dev unless said
    python -m benchmarks.step --model kontext --references 1    # edits a picture of the same size
    python -m benchmarks.step --small                      # tiny sizes, to try this program

Random weights, one image, 512 text tokens. "sum" is MLX's own matrix products and attention at the
shapes of one step, each timed alone and added up: what a step would take if nothing else did. A
peer that is not installed is left out and said so. `--steps` steps are timed after `--warmup` that
are not counted: the median of the means of three neighbours counts, for a step that is reported
late makes the next look short. With references "first" is the first step of a second image, which
in klein-9b-kv computes the keys and values that later ones keep; "sum" counts the references'
tokens at every step, so it is no bound of what klein-9b-kv does later.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Result, Skipped, Stopwatch, emit, say, typical
from benchmarks.sizes import FULL, SMALL, SMALL_TRANSFORMERS, TRANSFORMERS
from fluxmesh.models.flux2.config import Flux2Config
from fluxmesh.request import DTYPES

WHAT = (
    "sum",
    "fluxmesh",
    "fluxmesh-low-memory",  # modulation weights dropped once a request's modulations are computed
    "apple",
    "mflux",
    "diffusers",
    "diffusers-compiled",  # torch.compile of the whole transformer
    "diffusers-blocks",  # torch.compile of its two kinds of block
)
USUAL = [what for what in WHAT if what != "diffusers-blocks"]
USUAL_SMALL = [what for what in USUAL if what != "mflux"]  # whose widths are constants


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=TRANSFORMERS, default="dev")
    parser.add_argument(
        "--sizes", type=int, nargs="+", help="pixels a side; 512 1024 unless --small"
    )
    parser.add_argument("--what", nargs="+", choices=WHAT, help="all but diffusers-blocks")
    parser.add_argument(
        "--references",
        type=int,
        default=0,
        help="pictures of the same size to edit: kontext 1, klein several",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument(
        "--bits", type=int, nargs="*", default=[], help="quantized as well: 3 4 5 6 8"
    )
    parser.add_argument(
        "--unpack-from",
        type=int,
        nargs="+",
        help="rows from which on CUDA unpacks a quantized matrix (`packed_linear.MANY_ROWS`); "
        "several are measured one after another, and a million unpacks none",
    )
    parser.add_argument("--steps", type=int, default=20, help="steps timed")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--apple", type=Path, help="folder of mlx-examples/flux")
    options = harness.options_of(parser, measure)
    whats = options.what or (USUAL_SMALL if options.small else USUAL)
    sizes = options.sizes or ([64] if options.small else [512, 1024])
    say(f"{harness.machine()}\n")
    results: list[Result] = []
    quantized = itertools.product(options.bits, options.unpack_from or [None])
    for bits, rows in [(None, None), *quantized]:
        for what in whats:
            case = {
                "what": what,
                "model": options.model,
                "dtype": options.dtype,
                "bits": bits,
                "unpack_from": rows,
                "sizes": sizes,
                "references": options.references,
                "steps": options.steps,
                "warmup": options.warmup,
                "apple": str(options.apple) if options.apple else None,
                "small": options.small,
            }
            exact = {"MLX_ENABLE_TF32": "0"} if options.dtype == "float32" else {}
            for result in harness.results_of("benchmarks.step", case, [exact]):
                results.append(result)
                say(line_of(result))
                harness.write_json(options.json, results)
    say("\n" + report(results))


# A case


def measure(case: Result) -> None:
    """Builds one peer and times it at every size."""
    transformers, sizes = (SMALL_TRANSFORMERS, SMALL) if case["small"] else (TRANSFORMERS, FULL)
    config, text_tokens = transformers[case["model"]], sizes.text_tokens
    if case["what"] == "sum":
        from benchmarks.products import sum_of_products

        for size in case["sizes"]:
            emit(size=size, **sum_of_products(config, size, text_tokens, case))
        return
    if case["references"] and (case["model"] == "dev" or case["what"] in ("apple", "mflux")):
        raise Skipped(f"{case['what']} is not timed with a reference on {case['model']} here")
    if case["references"] > 1 and case["model"] == "kontext":
        raise Skipped("Kontext reads one reference")
    peer = build(case, config)
    peer.references = case["references"]
    peer.keeps_references = case["model"] == "klein-9b-kv"
    for size in case["sizes"]:
        peer.reset_peak()
        watch = Stopwatch()
        steps = case["warmup"] + case["steps"] + 1  # the last one looks short
        first = peer.denoise(size, size, steps, text_tokens, watch.tick)
        times = watch.times[:-1]
        beside = {}
        if peer.references:
            watch = Stopwatch()
            peer.denoise(size, size, 2, text_tokens, watch.tick)
            beside["first"] = watch.times[0]
        emit(
            size=size,
            **beside,
            software=peer.software(),
            seconds=typical(times[case["warmup"] :]),
            times=times,
            peak=peer.peak(),
            sample=None if first is None else first.reshape(-1)[:1024].tolist(),
        )


def build(case: Result, config: Any) -> Any:
    """The peer that a case names, with random weights on the device."""
    from benchmarks import flux2_peers, peers

    what, dtype, bits = case["what"], case["dtype"], case["bits"]
    if case["unpack_from"] is not None:
        from fluxmesh.kernels import packed_linear

        packed_linear.MANY_ROWS = case["unpack_from"]
    is_klein = isinstance(config, Flux2Config)
    if what.startswith("fluxmesh"):
        ours = flux2_peers.FluxmeshKlein if is_klein else peers.Fluxmesh
        return ours(config, dtype, bits, what.endswith("low-memory"))
    if what == "apple":
        if is_klein:
            raise Skipped("Apple's example knows FLUX.1 alone")
        if case["apple"] is None:
            raise Skipped("--apple names no folder of mlx-examples/flux")
        return peers.Apple(config, dtype, bits, Path(case["apple"]))
    if what == "mflux":
        return (flux2_peers.MfluxKlein if is_klein else peers.Mflux)(config, dtype, bits)
    compiled = {"compiled": "model", "blocks": "blocks"}.get(what.partition("-")[2], "")
    if is_klein and config.guidance_embed:
        raise Skipped("of FLUX.2, klein alone is timed in diffusers here")
    theirs = flux2_peers.DiffusersKlein if is_klein else peers.Diffusers
    return theirs(config, dtype, bits, compiled)


# What is printed


def name_of(result: Result) -> str:
    name = result["what"] + (f", {result['bits']} bits" if result["bits"] else "")
    if result["references"]:
        name += f", {result['references']} references"
    rows = result["unpack_from"]
    return name if rows is None else f"{name}, unpacked from {rows} rows"


def line_of(result: Result) -> str:
    """One result as it comes."""
    for problem in ("skipped", "failed"):
        if problem in result:
            return f"{name_of(result)}: {problem}: {result[problem]}"
    first = f", first {1000 * result['first']:.2f} ms" if "first" in result else ""
    return f"{name_of(result)}, {result['size']}²: {1000 * result['seconds']:.2f} ms{first}"


def report(results: list[Result]) -> str:
    """The table, the shapes' table, and what was left out."""
    measured = [result for result in results if "seconds" in result]
    header = ["what", "size", "ms a step", "first", "fastest–slowest", "× sum", "× Apple",
              "peak GB", "differs from fluxmesh by", "software"]  # fmt: skip
    tables = [harness.table(header, [row(result, measured) for result in measured])]
    for result in measured:
        if "shapes" in result:
            tables.append(f"{name_of(result)} at {result['size']}²:\n\n" + shapes_table(result))
    left_out = [line_of(result) for result in results if "seconds" not in result]
    return "\n\n".join([*tables, *left_out])


def row(result: Result, measured: list[Result]) -> list[str]:
    beside = {
        other["what"]: other
        for other in measured
        if all(other[key] == result[key] for key in ("size", "bits", "unpack_from"))
    }
    milliseconds = 1000 * result["seconds"]
    cells = [name_of(result), f"{result['size']}²", f"{milliseconds:.2f}"]
    cells.append(f"{1000 * result['first']:.2f}" if "first" in result else "")
    counted = [1000 * seconds for seconds in result.get("times", [])[result["warmup"] :]]
    cells.append(f"{min(counted):.2f}–{max(counted):.2f}" if counted else "")
    for what in ("sum", "apple"):
        known = beside.get(what)
        cells.append(f"{result['seconds'] / known['seconds']:.2f}" if known else "")
    cells.append(f"{result['peak'] / 1e9:.2f}" if result.get("peak") else "")
    cells.append(harness.difference(result, beside.get("fluxmesh")))
    cells.append(result["software"])
    return cells


def shapes_table(result: Result) -> str:
    rows = [
        [
            shape["name"],
            shape["shape"],
            str(shape["count"]),
            f"{1000 * shape['seconds']:.3f}",
            f"{1000 * shape['seconds'] * shape['count']:.2f}",
            f"{shape['flops'] / shape['seconds'] / 1e12:.2f}",
        ]
        for shape in result["shapes"]
    ]
    return harness.table(["layer", "shape", "a step", "ms", "ms in all", "TFLOP/s"], rows)


if __name__ == "__main__":
    main()
