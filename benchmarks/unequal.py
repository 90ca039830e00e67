"""What do shares by measured speed save where one host is slower than the others?

    python -m benchmarks.unequal                 # two ranks on this machine, one at half speed
    python -m benchmarks.unequal --ranks 3 --slow 0.4
    python -m benchmarks.unequal --small         # tiny sizes, to try this program

Ranks of a ring on loopback, each on a processor of its own where there are as many, one thread
each. The last one is slowed to `--slow`: a process beside it stops it and lets it go on
(SIGSTOP, SIGCONT) in turns of some milliseconds, so that all that it computes takes so much
longer, as on a slower processor. Each rank times a step alone, then all make steps together: with
equal shares, and with those that the planner chooses from what was timed.

"ideal" is a step in which all would finish together and nothing were left over or sent: the
reciprocal of the sum of the ranks' speeds. "compute" is the same by the processor's seconds of each
rank, of the slowed one as many times longer, with collectives that send nothing: it counts neither
what others on the machine take nor waits for the ring, and is what to look at where the machine
isn't quiet.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import groups, harness, peers
from benchmarks.harness import Result, emit, say
from benchmarks.sizes import SMALL, Sizes
from fluxmesh.models.flux1.config import FluxConfig

PLACEMENTS = ("sequence", "tensor")
MIDDLE = Sizes(
    FluxConfig(
        hidden_size=384,
        num_heads=6,
        depth=1,
        depth_single_blocks=2,
        context_in_dim=512,  # in FLUX's proportion: the way in of the text is not split
        axes_dim=(8, 28, 28),
        guidance_embed=True,
    ),
    text_tokens=64,
    height=256,
    width=256,
)
TURN = 0.004  # seconds that a slowed rank runs before it is stopped
BRAKE = """\
import os, signal, sys, time
rank, turn, slow = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
while os.getppid() == rank:
    begun = time.monotonic()
    time.sleep(turn)
    ran = time.monotonic() - begun  # longer, where this process itself had to wait
    os.kill(rank, signal.SIGSTOP)
    time.sleep(ran * (1 / slow - 1))
    os.kill(rank, signal.SIGCONT)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--placements", nargs="+", choices=PLACEMENTS, default=PLACEMENTS)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--slow", type=float, default=0.5, help="speed of the last one")
    parser.add_argument("--steps", type=int, default=5, help="steps timed, after one that is not")
    options = harness.options_of(parser, measure, "a tiny model")
    say(f"{harness.machine()}\n")
    results: list[Result] = []
    for placement in options.placements:
        case = {
            "placement": placement,
            "ranks": options.ranks,
            "slow": options.slow,
            "steps": options.steps,
            "small": options.small,
        }
        with tempfile.TemporaryDirectory() as scratch:
            envs = groups.environments("ring", options.ranks, Path(scratch))
            alone = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            envs = [{**env, **alone} for env in envs]
            for result in harness.results_of("benchmarks.unequal", case, envs, timeout=900):
                results.append(result)
                harness.write_json(options.json, results)
    say(report(results))


# A rank


def measure(case: Result) -> None:
    """One rank: steps alone, with equal shares, and with those that the planner chooses."""
    import mlx.core as mx

    from benchmarks.placements import LoneRank, spread
    from fluxmesh.cluster.shares import EVEN
    from fluxmesh.models.collectives import Ranks

    ranks = Ranks.join("ring")
    sizes = SMALL if case["small"] else MIDDLE
    bind = getattr(os, "sched_setaffinity", None)  # a Mac has none
    if bind is not None:
        bind(0, {ranks.rank % (os.cpu_count() or 1)})
    is_slow = ranks.rank == ranks.size - 1
    slower = 1 / case["slow"] if is_slow else 1.0

    def every(value: float) -> list[float]:
        """All ranks' values."""
        values: list[float] = ranks.gather(mx.array([value], dtype=mx.float32)).tolist()
        return values

    with braked(case["slow"]) if is_slow else contextlib.nullcontext():
        peer = peers.Fluxmesh(sizes.transformer, "float32", None, low_memory=False)
        whole = peer.flow
        alone, busy = timed(peer, sizes, case["steps"])
        own = {"alone": every(alone), "alone_compute": every(busy * slower)}
        lone = LoneRank(ranks.rank, ranks.size)
        chosen, predicted = planned(case["placement"], sizes, own["alone"])
        for name, shares in (("equal", EVEN), ("chosen", chosen)):
            peer.flow, peer.ranks = spread(case["placement"], whole, lone, shares), None
            _, busy = timed(peer, sizes, case["steps"])
            compute = every(busy * slower)
            peer.flow, peer.ranks = spread(case["placement"], whole, ranks, shares), ranks
            seconds, _ = timed(peer, sizes, case["steps"])
            peer.flow, peer.ranks = whole, None
            units = shares.tokens or shares.heads
            how = {"name": name, "shares": units, "columns": shares.columns, **own}
            emit(**how, seconds=seconds, compute=compute, predicted=predicted[name])


def timed(peer: peers.Fluxmesh, sizes: Sizes, steps: int) -> tuple[float, float]:
    """Seconds of a step, and of them those of the processor in this process: medians."""
    begun = [(time.perf_counter(), time.process_time())]

    def tick() -> None:
        begun.append((time.perf_counter(), time.process_time()))

    peer.denoise(sizes.height, sizes.width, steps + 1, sizes.text_tokens, tick)
    spent = [
        (after[0] - before[0], after[1] - before[1])
        for before, after in zip(begun[1:], begun[2:], strict=False)
    ]
    return statistics.median(s for s, _ in spent), statistics.median(busy for _, busy in spent)


@contextlib.contextmanager
def braked(slow: float) -> Iterator[None]:
    """This process computes for `slow` of the time, and stands still in between."""
    words = [str(os.getpid()), str(TURN), str(slow)]
    brake = subprocess.Popen([sys.executable, "-c", BRAKE, *words])
    try:
        yield
    finally:
        brake.kill()
        brake.wait()


def planned(placement: Any, sizes: Sizes, alone: Sequence[float]) -> tuple[Any, dict[str, float]]:
    """The shares that a plan gives hosts which take so long alone, and its steps by both."""
    from fluxmesh.cluster.snapshot import HostInfo, LinkInfo, MeshView, StepTiming
    from fluxmesh.models.base import ModelDefaults
    from fluxmesh.models.flux1.architecture import Flux1Architecture
    from fluxmesh.planning.candidates import Candidates
    from fluxmesh.planning.workload import ModelSizes, Workload
    from fluxmesh.request import GenerateRequest

    defaults = ModelDefaults(
        steps=4,
        guidance=3.5,
        height=sizes.height,
        width=sizes.width,
        t5_max_length=sizes.text_tokens,
    )
    parts = (sizes.transformer, sizes.t5, sizes.clip, sizes.autoencoder, defaults)
    model = ModelSizes(Flux1Architecture(*parts))
    request = GenerateRequest(prompt="", seed=0, model="random", dtype="float32")
    work = Workload.of(model.fill(request), model)
    step = StepTiming(
        model="random",
        height=sizes.height,
        width=sizes.width,
        dtype="float32",
        bits=None,
        step_seconds=1.0,
    )
    hosts = tuple(
        HostInfo(
            rank=rank,
            name=f"rank{rank}",
            kind="a processor",
            memory_bytes=1 << 40,
            free_bytes=1 << 40,
            flops_per_second=1e9,
            load_rate=1e9,
            measured=(replace(step, step_seconds=seconds),),
        )
        for rank, seconds in enumerate(alone)
    )
    ranks = range(len(hosts))
    links = tuple(
        LinkInfo(source=a, target=b, rate=1e9, latency=1e-4) for a in ranks for b in ranks if a != b
    )
    phase = Candidates(work, MeshView(hosts, links)).ring(placement, tuple(ranks), [0]).phases[0]
    even = phase.step_seconds if phase.even_seconds is None else phase.even_seconds
    return phase.shares, {"equal": even, "chosen": phase.step_seconds}


# The report


def ideal(alone: Sequence[float]) -> float:
    """Seconds of a step in which the ranks' speeds add up."""
    return 1 / sum(1 / seconds for seconds in alone)


def report(results: Sequence[Result]) -> str:
    """A row for each placement and way to share."""
    header = ("placement", "shares", "alone", "a step", "predicted", "× ideal", "compute × ideal")
    rows = []
    for result in results:
        if "seconds" not in result:
            reason = result.get("skipped") or result.get("failed")
            rows.append([result["placement"], str(reason), *[""] * 5])
            continue
        rows.append(
            [
                result["placement"],
                ":".join(map(str, result["shares"])) or "equal",
                " ".join(f"{seconds:.3f}" for seconds in result["alone"]),
                f"{result['seconds']:.3f} s",
                f"{result['predicted']:.3f} s",
                f"{result['seconds'] / ideal(result['alone']):.2f}",
                f"{max(result['compute']) / ideal(result['alone_compute']):.2f}",
            ]
        )
    return harness.table(header, rows)


if __name__ == "__main__":
    main()
