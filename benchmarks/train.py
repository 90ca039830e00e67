"""How long is a step of LoRA training on FLUX.1-dev, and how much memory does it take?

    python -m benchmarks.train                              # 34 GB of disk or memory, a GPU, 5 min
    python -m benchmarks.train --apple mlx-examples/flux    # Apple's example from that folder too
    python -m benchmarks.train --small                      # tiny models, to try this program

One picture a step at 512x512, 512 tokens of text, rank 8 on every linear of the blocks, random
weights: the loss means nothing; time and memory are real. Four steps make an update, as by default,
and a step's seconds are a quarter of an update's; of Apple's example every step is timed, an update
with it. The first ones, in which kernels are compiled, are not counted. "same bytes" tells whether
the same micro-batch gives the same gradient twice; "device GB" is what the driver says is in use,
by all programs. With `--mlx-attention` the gradient of attention is MLX's own.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.folders import temporary, write_models
from benchmarks.harness import Result, Skipped, Stopwatch, emit, say
from benchmarks.sizes import FULL, SMALL
from fluxmesh.training.request import TrainRequest
from tests.datasets import make_dataset

VARIANTS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "bf16-checkpointed": {"grad_checkpoint": True},
    "8-bit-checkpointed": {"grad_checkpoint": True, "bits": 8},
    "4-bit-checkpointed": {"grad_checkpoint": True, "bits": 4},
}
WHAT = (*VARIANTS, "apple")
WARM_UP = 2  # updates that compile kernels
ACCUMULATED = 4  # steps of an update
RANK = 8  # of Apple's adapters; fluxmesh's default


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT))
    parser.add_argument("--steps", type=int, default=8, help="updates; steps of Apple's")
    parser.add_argument("--side", type=int, help="pixels a side; 512 unless --small")
    parser.add_argument("--mlx-attention", action="store_true", help="MLX's gradient of attention")
    parser.add_argument("--apple", type=Path, help="folder of mlx-examples/flux")
    parser.add_argument("--folder", type=Path, help="where the weights go for the time of the run")
    options = harness.options_of(parser, measure)
    side = options.side or (64 if options.small else 512)
    say(f"{harness.machine()}\n")
    folder = temporary("fluxmesh-train-", options.folder)
    results: list[Result] = []
    try:
        if set(options.what) - {"apple"}:
            start = time.perf_counter()
            written = write_models(folder, SMALL if options.small else FULL)
            say(f"wrote {written / 1e9:.1f} GB in {time.perf_counter() - start:.0f} s")
        make_dataset(folder / "data", sizes=((side, side),) * 3)
        for what in options.what:
            case = {
                "what": what,
                "side": side,
                "steps": options.steps,
                "folder": str(folder),
                "mlx_attention": options.mlx_attention,
                "apple": str(options.apple) if options.apple else None,
                "small": options.small,
            }
            for result in harness.results_of("benchmarks.train", case):
                results.append(result)
                say(line_of(result))
                harness.write_json(options.json, results)
    finally:
        shutil.rmtree(folder)
    say("\n" + report(results))


# A case


def measure(case: Result) -> None:
    """Trains one way."""
    if case["what"] == "apple":
        apple(case)
        return
    if case["mlx_attention"]:
        use_mlx_attention()
    ours(case)


def ours(case: Result) -> None:
    """Trains as `fluxmesh train` on one machine does, without its files."""
    import mlx.core as mx

    from fluxmesh.engine.stages import PipelineStages
    from fluxmesh.training.local_executor import LocalExecutor
    from fluxmesh.training.plan import prepare
    from fluxmesh.training.run import read_examples

    folder = Path(case["folder"])
    request = TrainRequest(
        dataset=str(folder / "data"),
        seed=1,
        model=str(folder / "dev"),
        resolution=(case["side"], case["side"]),
        num_augmentations=1,
        iterations=case["steps"] * ACCUMULATED,
        grad_accumulate=ACCUMULATED,
        warmup_steps=0,
        cache_dir=str(folder / "cache"),
        **VARIANTS[case["what"]],
    )
    start = time.perf_counter()
    pipeline = PipelineStages(request.model, dtype=request.dtype, bits=request.bits)
    plan = prepare(request, read_examples(request)[0], pipeline.checkpoint)
    executor = LocalExecutor(pipeline, plan)
    for _ in executor.encode():
        pass
    executor.open(0, {})
    before = mx.get_peak_memory()
    peaks = []
    watch = Stopwatch()
    for update in range(request.updates):
        moved = executor.advance(update)
        watch.tick()
        peaks.append(moved.peak_bytes)
        if moved.bad:
            raise SystemExit(f"The gradient of update {update + 1} is no number.")
    device = device_bytes()
    first_total, second_total = (executor.learner.total([0], 1) for _ in range(2))
    same = bool(mx.array_equal(first_total, second_total).item())
    times = [seconds / ACCUMULATED for seconds in watch.times]
    _tell(times, peaks, before, time.perf_counter() - start, device=device, same=same)


def apple(case: Result) -> None:
    """A step of mlx-examples: its own functions make the LoRAs and compute the loss.

    Compiled as a whole with the optimizer in it, as its `dreambooth.py` does.
    """
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim

    from benchmarks.peers import GUIDANCE, Apple

    if case["apple"] is None:
        raise Skipped("--apple names no folder of mlx-examples/flux")
    start = time.perf_counter()
    sizes = SMALL if case["small"] else FULL
    peer = Apple(sizes.transformer, "bfloat16", None, Path(case["apple"]))
    pipeline = peer.pipeline
    pipeline.name = "flux-dev"
    pipeline.flow.train()
    pipeline.flow.freeze()
    pipeline.linear_to_lora_layers(RANK)
    optimizer = optim.Adam(learning_rate=1e-4)
    mx.eval(pipeline.flow.parameters())
    before = mx.get_peak_memory()
    state = [pipeline.flow.state, optimizer.state, mx.random.state]

    @functools.partial(mx.compile, inputs=state, outputs=state)
    def step(x: mx.array, t5: mx.array, clip: mx.array, guidance: mx.array) -> mx.array:
        loss, grads = nn.value_and_grad(pipeline.flow, pipeline.training_loss)(
            x, t5, clip, guidance
        )
        optimizer.update(pipeline.flow, grads)
        return loss

    _, text, vector = peer.inputs(case["side"], case["side"], sizes.text_tokens)
    rows = case["side"] // 8
    latents = mx.random.normal((1, rows, rows, sizes.transformer.in_channels // 4))
    strength = mx.full((1,), GUIDANCE)
    batch = [x.astype(mx.bfloat16) for x in (latents, text, vector, strength)]
    mx.eval(batch)
    peaks = []
    watch = Stopwatch()
    for _ in range(case["steps"]):
        mx.reset_peak_memory()
        loss = step(*batch)
        mx.eval(loss, state)
        watch.tick()
        peaks.append(mx.get_peak_memory())
    if not mx.isfinite(loss).item():
        raise SystemExit("The loss of mlx-examples' step is no number.")
    _tell(watch.times, peaks, before, time.perf_counter() - start, device=device_bytes(), same=None)


def _tell(
    times: list[float],
    peaks: list[int],
    before: int,
    whole: float,
    *,
    device: int | None,
    same: bool | None,
) -> None:
    import mlx.core as mx

    emit(
        seconds=statistics.median(times[WARM_UP:] or times),
        times=times,
        peak=max(peaks),  # of a step
        whole_peak=max(before, *peaks),  # with loading and encoding
        device=device,
        first=times[0],
        whole=whole,
        same=same,
        software=f"MLX {mx.__version__}",
    )


def device_bytes() -> int | None:
    """What the driver says is in use on the first device, MLX's cache and context with it."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        return int(said.split()[0]) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def use_mlx_attention() -> None:
    """For comparison: the gradient of attention as MLX computes it."""
    from fluxmesh.models import layers
    from fluxmesh.training.compute import custom_gradients

    custom_gradients.attention = layers.attention


# What is printed


def line_of(result: Result) -> str:
    """One result as it comes."""
    for problem in ("skipped", "failed"):
        if problem in result:
            return f"{result['what']}: {problem}: {result[problem]}"
    return f"{result['what']}: {result['seconds']:.3f} s a step, {result['peak'] / 1e9:.2f} GB"


def report(results: list[Result]) -> str:
    measured = [result for result in results if "seconds" in result]
    apples = next((result["seconds"] for result in measured if result["what"] == "apple"), None)
    header = ["what", "s a step", "× Apple", "peak GB", "with loading GB", "device GB",
              "first step s", "all s", "same bytes", "software"]  # fmt: skip
    rows = [
        [
            result["what"],
            f"{result['seconds']:.3f}",
            f"{result['seconds'] / apples:.2f}" if apples else "",
            f"{result['peak'] / 1e9:.2f}",
            f"{result['whole_peak'] / 1e9:.2f}",
            "" if result["device"] is None else f"{result['device'] / 1e9:.2f}",
            f"{result['first']:.1f}",
            f"{result['whole']:.0f}",
            {None: "", True: "yes", False: "NO"}[result["same"]],
            result["software"],
        ]
        for result in measured
    ]
    left_out = [line_of(result) for result in results if "seconds" not in result]
    return "\n\n".join([harness.table(header, rows), *left_out])


if __name__ == "__main__":
    main()
