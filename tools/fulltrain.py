"""Trains a LoRA on FLUX at its full size with random weights; prints seconds and memory a step.

    python -m tools.fulltrain                 # about 34 GB of disk or memory, a GPU, 5 minutes
    python -m tools.fulltrain --small         # the same path on tiny models, for a CPU

One picture a step at 512x512, 512 tokens of text, rank 8 on every linear of the blocks: what
Apple's example takes 0.42 s and 50.6 GB for on one H200. The loss means nothing; time and memory
are real. The first steps, in which kernels are compiled, are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.folders import scratch, write_models
from benchmarks.sizes import FULL, SMALL
from fluxmesh.training.events import Updated
from fluxmesh.training.request import TrainRequest
from tests.datasets import make_dataset

VARIANTS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "bf16-checkpointed": {"grad_checkpoint": True},
    "8-bit-checkpointed": {"grad_checkpoint": True, "bits": 8},
    "4-bit-checkpointed": {"grad_checkpoint": True, "bits": 4},
}
WARM_UP = 3  # updates that compile kernels
HEADER = "| variant | step s | peak GB | first step s | all s |\n|---|---|---|---|---|"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="tiny models, to try this program")
    parser.add_argument("--steps", type=int, default=12, help="updates of one picture each")
    parser.add_argument("--side", type=int, help="pixels along each side of the picture")
    parser.add_argument("--folder", type=Path, help="where the weights go for the time of the run")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    options = parser.parse_args()
    side = options.side or (64 if options.small else 512)
    folder = Path(tempfile.mkdtemp(prefix="fluxmesh-fulltrain-", dir=options.folder or scratch()))
    try:
        start = time.perf_counter()
        written = write_models(folder, SMALL if options.small else FULL)
        print(f"wrote {written / 1e9:.1f} GB in {time.perf_counter() - start:.0f} s", flush=True)
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
            checkpoint_every=options.steps,
            cache_dir=str(folder / "cache"),
        )
        run_all(folder, request, options.variants)
    finally:
        shutil.rmtree(folder)


def run_all(folder: Path, request: TrainRequest, variants: list[str]) -> None:
    """One run a variant, one row each."""
    import mlx.core as mx

    from fluxmesh.training.trainer import train

    info = mx.device_info()
    size = "x".join(map(str, request.resolution or ()))
    print(f"\nMLX {mx.__version__} on {info.get('device_name', mx.default_device())}, {size}")
    print(HEADER, flush=True)
    for name in variants:
        changed = VARIANTS[name] | {"output_dir": str(folder / name)}
        start = time.perf_counter()
        events = train(dataclasses.replace(request, **changed))
        updates = [event for event in events if isinstance(event, Updated)]
        settled = updates[WARM_UP:] or updates
        print(
            f"| {name} | {statistics.median(event.seconds for event in settled):.3f} "
            f"| {max(event.peak_bytes for event in updates) / 1e9:.2f} "
            f"| {updates[0].seconds:.1f} | {time.perf_counter() - start:.0f} |",
            flush=True,
        )
        del events, updates, settled
        mx.clear_cache()


if __name__ == "__main__":
    main()
