"""How much memory does a picture take, phase by phase and host by host?

    python -m benchmarks.memory                # 34 GB of disk or memory, a GPU, 5 minutes
    python -m benchmarks.memory --what klein-4b klein-4b-4-bit    # FLUX.2: 14 GB
    python -m benchmarks.memory --small        # the same path on tiny models, for a CPU

FLUX.1 (or klein 4B) at full size with random weights, from files (`folders.py`): the text encoders
read a prompt, the transformer makes an image of 1024x1024, the autoencoder decodes it. One engine
behind an agent of its own, which is what `fluxmesh generate` starts where no mesh is up; or, with
`--engines`, several on this machine that hold a shard each (`tensor`). Peaks are MLX's own count,
each phase by itself; `load` is that of the transformer's loading. Beside them stand the seconds
that each phase took.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import groups, harness
from benchmarks.folders import temporary, write_klein, write_models
from benchmarks.harness import Result, Skipped, emit, say
from benchmarks.sizes import FULL, SMALL, Sizes
from fluxmesh.events import Encoded, Loading, Peak, Picture, Step
from fluxmesh.request import GenerateRequest

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dev": ("dev", {}),
    "schnell": ("schnell", {}),
    "dev-low-memory": ("dev", {"low_memory": True}),
    "dev-4-bit": ("dev", {"bits": 4}),
    "dev-4-bit-low-memory": ("dev", {"bits": 4, "low_memory": True}),
    "klein-4b": ("klein-4b", {}),
    "klein-4b-4-bit": ("klein-4b", {"bits": 4}),
}
FLUX1 = [variant for variant, (model, _) in VARIANTS.items() if model != "klein-4b"]
PHASES = ("text", "denoise", "decode")
PROMPT = "a photo of an astronaut riding a horse on the moon"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--what", nargs="+", choices=VARIANTS, default=FLUX1)
    parser.add_argument("--engines", type=int, nargs="*", default=[], help="shards to try: 2 4")
    parser.add_argument("--backend", choices=("ring", "nccl"), default="ring", help="of shards")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps of each image")
    parser.add_argument("--folder", type=Path, help="where the weights go for the time of the run")
    options = harness.options_of(parser, measure)
    say(f"{harness.machine()}\n")
    sizes = SMALL if options.small else FULL
    folder = temporary("fluxmesh-memory-", options.folder)
    results: list[Result] = []
    try:
        start = time.perf_counter()
        written = 0
        if set(options.what) & set(FLUX1):
            written += write_models(folder, sizes)
        if set(options.what) - set(FLUX1):
            written += write_klein(folder / "klein-4b", sizes)
        say(f"wrote {written / 1e9:.1f} GB in {time.perf_counter() - start:.0f} s")
        for variant in options.what:
            for engines in (1, *options.engines):
                case = {
                    "what": variant,
                    "engines": engines,
                    "backend": options.backend,
                    "folder": str(folder / VARIANTS[variant][0]),
                    "steps": options.steps,
                    "small": options.small,
                }
                with tempfile.TemporaryDirectory() as room:
                    envs = groups.environments(options.backend, engines, Path(room))
                    results += harness.results_of("benchmarks.memory", case, envs, timeout=600)
                say(f"{variant} on {engines}: {'done' if 'peaks' in results[-1] else results[-1]}")
                harness.write_json(options.json, results)
    finally:
        shutil.rmtree(folder)
    say("\n" + report(results))


# A case


def measure(case: Result) -> None:
    """One request: two images, of which the second finds every kernel compiled."""
    sizes = SMALL if case["small"] else FULL
    if case["engines"] == 1:
        emit(software=_software(), **alone(case, sizes))
    elif case["what"] in FLUX1:
        sharded(case, sizes)
    else:
        raise Skipped("klein's shards are not measured here")


def _software() -> str:
    import mlx.core as mx

    return f"MLX {mx.__version__}"


def alone(case: Result, sizes: Sizes) -> dict[str, Any]:
    """Seconds and peaks of a request on one engine; steps and decoding are the last image's."""
    from fluxmesh.wire.messages import Status
    from fluxmesh_coordinator.runtime.mesh import Mesh

    request = GenerateRequest(
        PROMPT,
        seed=7,
        model=case["folder"],
        n_images=2,
        height=sizes.height,
        width=sizes.width,
        steps=case["steps"],
        **VARIANTS[case["what"]][1],
    )
    seconds: dict[str, float] = {}
    peaks: dict[str, int] = {}
    steps: list[float] = []
    began = time.perf_counter()
    with Mesh.of_user(None) as mesh:
        for event in mesh.generate(request, keep_warm=False):
            match event:
                case Loading(component, 0):
                    began = time.perf_counter()
                case Loading(component):
                    seconds[f"load {component}"] = time.perf_counter() - began
                case Encoded(seconds=spent):
                    seconds["encode"] = spent
                case Step(step=step, seconds=spent):
                    steps = [*([] if step == 1 else steps), spent]
                case Picture(seconds=spent, pixels=pixels):
                    seconds["decode"] = spent - sum(steps)
                    if pixels.std() == 0:
                        raise SystemExit("The picture is of one colour: something did not compute.")
                case Peak(phase, size):
                    peaks[phase] = size
        status = mesh.status()[0]
    if not isinstance(status, Status):
        raise SystemExit(f"The agent does not say what it needed: {status}")
    seconds["step"] = statistics.median(steps)
    peaks["load"] = status.counters.load_peak_bytes
    return {"seconds": seconds, "peaks": [peaks]}


def sharded(case: Result, sizes: Sizes) -> None:
    """The same units that agents give to engines: each loads its shard, and all make the image."""
    import mlx.core as mx

    from fluxmesh.engine.worker import Worker
    from fluxmesh.models.collectives import Ranks

    if case["backend"] == "nccl" and not mx.cuda.is_available():
        raise Skipped("nccl needs NVIDIA GPUs")
    worker, ranks = Worker(), Ranks.join(case["backend"])
    worker.join(ranks)
    for work in _units(case, sizes, ranks.rank, ranks.size):
        for _ in worker.do(work):
            pass
    phase_peaks = worker.meter.peaks
    own = [
        phase_peaks.get("text", 0),
        phase_peaks["denoise"],
        phase_peaks["decode"],
        worker.done.load_peak_bytes,
    ]
    every = ranks.gather(mx.array([own], dtype=mx.int64)).tolist()
    peaks = [dict(zip((*PHASES, "load"), row, strict=True)) for row in every]
    emit(software=_software(), seconds={}, peaks=peaks)


def _units(case: Result, sizes: Sizes, rank: int, engines: int) -> Iterator[Any]:
    """The first engine reads the prompt too, and another prompt's features stand in for it."""
    import numpy as np

    from fluxmesh.cluster.snapshot import ModelVariant
    from fluxmesh.sampling.latents import initial_noise
    from fluxmesh.wire.messages import Decode, Encode, Load, Paint

    options = VARIANTS[case["what"]][1]
    weights = ModelVariant(case["folder"], bits=options.get("bits"))
    common: Any = {"fence": 0, "job": "job", "ring_generation": 0, "weights": weights}
    low_memory = options.get("low_memory", False)
    config = sizes.transformer
    text = np.ones((1, sizes.text_tokens, config.context_in_dim), dtype=np.float32)
    noise = initial_noise(7, sizes.height, sizes.width)
    if rank == 0:
        yield Encode(**common, prompt=PROMPT, stay=False)
    yield Load(
        **common,
        shards=engines,
        shard=rank,
        components=("transformer",),
        low_memory=low_memory,
    )
    common |= {"height": sizes.height, "width": sizes.width}
    vector = np.ones((1, config.vec_in_dim), dtype=np.float32)
    yield Paint(
        **common,
        placement="tensor",
        image=0,
        steps=case["steps"],
        first=0,
        guidance=4.0,
        low_memory=low_memory,
        preview=False,
        strength=1.0,
        latents=None,
        noise=noise,
        features={"t5": text, "clip": vector},
    )
    yield Decode(**common, images=(0,), latents=noise)


# What is printed


def report(results: list[Result]) -> str:
    measured = [result for result in results if "peaks" in result]
    header = ["model", "host", *(f"peak GB: {phase}" for phase in ("load", *PHASES)), "most"]
    peaks = [
        [
            result["what"],
            f"{host + 1} of {result['engines']}",
            *(f"{own[phase] / 1e9:.2f}" for phase in ("load", *PHASES)),
            f"{max(own.values()) / 1e9:.2f}",
        ]
        for result in measured
        for host, own in enumerate(result["peaks"])
    ]
    tables = [harness.table(header, peaks)]
    timed = [result for result in measured if result["seconds"]]
    kinds = ["load text encoders", "encode", "load transformer", "step", "load autoencoder"]
    kinds.append("decode")  # those that a family's runtime tells apart
    rows = [
        [result["what"], *(f"{result['seconds'][kind]:.3f}" for kind in kinds)] for result in timed
    ]
    tables.append(harness.table(["model", *(f"{kind} s" for kind in kinds)], rows))
    for result in results:
        for problem in ("skipped", "failed"):
            if problem in result:
                where = f"{result['what']} on {result['engines']}"
                tables.append(f"{where}: {problem}: {result[problem]}")
    return "\n\n".join(tables)


if __name__ == "__main__":
    main()
