"""What does the link cost `sequence` and `tensor` on several GPUs beyond what each rank computes?

    python -m benchmarks.overlap --engines 2 --sizes 1024 2048    # two GPUs of this machine
    python -m benchmarks.overlap --backend none --settings plain  # what ranks compute, on one GPU
    python -m benchmarks.overlap --model klein-9b                 # FLUX.2 klein; dev unless said
    python -m benchmarks.overlap --small --backend ring           # tiny sizes on any machine

Random plain weights, one image. "no link" is the same step where what a rank sends comes back at
once: what it computes alone. "one" is one engine by itself, "bare gathers" are 20 of a block's keys
and values, one after another and alone. On CUDA steps are replayed, as an engine's are, but where
they are "described anew". "differs" is how far the latents are from those of `sequence` after a
step. Engines start anew for each way under each setting of MLX and NCCL (`SETTINGS`); a way that
hangs is given up after `--limit` seconds. Under settings other than `plain` only `SHORT` ways run,
at one size.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import groups, harness
from benchmarks.harness import Result, Skipped, Stopwatch, emit, say, typical
from benchmarks.sizes import FULL, SMALL, SMALL_TRANSFORMERS, TRANSFORMERS
from fluxmesh.cluster.rendezvous import engine_envs
from fluxmesh.models.flux2.config import Flux2Config

ANEW = ", described anew"  # at each step, and not replayed
WAYS = ("one", "bare gathers", "sequence", "tensor", f"sequence{ANEW}", f"tensor{ANEW}")
SHORT = ("bare gathers", "sequence")
# What MLX and NCCL can be told by the environment.
SETTINGS: dict[str, dict[str, str]] = {
    "plain": {},  # as engines are started: `rendezvous.engine_envs`
    # More room for NCCL beside a product.
    "16 channels": {"NCCL_MIN_NCHANNELS": "16"},
    "32 channels": {"NCCL_MIN_NCHANNELS": "32"},
    # Kernels of a graph run beside one another; of a hundred, as many as read 1000 Mi numbers.
    "graphs": {"MLX_USE_CUDA_GRAPHS": "1", "MLX_MAX_OPS_PER_BUFFER": "100"},
    # Each kernel launched by itself; so many wait for the device, whatever they hold.
    "no graphs, 30": {"MLX_USE_CUDA_GRAPHS": "0", "MLX_MAX_OPS_PER_BUFFER": "30"},
    "no graphs, 100": {"MLX_USE_CUDA_GRAPHS": "0", "MLX_MAX_OPS_PER_BUFFER": "100"},
}
GATHERS = 20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument(
        "--backend",
        choices=("ring", "nccl", "none"),
        default="nccl",
        help="none: one process without a link, the first rank and then the last",
    )
    parser.add_argument("--model", choices=TRANSFORMERS, default="dev")
    parser.add_argument("--sizes", type=int, nargs="+", help="pixels a side; 1024 unless --small")
    parser.add_argument("--ways", nargs="+", choices=WAYS, help="all; of other settings fewer")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--steps", type=int, default=10, help="steps timed")
    parser.add_argument("--warmup", type=int, default=4, help="steps before them")
    parser.add_argument("--limit", type=float, default=120, help="seconds that a way may take")
    options = harness.options_of(parser, measure)
    say(f"{harness.machine()}\n")
    results: list[Result] = []
    for setting in options.settings:
        for way in options.ways or (WAYS if setting == "plain" else SHORT):
            for result in results_of(setting, way, options):
                results.append(result)
                say(line_of(result))
                harness.write_json(options.json, results)
    say("\n" + report(results))


def results_of(setting: str, way: str, options: argparse.Namespace) -> Iterator[Result]:
    """What engines that start under a setting measure of a way."""
    sizes = options.sizes or ([64] if options.small else [1024])
    case = {
        "setting": setting,
        "way": way,
        "engines": options.engines,
        "backend": options.backend,
        "model": options.model,
        "sizes": sizes if setting == "plain" else sizes[:1],
        "steps": options.steps,
        "warmup": options.warmup,
        "small": options.small,
    }
    env = dict(SETTINGS[setting])
    if options.small:
        env["MLX_ENABLE_TF32"] = "0"
    with tempfile.TemporaryDirectory() as scratch:
        ranks: list[dict[str, str]] = [{}]
        if options.backend != "none":
            ranks = groups.environments(options.backend, options.engines, Path(scratch))
        if way == "one":  # an engine that is in no ring
            alone = dict(engine_envs(options.backend, options.engines))
            ranks = [{k: v for k, v in own.items() if k not in alone} for own in ranks]
        envs = [{**own, **env} for own in ranks]
        yield from harness.results_of("benchmarks.overlap", case, envs, timeout=options.limit)


# A rank


def measure(case: Result) -> None:
    """One process of the group, or without a group each end of it in turn."""
    import mlx.core as mx

    from benchmarks import flux2_peers, peers
    from benchmarks.placements import LoneRank
    from fluxmesh.models.collectives import Ranks

    if case["backend"] == "nccl" and not mx.cuda.is_available():
        raise Skipped("nccl needs NVIDIA GPUs")
    transformers, sizes = (SMALL_TRANSFORMERS, SMALL) if case["small"] else (TRANSFORMERS, FULL)
    config, dtype = transformers[case["model"]], "float32" if case["small"] else "bfloat16"
    way, N, group = case["way"], case["engines"], None
    if case["backend"] != "none":
        group = mx.distributed.init(strict=True, backend=case["backend"])
    if way == "bare gathers":
        if group is None:
            raise Skipped("a rank alone gathers nothing")
        for size in case["sizes"]:
            tokens = sizes.text_tokens + (size // 16) ** 2
            _gathers(config, tokens, Ranks(group), getattr(mx, dtype), size)
        return
    ours = flux2_peers.FluxmeshKlein if isinstance(config, Flux2Config) else peers.Fluxmesh
    peer: Any = ours(config, dtype, None, low_memory=False)
    whole = peer.flow
    if way == "one" or group is not None:
        if group is not None and way != "one":
            peer.ranks = Ranks(group)
            peer.flow = placed(way, whole, peer.ranks)
        for size in case["sizes"]:
            times, first = _steps(peer, size, case, sizes.text_tokens)
            _tell(peer, size, times, _of_all(group, typical(times)), first, is_linked=True)
    if way == "one":
        return
    size, every = case["sizes"][0], []
    for rank in [0, N - 1] if group is None else [group.rank()]:
        peer.ranks = LoneRank(rank, N)
        peer.flow = placed(way, whole, peer.ranks)
        times, _ = _steps(peer, size, case, sizes.text_tokens)
        every.append(typical(times))
    if group is not None:
        every = _of_all(group, every[0])
    _tell(peer, size, times, every, None, is_linked=False)


def placed(way: str, whole: Any, ranks: Any) -> Any:
    """The transformer as an engine has it, or without a trace to replay."""
    from benchmarks.placements import spread
    from fluxmesh.engine.replay import replayed

    placement = way.removesuffix(ANEW)
    flow = spread(placement, whole, ranks)
    return flow if way != placement else replayed(flow, ranks)


def _steps(peer: Any, size: int, case: Result, text_tokens: int) -> tuple[list[float], Any]:
    """Seconds of the steps that count, and the latents after the first."""
    peer.reset_peak()
    watch = Stopwatch()
    steps = case["warmup"] + case["steps"] + 1
    first = peer.denoise(size, size, steps, text_tokens, watch.tick)
    return watch.times[case["warmup"] : -1], first


def _of_all(group: Any, seconds: float) -> list[float]:
    """Every rank's, when all have come so far."""
    import mlx.core as mx

    from fluxmesh.models.collectives import Ranks

    if group is None:
        return [seconds]
    every: list[float] = Ranks(group).gather(mx.array([seconds])).tolist()
    return every


def _tell(
    peer: Any, size: int, times: list[float], every: list[float], first: Any, *, is_linked: bool
) -> None:
    emit(
        linked=is_linked,
        size=size,
        seconds=max(every),
        fastest=min(times),
        ranks=every,
        peak=peer.peak(),
        sample=None if first is None else first.reshape(-1)[:1024].tolist(),
        software=peer.software(),
    )


def _gathers(config: Any, tokens: int, ranks: Any, dtype: Any, size: int) -> None:
    """Times gathers of a block's keys and values, each of what the one before gave."""
    import mlx.core as mx

    C = -(-tokens // ranks.size)
    own = mx.zeros((C, 1, 2, config.num_heads, config.head_dim), dtype)
    mx.eval(own)
    times = []
    for _ in range(4):
        watch, x = Stopwatch(), own
        for _ in range(GATHERS):
            x = ranks.gather(x)[ranks.rank * C : (ranks.rank + 1) * C]
        mx.eval(x)
        watch.tick()
        times.append(watch.times[0] / GATHERS)
    seconds = statistics.median(times[1:])
    rate = (ranks.size - 1) * own.nbytes / seconds
    emit(linked=True, size=size, seconds=seconds, rate=rate)


# What is printed


def line_of(result: Result) -> str:
    """One result as it comes."""
    where = f"{result['setting']}, {result['way']}"
    for problem in ("skipped", "failed"):
        if problem in result:
            return f"{where}: {problem}: {result[problem]}"
    where += f", {result['size']}²"
    if "rate" in result:
        return f"{where}: {1000 * result['seconds']:.3f} ms each, {result['rate'] / 1e9:.0f} GB/s"
    link = "" if result["linked"] else " without a link"
    return f"{where}{link}: {1000 * result['seconds']:.2f} ms"


def report(results: list[Result]) -> str:
    steps = [result for result in results if "ranks" in result]
    rows = [row(r, steps) for r in steps if r["linked"] or r["backend"] == "none"]
    header = ["setting", "way", "size", "ms a step", "fastest", "times one", "no link ms by rank",
              "link costs ms", "peak GB", "differs"]  # fmt: skip
    left = [line_of(result) for result in results if "ranks" not in result]
    return "\n\n".join([harness.table(header, rows), *left])


def row(result: Result, steps: list[Result]) -> list[str]:
    def other(way: str, setting: str, linked: bool) -> Result | None:
        asked = {"way": way, "setting": setting, "linked": linked, "size": result["size"]}
        return next((known for known in steps if asked.items() <= known.items()), None)

    lone = other(result["way"], result["setting"], False)
    one, sequence = other("one", "plain", True), other("sequence", "plain", True)
    seconds = result["seconds"]
    return [
        result["setting"],
        result["way"],
        f"{result['size']}²",
        f"{1000 * seconds:.2f}",
        f"{1000 * result['fastest']:.2f}",
        f"{one['seconds'] / seconds:.2f}" if one else "",
        " / ".join(f"{1000 * own:.2f}" for own in lone["ranks"]) if lone else "",
        f"{1000 * (seconds - lone['seconds']):.2f}" if lone and result["linked"] else "",
        f"{result['peak'] / 1e9:.1f}",
        harness.difference(result, sequence),
    ]


if __name__ == "__main__":
    main()
