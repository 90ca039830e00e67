"""What does the link cost `sequence` and `tensor` beyond its bytes, and which order hides it?

    python -m benchmarks.overlap --engines 2 --sizes 1024 2048    # two GPUs of this machine
    python -m benchmarks.overlap --engines 4 --ways tree edges    # some ways only
    python -m benchmarks.overlap --backend none --settings plain  # what ranks compute, on one GPU
    python -m benchmarks.overlap --model klein-9b                 # FLUX.2 klein; dev unless said
    python -m benchmarks.overlap --small --backend ring           # tiny sizes on any machine

Random plain weights, one image. Each way (`overlap_ways.py`) gives the same picture, in another
order of the work, or cut otherwise; "differs" is how far its latents are from the tree's after a
step. "no link" is the same step where what a rank sends comes back at once: what it computes alone.
Under each setting of MLX and NCCL (`SETTINGS`) the engines start anew; `plain`, with all ways and
all sizes, comes first, and none begins that might not end within `--budget` seconds. "one" is one
engine by itself. "bare gathers" are 20 of a block's keys and values, one after another and alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import groups, harness
from benchmarks.harness import Result, Skipped, Stopwatch, emit, say
from benchmarks.sizes import FULL, SMALL, SMALL_TRANSFORMERS, TRANSFORMERS
from fluxmesh.errors import FluxmeshError
from fluxmesh.models.flux2.config import Flux2Config

WAYS = (
    "one",
    "bare gathers",
    "tree",  # `sequence` as it is
    "edges",  # in an order that CUDA graphs keep: gather, queries, the MLP's way in, attention
    "abreast",  # edges, but queries and the MLP's way in don't wait for each other
    "together",  # edges, and one product for queries and the MLP's way in
    "together, later",  # the same, the product some microseconds after the gather
    "own stream, edges",  # collectives on a stream of their own
    "own stream, together",
    "tensor",  # `tensor` as it is
    "tensor, halves",  # half of the rows summed while the others' product is computed
    "rows",  # together, and double blocks in two parts of the rows
    "ordered",  # the order of edges, but only that in which a graph is built
    "one stream",  # nothing beside a collective: what hiding nothing at all costs
    "heads",  # edges, and keys and values of half of the heads at a time
    "own stream",  # the tree's blocks, collectives on a stream of their own
)
SHORT = (
    *("bare gathers", "tree", "edges", "together"),
    *("own stream, edges", "own stream, together", "tensor"),
)
# What MLX and NCCL can be told by the environment. NVLink's multicast stays off everywhere: a
# program that uses it can take a shared host's GPUs out of service.
SETTINGS: dict[str, dict[str, str]] = {
    "plain": {},
    "no mixing": {"NCCL_GRAPH_MIXING_SUPPORT": "0"},  # no events around a collective in a graph
    "32 channels": {"NCCL_MIN_NCHANNELS": "32"},
    # Kernels start in the order in which they were launched, whatever their streams.
    "no graphs, one connection": {
        "MLX_USE_CUDA_GRAPHS": "0",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    },
    "large graphs": {"MLX_MAX_OPS_PER_BUFFER": "1000", "MLX_MAX_MB_PER_BUFFER": "20000"},
    "16 channels, no mixing": {"NCCL_MIN_NCHANNELS": "16", "NCCL_GRAPH_MIXING_SUPPORT": "0"},
    "one connection": {"CUDA_DEVICE_MAX_CONNECTIONS": "1"},
    "16 channels": {"NCCL_MIN_NCHANNELS": "16"},
    "large buffers": {"NCCL_BUFFSIZE": "16777216"},
    "simple": {"NCCL_PROTO": "Simple"},
    "LL128": {"NCCL_PROTO": "LL128"},
    "no clusters": {"NCCL_CGA_CLUSTER_SIZE": "0"},
    "no registering": {"NCCL_GRAPH_REGISTER": "0"},
    "8 channels": {"NCCL_MAX_NCHANNELS": "8"},
    "no graphs": {"MLX_USE_CUDA_GRAPHS": "0"},
}
LIMIT = 110  # seconds that a setting other than plain may take
HANGS = 90  # seconds after which a way at a size is given up, its kernels' compiling included
GATHERS = 20
WINDOW = 3  # steps: one that is begun ahead makes the next look short


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
    parser.add_argument("--budget", type=float, default=560, help="seconds for everything")
    parser.add_argument("--small", action="store_true", help="tiny models, to try this program")
    parser.add_argument("--json", type=Path, help="write everything measured into this file")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        harness.run_case(options.case, measure)
        return
    end = time.monotonic() + options.budget
    say(f"{harness.machine()}\n")
    results: list[Result] = []
    for setting in options.settings:
        left = end - time.monotonic()
        if setting != "plain" and left < LIMIT:
            say(f"{setting}: left out, for want of time")
            continue
        for result in setting_of(setting, options, left if setting == "plain" else LIMIT):
            results.append(result)
            say(line_of(result))
            harness.write_json(options.json, results)
    say("\n" + report(results))


def setting_of(setting: str, options: argparse.Namespace, seconds: float) -> Iterator[Result]:
    """What engines that start under one setting measure within so many seconds."""
    sizes = options.sizes or ([64] if options.small else [1024])
    is_plain = setting == "plain"
    case = {
        "setting": setting,
        "engines": options.engines,
        "backend": options.backend,
        "model": options.model,
        "sizes": sizes if is_plain else sizes[:1],
        "ways": list(options.ways or (WAYS if is_plain else SHORT)),
        "lone": is_plain,
        "steps": options.steps,
        "warmup": options.warmup,
        "small": options.small,
    }
    env = {"NCCL_NVLS_ENABLE": "0", **SETTINGS[setting]}
    if options.small:
        env["MLX_ENABLE_TF32"] = "0"
    end = time.monotonic() + seconds
    ways: list[str] = case["ways"]
    while ways and time.monotonic() < end:
        begun, failed = None, False
        with tempfile.TemporaryDirectory() as scratch:
            envs = [env]
            if options.backend != "none":
                ranks = groups.environments(options.backend, options.engines, Path(scratch))
                envs = [{**own, **env} for own in ranks]
            case["ways"] = ways
            for result in harness.results_of(
                "benchmarks.overlap", case, envs, timeout=end - time.monotonic()
            ):
                begun, failed = result.get("begins", begun), failed or "failed" in result
                if "begins" not in result:
                    yield {**result, "way": result.get("way", begun)}
        if not failed or begun is None:
            return
        ways = ways[ways.index(begun) + 1 :]  # without the one that hung or died


# A rank


def measure(case: Result) -> None:
    """One process of the group: every way, one after another."""
    import mlx.core as mx

    from benchmarks import flux2_peers, peers
    from fluxmesh.models.collectives import Ranks

    is_alone = case["backend"] == "none"
    if case["backend"] == "nccl" and not mx.cuda.is_available():
        raise Skipped("nccl needs NVIDIA GPUs")
    transformers, sizes = (SMALL_TRANSFORMERS, SMALL) if case["small"] else (TRANSFORMERS, FULL)
    config, text_tokens = transformers[case["model"]], sizes.text_tokens
    group = None if is_alone else mx.distributed.init(strict=True, backend=case["backend"])
    ours = flux2_peers.FluxmeshKlein if isinstance(config, Flux2Config) else peers.Fluxmesh
    dtype, peer, whole = "float32" if case["small"] else "bfloat16", None, None
    for way in case["ways"]:
        emit(begins=way)
        if way == "bare gathers":
            for size in case["sizes"] if group is not None else ():
                tokens = text_tokens + (size // 16) ** 2
                _gathers(config, tokens, Ranks(group), getattr(mx, dtype), size)
            continue
        if peer is None:
            peer = ours(config, dtype, None, low_memory=False)
            whole = peer.flow
        try:
            if group is not None:
                _time_linked(way, peer, whole, group, case, text_tokens)
            if case["lone"] and computed_as(way) == way or way == "one" and is_alone:
                _time_alone(way, peer, whole, group, case, text_tokens)
        except (FluxmeshError, RuntimeError, ValueError) as error:  # on every rank alike
            emit(way=way, failed_way=str(error).strip().splitlines()[-1])
        peer.flow = whole
        mx.clear_cache()


def _time_linked(
    way: str, peer: Any, whole: Any, group: Any, case: Result, text_tokens: int
) -> None:
    """Times steps of a way at each size."""
    ranks = ranks_of(way, group)
    peer.flow, peer.ranks = flow_of(way, whole, ranks), None if way == "one" else ranks
    for size in case["sizes"]:
        times, first = _steps(peer, size, case, text_tokens)
        every = _of_all(group, typical(times))
        sample = first.reshape(-1)[:1024].tolist()
        _tell(way, peer, size, times, every, linked=True, sample=sample)


def _time_alone(
    way: str, peer: Any, whole: Any, group: Any, case: Result, text_tokens: int
) -> None:
    """The same without a link, at the first size: this rank, or without a group both ends."""
    from benchmarks.overlap_ways import LoneRank

    size, N = case["sizes"][0], case["engines"]
    numbers = [group.rank()] if group is not None else [0] if way == "one" else [0, N - 1]
    every, times = [], []
    for rank in numbers:
        ranks = LoneRank(rank, N)
        peer.flow, peer.ranks = flow_of(way, whole, ranks), None if way == "one" else ranks
        times, _ = _steps(peer, size, case, text_tokens)
        every.append(typical(times))
        peer.flow = whole
    if group is not None:
        every = _of_all(group, every[0])
    _tell(way, peer, size, times, every, linked=False, sample=None)


def _steps(peer: Any, size: int, case: Result, text_tokens: int) -> tuple[list[float], Any]:
    """Seconds of the steps that count, and the latents after the first; given up where it hangs."""
    hangs = threading.Timer(HANGS, lambda: os._exit(3))
    hangs.daemon = True
    hangs.start()
    try:
        watch = Stopwatch()
        counted = case["steps"] if size <= 1024 else max(2, case["steps"] // 2)
        peer.reset_peak()
        first = peer.denoise(size, size, case["warmup"] + counted, text_tokens, watch.tick)
        return watch.times[case["warmup"] :], first
    finally:
        hangs.cancel()


def _of_all(group: Any, seconds: float) -> list[float]:
    """Every rank's, when all have come so far."""
    import mlx.core as mx

    from fluxmesh.models.collectives import Ranks

    every: list[float] = Ranks(group).gather(mx.array([seconds])).tolist()
    return every


def _tell(
    way: str,
    peer: Any,
    size: int,
    times: list[float],
    every: list[float],
    *,
    linked: bool,
    sample: list[float] | None,
) -> None:
    emit(
        way=way,
        linked=linked,
        size=size,
        seconds=max(every),
        fastest=min(times),
        ranks=every,
        peak=peer.peak(),
        sample=sample,
        software=peer.software(),
    )


def typical(times: list[float]) -> float:
    """Seconds of a step: the median of the means of a few neighbours."""
    windows = [times[i : i + WINDOW] for i in range(max(1, len(times) - WINDOW + 1))]
    return statistics.median(statistics.mean(window) for window in windows)


def computed_as(way: str) -> str:
    """The way whose step without a link is that of `way` as well; "" for one engine's."""
    if way.startswith("own stream, "):
        return way.removeprefix("own stream, ")
    return {"one": "", "ordered": "edges", "own stream": "tree", "one stream": "tree"}.get(way, way)


def ranks_of(way: str, group: Any) -> Any:
    """The group as a way uses it: on which stream, and who waits."""
    import mlx.core as mx

    from benchmarks.overlap_ways import OwnRanks
    from fluxmesh.models.collectives import Ranks

    if way.startswith("own stream"):
        # A ring's collectives run on a processor, whatever the device that computes.
        return OwnRanks(group, mx.new_stream(mx.gpu if mx.cuda.is_available() else mx.cpu))
    return OwnRanks(group, None) if way == "one stream" else Ranks(group)


def flow_of(way: str, whole: Any, ranks: Any) -> Any:
    """The transformer as a way spreads it."""
    from benchmarks import overlap_ways as ways

    if way == "one":
        return whole
    kinds: dict[str, type[ways.OverlapWay]] = {
        "tree": ways.OverlapWay,
        "ordered": ways.Ordered,
        "edges": ways.Edges,
        "abreast": ways.Abreast,
        "together": ways.Together,
        "together, later": ways.TogetherLater,
        "heads": ways.HeadGroups,
        "rows": ways.RowHalves,
        "own stream": ways.OverlapWay,
        "own stream, edges": ways.Edges,
        "own stream, together": ways.Together,
        "one stream": ways.OverlapWay,
    }
    if way in kinds:
        return ways.spread_by(kinds[way], whole, ranks)
    tensors: dict[str, Callable[[Any, Any], Any]] = {
        "tensor": ways.sharded,
        "tensor, halves": ways.sharded_in_halves,
    }
    return tensors[way](whole, ranks)


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
    emit(way="bare gathers", linked=True, size=size, seconds=seconds, rate=rate)


# What is printed


def line_of(result: Result) -> str:
    """One result as it comes."""
    where = f"{result['setting']}, {result['way'] or 'the engines'}"
    for problem in ("skipped", "failed", "failed_way"):
        if problem in result:
            return f"{where}: {problem}: {result[problem]}"
    if "rate" in result:
        each, rate = 1000 * result["seconds"], result["rate"] / 1e9
        return f"{where}, {result['size']}²: {each:.3f} ms each, {rate:.0f} GB/s"
    link = "" if result["linked"] else " without a link"
    return f"{where}, {result['size']}²{link}: {1000 * result['seconds']:.2f} ms"


def report(results: list[Result]) -> str:
    steps = [
        result
        for result in results
        if "ranks" in result and (result["linked"] or result["backend"] == "none")
    ]
    header = ["setting", "way", "size", "ms a step", "fastest", "times one", "no link ms by rank",
              "link costs ms", "peak GB", "differs"]  # fmt: skip
    tables = [harness.table(header, [row(result, results) for result in steps])]
    left = [line_of(result) for result in results if "ranks" not in result]
    return "\n\n".join([*tables, *left])


def row(result: Result, results: list[Result]) -> list[str]:
    def other(way: str, linked: bool) -> Result | None:
        """The first of this size."""
        return next(
            (
                known
                for known in results
                if known.get("way") == way
                and known.get("linked") == linked
                and known.get("size") == result["size"]
                and "ranks" in known
            ),
            None,
        )

    lone = other(computed_as(result["way"]), False)
    one, tree = other("one", result["linked"]), other("tree", result["linked"])
    seconds = result["seconds"]
    return [
        result["setting"],
        result["way"],
        f"{result['size']}²",
        f"{1000 * seconds:.2f}",
        f"{1000 * result['fastest']:.2f}",
        f"{one['seconds'] / seconds:.2f}" if one else "",
        " / ".join(f"{1000 * own:.2f}" for own in lone["ranks"]) if lone else "",
        f"{1000 * (seconds - lone['seconds']):.2f}" if lone else "",
        f"{result['peak'] / 1e9:.1f}",
        harness.difference(result, tree),
    ]


if __name__ == "__main__":
    main()
