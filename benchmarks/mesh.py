"""What do N engines gain over one? `tensor`, `sequence` and `data`, predicted beside measured.

    python -m benchmarks.mesh --engines 2 --backend nccl      # two GPUs of this machine
    python -m benchmarks.mesh --engines 2 --backend ring      # the same through TCP
    python -m benchmarks.mesh --apple mlx-examples/flux       # Apple's example, sharded, too
    python -m benchmarks.mesh --small                         # tiny sizes on any machine

FLUX.1-dev's sizes, random weights drawn alike on every rank, one image at a time. The engines are
processes on this machine, a GPU each where there are as many, without agents between them: what
is measured is the placement and the link alone. "predicted" is what `fluxmesh plan` computes from
one engine's step and the rate and latency of the group, both measured in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import groups, harness, peers
from benchmarks.harness import Result, Skipped, Stopwatch, emit, say, typical
from benchmarks.sizes import FULL, SMALL, Sizes

PLACEMENTS = ("tensor", "sequence", "data")
WHAT = ("one", *PLACEMENTS, "apple one", "apple")
REPEATS = 10  # collectives timed
GATHERED = 32 << 20  # bytes of each rank, to time the link


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", type=int, nargs="+", default=[2])
    parser.add_argument("--backend", nargs="+", choices=("ring", "nccl"), default=["ring"])
    parser.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT))
    parser.add_argument("--sizes", type=int, nargs="+", help="pixels a side; 1024 unless --small")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--bits", type=int, choices=(3, 4, 5, 6, 8))
    parser.add_argument("--steps", type=int, default=20, help="steps timed")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--images", type=int, default=8, help="images of `data`")
    parser.add_argument("--image-steps", type=int, default=4, help="steps of each of these")
    parser.add_argument("--apple", type=Path, help="folder of mlx-examples/flux")
    options = harness.options_of(parser, measure)
    say(f"{harness.machine()}\n")
    results: list[Result] = []
    for case in cases(options):
        env = {"MLX_ENABLE_TF32": "0"} if case["dtype"] == "float32" else {}
        with tempfile.TemporaryDirectory() as scratch:
            ranks = groups.environments(case["backend"], case["engines"], Path(scratch))
            envs = [{**env, **own} for own in ranks]
            for result in harness.results_of("benchmarks.mesh", case, envs, timeout=600):
                predict(result, results)
                results.append(result)
                say(line_of(result))
                harness.write_json(options.json, results)
    say("\n" + report(results))


def cases(options: argparse.Namespace) -> Iterator[Result]:
    """One engine first, which the others are compared with; then each group."""
    sizes = options.sizes or ([64] if options.small else [1024])
    common = {
        "dtype": options.dtype,
        "bits": options.bits,
        "sizes": sizes,
        "steps": options.steps,
        "warmup": options.warmup,
        "images": options.images,
        "image_steps": options.image_steps,
        "apple": str(options.apple) if options.apple else None,
        "small": options.small,
    }
    for what in options.what:
        if what in ("one", "apple one"):
            yield {"what": what, "engines": 1, "backend": "ring", **common}
    for backend in options.backend:
        for engines in options.engines:
            for what in options.what:
                if what in (*PLACEMENTS, "apple"):
                    yield {"what": what, "engines": engines, "backend": backend, **common}


# A rank


def measure(case: Result) -> None:
    """One process of the group: builds, joins, and runs what all ranks run."""
    import mlx.core as mx

    from benchmarks.placements import spread
    from fluxmesh.engine.replay import replayed
    from fluxmesh.models.collectives import Ranks

    if case["backend"] == "nccl" and not mx.cuda.is_available():
        raise Skipped("nccl needs NVIDIA GPUs")
    sizes = SMALL if case["small"] else FULL
    if case["engines"] > 1:
        group = mx.distributed.init(strict=True, backend=case["backend"])
    else:
        group = mx.distributed.init()
    ranks = Ranks(group)
    if case["what"].startswith("apple"):
        peer: Any = _apple(case, sizes, group)
    else:
        peer = peers.Fluxmesh(sizes.transformer, case["dtype"], case["bits"], low_memory=False)
        if case["what"] in ("tensor", "sequence"):
            peer.ranks = ranks
            # By tensor, the whole leaves memory.
            peer.flow = replayed(spread(case["what"], peer.flow, ranks), ranks)
    link = _link(ranks, small=case["small"])
    for size in case["sizes"]:
        if case["what"] in ("one", "data"):
            _images(peer, case, size, sizes, ranks)
        if case["what"] != "data":
            _steps(peer, case, size, sizes, ranks, link)


def _apple(case: Result, sizes: Sizes, group: Any) -> Any:
    import mlx.core as mx

    if case["apple"] is None:
        raise Skipped("--apple names no folder of mlx-examples/flux")
    peer = peers.Apple(sizes.transformer, case["dtype"], case["bits"], Path(case["apple"]))
    peer.pipeline.flow.shard(group)
    mx.eval(peer.pipeline.flow.parameters())
    return peer


def _link(ranks: Any, *, small: bool) -> dict[str, float]:
    """Bytes a second that a rank sends in a large gather, and seconds of a hop of a small sum."""
    import mlx.core as mx

    if ranks.size == 1:
        return {}
    large = mx.zeros((1, GATHERED >> (10 if small else 1)), dtype=mx.bfloat16)
    mx.eval(large)
    spent: dict[str, list[float]] = {"gather": [], "sum": []}
    for _ in range(REPEATS):
        watch = Stopwatch()
        mx.eval(ranks.gather(large))
        watch.tick()
        mx.eval(ranks.sum(mx.ones((1,))))
        watch.tick()
        spent["gather"].append(watch.times[0])
        spent["sum"].append(watch.times[1])
    hops = 2 * (ranks.size - 1)
    sent = (ranks.size - 1) * large.nbytes
    return {
        "rate": sent / statistics.median(spent["gather"][1:]),
        "latency": statistics.median(spent["sum"][1:]) / hops,
    }


def _steps(
    peer: Any, case: Result, size: int, sizes: Sizes, ranks: Any, link: dict[str, float]
) -> None:
    """Times steps of one image; the first rank tells, and its times are those of all."""
    peer.reset_peak()
    before = ranks.traffic.bytes
    watch = Stopwatch()
    steps = case["warmup"] + case["steps"] + 1  # the last one looks short
    first = peer.denoise(size, size, steps, sizes.text_tokens, watch.tick)
    emit(
        size=size,
        seconds=typical(watch.times[case["warmup"] : -1]),
        times=watch.times[:-1],
        sent_a_step=(ranks.traffic.bytes - before) / steps,
        peak=peer.peak(),
        sample=first.reshape(-1)[:1024].tolist(),
        software=peer.software(),
        **link,
    )


def _images(peer: Any, case: Result, size: int, sizes: Sizes, ranks: Any) -> None:
    """Times a request of several images, dealt out; the slowest rank's time is the request's."""
    import mlx.core as mx

    def paint() -> None:
        peer.denoise(size, size, case["image_steps"], sizes.text_tokens, lambda: None)

    paint()  # compiles its kernels
    ranks.agree(b"together")  # all begin at once
    watch = Stopwatch()
    for _ in range(ranks.rank, case["images"], ranks.size):
        paint()
    watch.tick()
    slowest = mx.max(ranks.gather(mx.array(watch.times))).item()
    emit(size=size, request=slowest, peak=peer.peak(), software=peer.software())


# What the planner would have said


def predict(result: Result, before: Sequence[Result]) -> None:
    """Adds `predicted` seconds a step (or a request of `data`), from one engine's measured ones."""
    same = [other for other in before if other.get("size") == result.get("size")]
    step = next((r["seconds"] for r in same if r["what"] == "one" and "seconds" in r), None)
    alone = next((r["request"] for r in same if r["what"] == "one" and "request" in r), None)
    if "request" in result and alone is not None:
        each = -(-result["images"] // result["engines"])
        result["predicted"] = alone / result["images"] * each
    elif "rate" in result and step is not None and result["what"] in PLACEMENTS:
        result["predicted"] = _planned_step(result, step)


def _planned_step(result: Result, step_seconds: float) -> float:
    from fluxmesh.cluster.snapshot import HostInfo, LinkInfo, MeshView, StepTiming
    from fluxmesh.models.base import ModelDefaults
    from fluxmesh.models.flux1.architecture import Flux1Architecture
    from fluxmesh.planning.candidates import Candidates
    from fluxmesh.planning.workload import ModelSizes, Workload
    from fluxmesh.request import GenerateRequest

    sizes = SMALL if result["small"] else FULL
    side, dtype, bits = result["size"], result["dtype"], result["bits"]
    defaults = ModelDefaults(4, peers.GUIDANCE, side, side, sizes.text_tokens)
    model = ModelSizes(
        Flux1Architecture(sizes.transformer, sizes.t5, sizes.clip, sizes.autoencoder, defaults)
    )
    request = GenerateRequest(
        "a cat", 0, model="m", height=side, width=side, dtype=dtype, bits=bits
    )
    timed = StepTiming(
        model="m", height=side, width=side, dtype=dtype, bits=bits, step_seconds=step_seconds
    )
    room = 1 << 50  # memory is not the question here
    ranks = range(result["engines"])
    hosts = [
        HostInfo(
            rank=rank,
            name=f"gpu{rank}",
            kind="",
            memory_bytes=room,
            free_bytes=room,
            flops_per_second=1e12,
            load_rate=1e9,
            measured=(timed,),
        )
        for rank in ranks
    ]
    links = [
        LinkInfo(source=a, target=b, rate=result["rate"], latency=result["latency"])
        for a in ranks
        for b in ranks
        if a != b
    ]
    view = MeshView(tuple(hosts), tuple(links), result["backend"])
    option = Candidates(Workload.of(model.fill(request), model), view).ring(
        result["what"], tuple(ranks), (0,)
    )
    return option.phases[0].step_seconds


# What is printed


def name_of(result: Result) -> str:
    bits = f", {result['bits']} bits" if result["bits"] else ""
    return result["what"] + bits


def line_of(result: Result) -> str:
    """One result as it comes."""
    where = f"{name_of(result)} on {result['engines']}"
    for problem in ("skipped", "failed"):
        if problem in result:
            return f"{where} ({result['backend']}): {problem}: {result[problem]}"
    where += f", {result['size']}²"
    if "request" in result:
        return f"{where}: {result['request']:.3f} s for {result['images']} images"
    return f"{where}: {1000 * result['seconds']:.2f} ms a step"


def report(results: list[Result]) -> str:
    measured = [result for result in results if "size" in result]
    header = ["what", "engines", "backend", "size", "ms a step", "predicted", "times one engine",
              "MB sent a step", "GB/s", "peak GB a host", "differs from one by"]  # fmt: skip
    steps = [step_row(result, measured) for result in measured if "seconds" in result]
    tables = [harness.table(header, steps)]
    requests = [result for result in measured if "request" in result]
    if requests:
        header = ["what", "engines", "size", "images", "s", "predicted", "times one engine"]
        tables.append(
            harness.table(header, [request_row(request, requests) for request in requests])
        )
    left_out = [line_of(result) for result in results if "size" not in result]
    return "\n\n".join([*tables, *left_out])


def step_row(result: Result, measured: list[Result]) -> list[str]:
    like = "apple one" if result["what"].startswith("apple") else "one"
    alone = _alone(like, "seconds", result, measured)
    is_group = result["engines"] > 1
    return [
        name_of(result),
        str(result["engines"]),
        result["backend"] if is_group else "",
        f"{result['size']}²",
        f"{1000 * result['seconds']:.2f}",
        f"{1000 * result['predicted']:.2f}" if "predicted" in result else "",
        f"{alone['seconds'] / result['seconds']:.2f}" if alone else "",
        f"{result['sent_a_step'] / 1e6:.2f}" if is_group and result["sent_a_step"] else "",
        f"{result['rate'] / 1e9:.2f}" if "rate" in result else "",
        f"{result['peak'] / 1e9:.2f}",
        harness.difference(result, alone) if is_group else "",
    ]


def request_row(result: Result, requests: list[Result]) -> list[str]:
    alone = _alone("one", "request", result, requests)
    return [
        name_of(result),
        str(result["engines"]),
        f"{result['size']}²",
        str(result["images"]),
        f"{result['request']:.3f}",
        f"{result['predicted']:.3f}" if "predicted" in result else "",
        f"{alone['request'] / result['request']:.2f}" if alone else "",
    ]


def _alone(what: str, kind: str, result: Result, measured: list[Result]) -> Result | None:
    matching = (
        r for r in measured if r["what"] == what and kind in r and r["size"] == result["size"]
    )
    return next(matching, None)


if __name__ == "__main__":
    main()
