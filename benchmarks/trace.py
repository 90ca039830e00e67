"""Where does a step's time go: kernels, the pauses between them, the host that describes them?

    python -m benchmarks.trace                          # FLUX.1 dev at 1024², one GPU
    python -m benchmarks.trace --engines 2              # `sequence` on two GPUs: what rank 0 does
    python -m benchmarks.trace --model klein-4b --size 512 --bits 8
    python -m benchmarks.trace --small                  # tiny sizes; without a GPU the host alone

Random weights, one image. Kernels are PyTorch's profiler's, which sees all that a process runs on
its GPU, also the nodes of CUDA graphs: it needs a PyTorch of the same CUDA as MLX. Steps are traced
after the fourth, and take a little longer so. "busy" is the time in which at least one kernel
ran, in a ring also one that waits for the other ranks; several may run at once. The host's own time
is that of steps of 64², where a large GPU has nearly nothing to do: described in Python, then
handed to MLX.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import groups, harness
from benchmarks.harness import Result, Skipped, emit, say
from benchmarks.sizes import FULL, SMALL, SMALL_TRANSFORMERS, TRANSFORMERS
from fluxmesh.models.flux2.config import Flux2Config

KINDS = ("kernel", "gpu_memcpy", "gpu_memset")  # as the profiler names what a GPU does
LONG_PAUSE = 20.0  # µs: longer ones are told one by one
STEPS, WARM_UP = 10, 4
HOST_SIDE = 64  # pixels


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=TRANSFORMERS, default="dev")
    parser.add_argument("--size", type=int, help="pixels a side; 1024 unless --small")
    parser.add_argument("--bits", type=int, choices=(3, 4, 5, 6, 8), help="of quantized weights")
    parser.add_argument("--engines", type=int, default=1, help="ranks of `--placement`")
    parser.add_argument("--placement", choices=("sequence", "tensor"), default="sequence")
    parser.add_argument("--backend", choices=("ring", "nccl"), default="nccl")
    parser.add_argument("--top", type=int, default=20, help="kinds of kernel that are listed")
    options = harness.options_of(parser, measure)
    say(f"{harness.machine()}\n")
    case = {
        name: getattr(options, name)
        for name in ("model", "bits", "engines", "placement", "backend", "small")
    }
    case["size"] = options.size or (64 if options.small else 1024)
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        envs: list[dict[str, str]] = [{}]
        if options.engines > 1:
            envs = groups.environments(options.backend, options.engines, Path(scratch))
        for result in harness.results_of("benchmarks.trace", case, envs):
            results.append(result)
            say(told(result, options.top) + "\n")
            harness.write_json(options.json, results)


def measure(case: Result) -> None:
    """Tells the host's time, and then where a GPU's goes."""
    import mlx.core as mx

    from benchmarks import flux2_peers, peers
    from benchmarks.placements import spread
    from fluxmesh.engine.replay import replayed
    from fluxmesh.models.collectives import Ranks

    transformers, sizes = (SMALL_TRANSFORMERS, SMALL) if case["small"] else (TRANSFORMERS, FULL)
    config, dtype = transformers[case["model"]], "float32" if case["small"] else "bfloat16"
    ours = flux2_peers.FluxmeshKlein if isinstance(config, Flux2Config) else peers.Fluxmesh
    peer: Any = ours(config, dtype, case["bits"], low_memory=False)
    if case["engines"] > 1:
        group = mx.distributed.init(strict=True, backend=case["backend"])
        peer.ranks = Ranks(group)
        peer.flow = replayed(spread(case["placement"], peer.flow, peer.ranks), peer.ranks)
    _host(peer)
    size, text_tokens = case["size"], sizes.text_tokens
    if not mx.cuda.is_available():
        raise Skipped("kernels are traced on NVIDIA GPUs")
    from torch.profiler import ProfilerActivity, profile

    profiled, done = profile(activities=[ProfilerActivity.CUDA]), itertools.count(1)

    def tick() -> None:
        if next(done) == WARM_UP:
            profiled.start()

    peer.denoise(size, size, WARM_UP + STEPS, text_tokens, tick)
    profiled.stop()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    emit(**summary(events, STEPS))


def _host(peer: Any) -> None:
    """Seconds of a step in which the device has little to do: described, and handed over."""
    import mlx.core as mx

    from fluxmesh.sampling.denoise import denoise

    noise, made = peer.planned(HOST_SIDE, HOST_SIDE, STEPS + WARM_UP, 16)
    made = made.prepared(peer.flow)
    mx.eval(*made.arrays)
    walk, rows = denoise(peer.flow, made, noise), []
    for _ in range(STEPS + WARM_UP):
        begun = time.perf_counter()
        step = next(walk)
        described = time.perf_counter()
        mx.async_eval(step.x)
        handed = time.perf_counter()
        mx.eval(step.x)
        rows.append((described - begun, handed - described))
    described, handed = (statistics.median(times) for times in zip(*rows[WARM_UP:], strict=True))
    emit(described=described, handed=handed)


def summary(events: Sequence[Any], steps: int) -> Result:
    """Of a trace in Chrome's format, in seconds: how long the GPU was busy, and its pauses.

    `kernels` are (name, times, seconds) of all steps, the longest in all first; `long_pauses`
    (seconds, the kernel before, the kernel after), longest first.
    """
    ran = sorted(
        (event for event in events if event.get("ph") == "X" and event.get("cat") in KINDS),
        key=lambda event: event["ts"],
    )
    if not ran:
        raise Skipped("the profiler saw no kernel; its CUDA is perhaps another one than MLX's")
    counts: collections.Counter[str] = collections.Counter()
    seconds: collections.Counter[str] = collections.Counter()
    end, busy, short = ran[0]["ts"], 0.0, 0.0
    long_pauses = []
    before = ""
    for event in ran:
        name, begins, ends = event["name"], event["ts"], event["ts"] + event["dur"]
        counts[name] += 1
        seconds[name] += event["dur"] / 1e6
        pause = begins - end
        if pause > LONG_PAUSE:
            long_pauses.append((pause / 1e6, before, name))
        elif pause > 0:
            short += pause / 1e6
        busy += max(0.0, ends - max(begins, end)) / 1e6
        if ends > end:
            end, before = ends, name
    return {
        "steps": steps,
        "whole": (end - ran[0]["ts"]) / 1e6,
        "busy": busy,
        "short_pauses": short,
        "long_pauses": sorted(long_pauses, reverse=True),
        "kernels": [(name, counts[name], total) for name, total in seconds.most_common()],
    }


def told(result: Result, top: int) -> str:
    """A result in words and a table."""
    for problem in ("skipped", "failed"):
        if problem in result:
            return f"{problem}: {result[problem]}"
    if "described" in result:
        described, handed = 1000 * result["described"], 1000 * result["handed"]
        return f"The host, ms a step: described in {described:.1f}, handed to MLX in {handed:.1f}"
    steps = result["steps"]

    def each(seconds: float) -> str:
        return f"{1000 * seconds / steps:.2f}"

    pauses = result["long_pauses"]
    lines = [
        f"The GPU, ms a step: {each(result['whole'])} in all, busy {each(result['busy'])}, pauses "
        f"of up to {LONG_PAUSE:.0f} µs {each(result['short_pauses'])}, longer ones "
        f"{each(sum(pause for pause, *_ in pauses))}",
        "",
        harness.table(
            ["kernel", "times a step", "µs", "ms a step"],
            [
                [name[:90], f"{count / steps:.1f}", f"{1e6 * total / count:.1f}", each(total)]
                for name, count, total in result["kernels"][:top]
            ],
        ),
    ]
    if pauses:
        rows = [[f"{1000 * pause:.2f}", a[:60], b[:60]] for pause, a, b in pauses[:top]]
        lines += ["", harness.table(["pause, ms", "after", "before"], rows)]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
