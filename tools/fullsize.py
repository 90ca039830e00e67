"""Runs FLUX at its full size with random weights, and prints seconds and peak memory by phase.

    python -m tools.fullsize                  # about 34 GB of disk or memory, a GPU, 4 minutes
    python -m tools.fullsize --small          # the same path on tiny models, for a CPU

The 12 B transformer (shaped as dev and as schnell), T5-XXL, CLIP-L and the autoencoder are written
once as diffusers folders in bfloat16, with tokenizers made on the spot; then `Runner`, which the
command line uses too, makes pictures from them. The pictures are noise: only time and memory are
real. It needs fluxmesh's own dependencies and nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fluxmesh.events import Encoded, Event, Loading, Peak, Picture, Step
from fluxmesh.flux import layouts
from fluxmesh.flux.config import (
    AutoencoderConfig,
    ClipConfig,
    FluxConfig,
    ScheduleConfig,
    T5Config,
)
from fluxmesh.request import GenerateRequest
from tests import checkpoints
from tools.randomfile import RandomValues, write_random

WEIGHTS = "diffusion_pytorch_model.safetensors"
GUIDANCE = "time_text_embed.guidance_embedder"  # what dev has and schnell lacks


@dataclass(frozen=True)
class Sizes:
    """All sizes of a run."""

    transformer: FluxConfig = FluxConfig(guidance_embed=True)
    t5: T5Config = T5Config()
    clip: ClipConfig = ClipConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    height: int = 1024
    width: int = 1024


SMALL = Sizes(
    dataclasses.replace(checkpoints.TRANSFORMER, guidance_embed=True),
    checkpoints.T5,
    dataclasses.replace(checkpoints.CLIP, vocab_size=1024),
    checkpoints.AUTOENCODER,
    height=64,
    width=64,
)


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dev": ("dev", {}),
    "schnell": ("schnell", {}),
    "dev-low-memory": ("dev", {"low_memory": True}),
    "dev-4-bit": ("dev", {"bits": 4}),
}
PHASES = ("text", "denoise", "decode")
HEADER = """\
| model | load text s | encode s | load transformer s | step s | decode s \
| peak GB: text | denoise | decode | all s |
|---|---|---|---|---|---|---|---|---|---|"""


@dataclass
class Measured:
    """What one request took."""

    loading: dict[str, float] = field(default_factory=dict)  # seconds, by component
    encode: float = 0.0  # seconds
    steps: list[float] = field(default_factory=list)  # seconds
    decode: float = 0.0  # seconds
    peaks: dict[str, int] = field(default_factory=dict)  # bytes, by phase


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="tiny models, to try this program")
    parser.add_argument("--steps", type=int, default=6, help="denoising steps of each image")
    parser.add_argument("--folder", type=Path, help="where the weights go for the time of the run")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS)[:3])
    options = parser.parse_args()
    sizes = SMALL if options.small else Sizes()
    folder = Path(tempfile.mkdtemp(prefix="fluxmesh-fullsize-", dir=options.folder or scratch()))
    try:
        start = time.perf_counter()
        written = write_models(folder, sizes)
        print(f"wrote {written / 1e9:.1f} GB in {time.perf_counter() - start:.0f} s", flush=True)
        run_all(folder, sizes, options.steps, options.variants)
    finally:
        shutil.rmtree(folder)


def scratch() -> str | None:
    """Memory is the fastest disk, where it is large enough; else the usual temporary folder."""
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).free > 40e9:
        return str(shared)
    return None


def write_models(folder: Path, sizes: Sizes) -> int:
    """Writes `folder/dev`, and `folder/schnell` that shares its weights; returns the bytes."""
    dev, schnell = folder / "dev", folder / "schnell"
    vocabulary = checkpoints.clip_vocabulary()
    clip = dataclasses.replace(sizes.clip, eos_token_id=vocabulary["<|endoftext|>"])
    write_configs(dev, sizes.transformer, clip, sizes, t5_max_length=512)
    plain = dataclasses.replace(sizes.transformer, guidance_embed=False)
    write_configs(schnell, plain, clip, sizes, t5_max_length=256)

    values = RandomValues()
    transformer = file_shapes(layouts.transformer_tensors(sizes.transformer))
    rest = [name for name in transformer if not name.startswith(GUIDANCE)]
    shards = [rest[i::3] for i in range(3)]
    shards.append([name for name in transformer if name.startswith(GUIDANCE)])
    written = 0
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, start=1):
        file = WEIGHTS.replace(".safetensors", f"-{i:05}-of-{len(shards):05}.safetensors")
        shapes = {name: transformer[name] for name in names}
        written += write_random(dev / "transformer" / file, shapes, values)
        weight_map |= dict.fromkeys(names, file)
    write_index(dev, weight_map)
    write_index(schnell, {name: weight_map[name] for name in rest})
    for file in {weight_map[name] for name in rest}:
        share(dev, schnell, f"transformer/{file}")
    parts = {
        "text_encoder": layouts.clip_tensors(clip),
        "text_encoder_2": layouts.t5_tensors(sizes.t5),
        "vae": layouts.autoencoder_tensors(sizes.autoencoder),
    }
    for part, tensors in parts.items():
        file = f"{part}/{WEIGHTS if part == 'vae' else 'model.safetensors'}"
        shapes = file_shapes(tensors)
        if part != "vae":
            shapes = {name: target.shape for name, target in tensors.items()}
        written += write_random(dev / file, shapes, values)
        share(dev, schnell, file)
    return written


def file_shapes(tensors: layouts.Tensors) -> dict[str, tuple[int, ...]]:
    """The tensors that a diffusers file holds, and their shapes."""
    shapes = {}
    for key, rows in layouts.to_diffusers(tensors).items():
        rest = tensors[rows[0].key].shape[1:]
        if ".attentions.0.to_" in key:  # 1x1 convolutions here, linears there
            rest = rest[:1]
        shapes[key] = (sum(row.count for row in rows), *rest)
    return shapes


def write_configs(
    folder: Path, transformer: FluxConfig, clip: ClipConfig, sizes: Sizes, t5_max_length: int
) -> None:
    schedule = ScheduleConfig(use_dynamic_shifting=transformer.guidance_embed)
    files = {
        "model_index.json": checkpoints.MODEL_INDEX,
        "transformer/config.json": checkpoints.transformer_config_json(transformer),
        "text_encoder/config.json": checkpoints.clip_config_json(clip),
        "text_encoder_2/config.json": checkpoints.t5_config_json(sizes.t5),
        "vae/config.json": checkpoints.autoencoder_config_json(sizes.autoencoder),
        "scheduler/scheduler_config.json": dataclasses.asdict(schedule),
    }
    for name, content in files.items():
        checkpoints.write_json(folder / name, content)
    checkpoints.write_tokenizers(folder, t5_max_length, clip.max_position_embeddings)


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    index = {"metadata": {}, "weight_map": weight_map}
    checkpoints.write_json(folder / "transformer" / f"{WEIGHTS}.index.json", index)


def share(dev: Path, schnell: Path, file: str) -> None:
    """The same bytes under a second name."""
    (schnell / file).parent.mkdir(parents=True, exist_ok=True)
    os.link(dev / file, schnell / file)


def run_all(folder: Path, sizes: Sizes, steps: int, variants: list[str]) -> None:
    """One request a variant; two images, of which the second finds every kernel compiled."""
    import mlx.core as mx

    from fluxmesh.flux.runner import Runner

    prompt = "a photo of an astronaut riding a horse on the moon"
    info = mx.device_info()
    print(f"\nMLX {mx.__version__} on {info.get('device_name', mx.default_device())}, ", end="")
    print(f"{sizes.height}x{sizes.width}, {steps} steps\n{HEADER}", flush=True)
    for name in variants:
        model, options = VARIANTS[name]
        request = GenerateRequest(
            prompt,
            seed=7,
            model=str(folder / model),
            n_images=2,
            height=sizes.height,
            width=sizes.width,
            steps=steps,
            **options,
        )
        start = time.perf_counter()
        measured = measure(Runner().run(request))
        print(row(name, measured, time.perf_counter() - start), flush=True)


def measure(events: Iterator[Event]) -> Measured:
    """Follows a job to its end; seconds of steps and decoding are those of its last image."""
    measured = Measured()
    began = 0.0
    for event in events:
        match event:
            case Loading(component, 0, _):
                began = time.perf_counter()
            case Loading(component, _, _):
                measured.loading[component] = time.perf_counter() - began
            case Encoded(seconds=seconds):
                measured.encode = seconds
            case Step(step=step, seconds=seconds):
                measured.steps = [*([] if step == 1 else measured.steps), seconds]
            case Picture(seconds=seconds, pixels=pixels):
                measured.decode = seconds - sum(measured.steps)
                if pixels.std() == 0:
                    raise SystemExit("The picture is of one colour: something did not compute.")
            case Peak(phase, size):
                measured.peaks[phase] = size
    return measured


def row(name: str, measured: Measured, seconds: float) -> str:
    peaks = " | ".join(f"{measured.peaks[phase] / 1e9:.2f}" for phase in PHASES)
    return (
        f"| {name} | {measured.loading['text encoders']:.1f} | {measured.encode:.2f} "
        f"| {measured.loading['transformer']:.1f} | {statistics.median(measured.steps):.3f} "
        f"| {measured.decode:.3f} | {peaks} | {seconds:.0f} |"
    )


if __name__ == "__main__":
    main()
