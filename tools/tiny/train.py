"""Trains an embedded checkpoint: a small FLUX that paints emoji on plain backgrounds.

    python tools/tiny/train.py STAGE... --model tiny|tiny-klein --work W

    sprites      draws the glyphs (needs the font)
    tokenizers
    begin        goes on from a finished checkpoint, a copy in W/checkpoint; instead of the above
                 and the next
    autoencoder
    flow         text encoders and transformer
    last         the same, at every size and text length
    export       writes W/checkpoint, a diffusers folder
    look         scores held-out prompts and edits, writes contact sheets

Every stage is seeded, keeps its state in W and goes on from there when it is started again.
`--seconds` ends a sitting early: of all stages named, which then follow one another while there is
time. `--budget flow=900` is a stage's time over all sittings, by which its learning rate falls to
zero. README.md tells how long each took. Needs torch, diffusers, transformers, tokenizers and
Pillow; `tiny` sentencepiece too.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import data
import edits
import numpy as np
import scenes
import torch
from autoencoder import train_autoencoder
from blueprint import MODELS, load_blueprint
from flow import begin, export, train_flow
from look import look
from sprites import FONT, render_sprites


def make_sprites(args: argparse.Namespace) -> bool:
    """Once: where they are kept already, no font is needed."""
    if not (args.work / data.SPRITES).is_file():
        np.savez_compressed(args.work / data.SPRITES, sprites=render_sprites(args.font))
    return True


def make_tokenizers(args: argparse.Namespace) -> bool:
    rng = np.random.default_rng(args.seed)
    captions = [scenes.sample(rng)[1] for _ in range(100_000)]
    if args.blueprint.edits:
        captions += [edits.sample(rng, count).prompt for count in (1, 2) for _ in range(50_000)]
    args.blueprint.train_tokenizers(captions, args.work / "checkpoint")
    return True


Stage = Callable[[argparse.Namespace], bool]  # whether it is finished

STAGES: dict[str, tuple[Stage, int, int, float]] = {
    # stage: (function, steps, batch, peak learning rate)
    "sprites": (make_sprites, 0, 0, 0.0),
    "tokenizers": (make_tokenizers, 0, 0, 0.0),
    "begin": (begin, 0, 0, 0.0),
    "autoencoder": (train_autoencoder, 2_500, 64, 1e-3),
    "flow": (train_flow, 53_000, 256, 1e-3),
    "last": (train_flow, 1_700, 256, 2e-4),
    "export": (export, 0, 0, 0.0),
    "look": (look, 0, 0, 0.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains an embedded checkpoint of fluxmesh.")
    parser.add_argument("stages", nargs="+", choices=STAGES, metavar="STAGE")
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--work", type=Path, required=True, help="folder of all state")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="in all, over every sitting")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rate", type=float, help="peak learning rate")
    parser.add_argument("--pool", type=int, default=300_000, help="examples drawn a sitting")
    parser.add_argument("--seconds", type=float, default=1e9, help="ends this sitting after")
    parser.add_argument(
        "--budget",
        default="",
        metavar="STAGE=SECONDS,...",
        help="stages' seconds in all, over every sitting",
    )
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--log-every", type=int, default=500)
    parser.add_argument("--font", type=Path, default=FONT)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument(
        "--graphs",
        action=argparse.BooleanOptionalAction,
        default=torch.cuda.is_available(),
        help="one CUDA graph a shape",
    )
    args = parser.parse_args()
    args.blueprint = load_blueprint(args.model)
    args.work.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.seconds
    pairs = (text.partition("=") for text in args.budget.split(",") if text)
    budgets = {stage: float(seconds) for stage, _, seconds in pairs}
    for stage in args.stages:
        run, steps, batch, rate = STAGES[stage]
        steps, rate = args.blueprint.plans.get(stage, (steps, rate))
        given = argparse.Namespace(**vars(args))
        given.stage, given.seconds = stage, end - time.monotonic()
        given.steps, given.batch = args.steps or steps, args.batch or batch
        given.rate = args.rate or rate
        given.budget = budgets.get(stage, math.inf)
        if not run(given):
            print(f"{stage} is not finished; the same command goes on with it", flush=True)
            break


if __name__ == "__main__":
    main()
