"""Trains a LoRA on FLUX at its full size with random weights; prints memory and seconds a step.

    python -m tools.fulltrain                 # about 34 GB of disk or memory, a GPU, 4 minutes
    python -m tools.fulltrain --small         # the same path on tiny models, for a CPU

One picture a step at 512x512, 512 tokens of text, rank 8 on every linear of the blocks. The loss
means nothing; time and memory are real. The first steps, in which kernels are compiled, are left
out. "same bytes" tells whether the same micro-batch gives the same gradient twice; with
`--mlx-attention` the gradient of attention is MLX's own.

`--apple FOLDER` adds a row for mlx-examples' `flux/` in FOLDER, a clone that stays where it is.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.folders import scratch, write_models
from benchmarks.sizes import FULL, SMALL
from fluxmesh.training.request import TrainRequest
from tests.datasets import make_dataset

VARIANTS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "bf16-checkpointed": {"grad_checkpoint": True},
    "8-bit-checkpointed": {"grad_checkpoint": True, "bits": 8},
    "4-bit-checkpointed": {"grad_checkpoint": True, "bits": 4},
}
WARM_UP = 3  # updates that compile kernels
HEADER = """\
| variant | step s | peak GB | with loading GB | device GB | first step s | all s | same bytes |
|---|---|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class Row:
    """What a variant took; sizes in bytes."""

    variant: str
    step: float  # seconds, median
    peak: int  # of a step
    whole_peak: int  # with loading and encoding
    device: int | None  # in use on the device by all programs, as the driver says
    first: float  # seconds of the first step
    seconds: float  # of everything
    same: bool | None  # whether a gradient repeats to the byte
    steps: list[float]

    def __str__(self) -> str:
        device = "-" if self.device is None else f"{self.device / 1e9:.2f}"
        same = {None: "-", True: "yes", False: "NO"}[self.same]
        return (
            f"| {self.variant} | {self.step:.3f} | {self.peak / 1e9:.2f} "
            f"| {self.whole_peak / 1e9:.2f} | {device} | {self.first:.1f} "
            f"| {self.seconds:.0f} | {same} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="tiny models, to try this program")
    parser.add_argument("--steps", type=int, default=12, help="updates of one picture each")
    parser.add_argument("--side", type=int, help="pixels along each side of the picture")
    parser.add_argument("--folder", type=Path, help="where the weights go for the time of the run")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--mlx-attention", action="store_true", help="MLX's gradient of attention")
    parser.add_argument("--apple", type=Path, help="a folder with mlx-examples' flux/, to compare")
    parser.add_argument("--json", type=Path, help="a file for the rows, written after each")
    options = parser.parse_args()
    sizes = SMALL if options.small else FULL
    side = options.side or (64 if options.small else 512)
    folder = Path(tempfile.mkdtemp(prefix="fluxmesh-fulltrain-", dir=options.folder or scratch()))
    rows: list[Row] = []

    def tell(row: Row) -> None:
        rows.append(row)
        print(row, flush=True)
        if options.json:
            options.json.write_text(json.dumps([dataclasses.asdict(x) for x in rows], indent=1))

    try:
        if options.variants:
            start = time.perf_counter()
            written = write_models(folder, sizes)
            print(
                f"wrote {written / 1e9:.1f} GB in {time.perf_counter() - start:.0f} s", flush=True
            )
        if options.mlx_attention:
            use_mlx_attention()
        make_dataset(folder / "data", sizes=((side, side),) * 3)
        request = TrainRequest(
            dataset=str(folder / "data"),
            seed=1,
            model=str(folder / "dev"),
            resolution=(side, side),
            num_augmentations=1,
            iterations=options.steps,
            grad_accumulate=1,
            warmup_steps=0,
            cache_dir=str(folder / "cache"),
        )
        introduce(side)
        for name in options.variants:
            tell(measure(name, dataclasses.replace(request, **VARIANTS[name])))
        if options.apple:
            from tools.appletrain import measure_apple

            tell(Row(*measure_apple(options.apple, sizes.transformer, side, options.steps)))
    finally:
        shutil.rmtree(folder)


def introduce(side: int) -> None:
    import mlx.core as mx

    name = mx.device_info().get("device_name", mx.default_device())
    print(f"\nMLX {mx.__version__} on {name}, {side}x{side}\n{HEADER}", flush=True)


def measure(name: str, request: TrainRequest) -> Row:
    """Trains as `fluxmesh train` on one machine does, without its files."""
    import mlx.core as mx

    from fluxmesh.flux.pipeline import FluxPipeline
    from fluxmesh.training.plan import prepare
    from fluxmesh.training.run import read_examples
    from fluxmesh.training.trainer import Alone

    start = time.perf_counter()
    mx.reset_peak_memory()
    pipeline = FluxPipeline(request.model, dtype=request.dtype, bits=request.bits)
    plan = prepare(request, read_examples(request), pipeline.checkpoint)
    crew = Alone(pipeline, plan)
    for _ in crew.encode():
        pass
    crew.open(0, {})
    before = mx.get_peak_memory()
    steps, peaks = [], []
    for update in range(request.updates):
        began = time.perf_counter()
        moved = crew.advance(update)
        steps.append(time.perf_counter() - began)
        peaks.append(moved.peak_bytes)
        if moved.bad:
            raise SystemExit(f"{name}: the gradient of update {update + 1} is no number.")
    device = device_bytes()
    one, other = (crew.learner.total([0], 1) for _ in range(2))
    same = bool(mx.array_equal(one, other).item())
    row = Row(
        name,
        statistics.median(steps[WARM_UP:] or steps),
        max(peaks),
        max(before, *peaks),
        device,
        steps[0],
        time.perf_counter() - start,
        same,
        steps,
    )
    del one, other, crew, pipeline
    mx.clear_cache()
    return row


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
    from fluxmesh.flux import layers
    from fluxmesh.training import gradients

    gradients.attention = layers.attention


if __name__ == "__main__":
    main()
