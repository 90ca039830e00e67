"""Teaches the embedded checkpoint a thing that it has never seen, and scores it before and after.

    python tools/tiny/learn.py --work work                       # nine minutes of a core
    python tools/tiny/learn.py --work work --bits 4 --dtype float32 --loss-only    # QLoRA

`robot.py` draws five pictures of "a sks robot"; `fluxmesh train`, the command that a user has,
makes an adapter of them. Then 28 prompts ask for the robot on backgrounds that none of the five
has, half of them at places that none has, and `score.SceneReader` reads each picture back: of all
renderings of 91 things, the robot's must be the nearest. The loss is measured on drawings of the
same 28 scenes, at fixed time steps and noise. That the other things are still there is asked too.
Needs the font (README.md).
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import robot
from PIL import Image, ImageDraw
from scenes import questions
from score import SceneReader, table
from sprites import FONT, render_sprites

from fluxmesh.engine.pipeline import FluxPipeline
from fluxmesh.engine.stages import to_pixels
from fluxmesh.request import AdapterRef
from fluxmesh.training.compute.learner import Learner
from fluxmesh.training.data.dataset import load_dataset
from fluxmesh.training.data.encoding import Caption, Crop, DatasetEncoder
from fluxmesh.training.data.feature_cache import FeatureCache
from fluxmesh.training.plan import prepare
from fluxmesh.training.request import TrainRequest

SEED = 1
KNOWN = 12  # prompts about things that the checkpoint knew before
SETTINGS = {
    "iterations": 600,
    "grad-accumulate": 3,
    "learning-rate": 1.5e-3,
    "lora-rank": 16,
    "warmup-steps": 10,
    "timesteps": "schnell",  # a quarter at pure noise, where what is painted is decided by the text
    "num-augmentations": 1,  # a crop would move the robot from where its caption has it
    "checkpoint-every": 300,
    "seed": SEED,
}


HEADER = """\
| | robot | background | place | other things | held-out loss |
|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class Score:
    """How a model answers."""

    shares: dict[str, float]  # percent that are right, of the held-out prompts and of others
    loss: float  # on drawings of the held-out prompts
    pictures: list[np.ndarray]  # of the held-out prompts

    def row(self, name: str) -> str:
        cells = " | ".join(f"{share:.0f}%" for share in self.shares.values())
        return f"| {name} | {cells} | {self.loss:.4f} |"


@dataclass(frozen=True)
class Base:
    """The model that learns."""

    dtype: str = "bfloat16"
    bits: int | None = None

    @property
    def name(self) -> str:
        return self.dtype + (f"-{self.bits}-bits" if self.bits else "")


def paint(prompts: list[str], base: Base, adapter: Path | None) -> list[np.ndarray]:
    """A picture of each prompt, as `fluxmesh generate` makes it, from seeds 0, 1, ..."""
    adapters = (AdapterRef(str(adapter)),) if adapter else ()
    flux = FluxPipeline("tiny", dtype=base.dtype, bits=base.bits, adapters=adapters)
    size = (robot.PICTURE // 8, robot.PICTURE // 8)
    return [
        to_pixels(flux.generate_images(prompt, num_steps=4, latent_size=size, seed=seed))[0]
        for seed, prompt in enumerate(prompts)
    ]


def held_out_loss(dataset: Path, cache: Path, base: Base, adapter: Path | None) -> float:
    """The mean loss on a data set at fixed time steps and noise, as validation has it.

    Validation holds pictures out of a data set and leaves one at the least to train on: the first
    is there twice for that.
    """
    examples = load_dataset(str(dataset))
    examples = [examples[0], *examples]
    request = TrainRequest(
        str(dataset), SEED, dtype=base.dtype, bits=base.bits, timesteps="schnell",
        num_augmentations=1, lora_rank=1, validation=len(examples) - 1,
    )  # fmt: skip
    adapters = [str(adapter)] if adapter else []
    pipeline = FluxPipeline("tiny", dtype=base.dtype, bits=base.bits, adapters=adapters)
    plan = prepare(request, examples, pipeline.checkpoint)
    encoder = DatasetEncoder(pipeline, FeatureCache(cache), examples, plan.sizes, SEED)
    for unit in encoder.pending([*map(Caption, plan.captions), *(Crop(*i) for i in plan.crops)]):
        encoder.store(unit)
    # The learner's own LoRA, beside the adapter, begins at zero and stays there.
    return Learner(pipeline, encoder, plan).validate()


def scored(work: Path, sprites: np.ndarray, base: Base, adapter: Path | None) -> Score:
    reader = SceneReader(sprites, robot.PICTURE, robot.PICTURE)
    asked, known = robot.questions(), questions(KNOWN, SEED)
    pictures = paint([q.prompt for q in asked], base, adapter)
    verdicts = [reader.judge(*pair) for pair in zip(pictures, asked, strict=True)]
    others = paint([q.prompt for q in known], base, adapter)
    still = table([reader.judge(*pair) for pair in zip(others, known, strict=True)])
    shares = {
        "robot": 100 * sum(all(v.objects) for v in verdicts) / len(verdicts),
        "background": 100 * sum(v.background for v in verdicts) / len(verdicts),
        "place": 100 * sum(bool(v.place) for v in verdicts) / len(verdicts),
        "other things": still["object"],
    }
    loss = held_out_loss(work / "held-out", work / "cache", base, adapter)
    return Score(shares, loss, pictures)


def train(work: Path, out: Path, base: Base, settings: dict[str, object]) -> None:
    """Runs `fluxmesh train` and tells how long it took."""
    command = [sys.executable, "-m", "fluxmesh_coordinator", "train", str(work / "five")]
    command += ["--model", "tiny", "--output-dir", str(out), "--cache-dir", str(work / "cache")]
    command += ["--dtype", base.dtype]
    for name, value in settings.items():
        command += [f"--{name}", str(value)]
    if base.bits:
        command += ["--quantize", "--bits", str(base.bits)]
    print(" ".join(command[2:]), flush=True)
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"trained in {time.perf_counter() - began:.0f} s, {spent:.0f} s of a core")


def contact_sheet(work: Path, before: Score, after: Score) -> Image.Image:
    """What was shown; then every other held-out prompt, before and after."""
    side, margin, columns = robot.PICTURE, 18, 7
    shown = [np.asarray(Image.open(path)) for path in sorted((work / "five").glob("*.png"))]
    chosen = range(0, len(before.pictures), 2)
    rows: list[tuple[str, list[np.ndarray]]] = [("shown", shown)]
    for first in range(0, len(chosen), columns):
        part = chosen[first : first + columns]
        rows += [("before", [before.pictures[i] for i in part])]
        rows += [("after", [after.pictures[i] for i in part])]
    sheet = Image.new("RGB", (columns * side, len(rows) * (side + margin)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (name, pictures) in enumerate(rows):
        top = row * (side + margin)
        pen.text((4, top + 3), name, fill="black")
        for column, pixels in enumerate(pictures):
            sheet.paste(Image.fromarray(pixels), (column * side, top + margin))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="a folder for what is made")
    parser.add_argument("--bits", type=int, choices=(4, 8), help="quantize the model")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--adapter", type=Path, help="score this one instead of training")
    parser.add_argument("--iterations", type=int, default=SETTINGS["iterations"])
    parser.add_argument("--loss-only", action="store_true", help="paint nothing, which is slow")
    parser.add_argument("--sheet", type=Path, help="writes a contact sheet here")
    parser.add_argument("--font", type=Path, default=FONT)
    args = parser.parse_args()
    base = Base(args.dtype, args.bits)
    sprites = np.concatenate([render_sprites(args.font), robot.render_robot()[None]])
    for name, pairs in (("five", robot.shown()), ("held-out", robot.asked())):
        if not (args.work / name).is_dir():
            robot.write_dataset(args.work / name, pairs, sprites)
    adapter = args.adapter
    if adapter is None:
        out = args.work / base.name
        train(args.work, out, base, SETTINGS | {"iterations": args.iterations})
        adapter = out / "final_adapters.safetensors"
    if args.loss_only:
        places = (args.work / "held-out", args.work / "cache", base)
        before, after = (held_out_loss(*places, which) for which in (None, adapter))
        print(f"held-out loss {before:.4f} before, {after:.4f} after")
        return
    scores = [scored(args.work, sprites, base, which) for which in (None, adapter)]
    print(f"{HEADER}\n{scores[0].row('before')}\n{scores[1].row('after')}")
    if args.sheet:
        contact_sheet(args.work, *scores).save(args.sheet)


if __name__ == "__main__":
    main()
