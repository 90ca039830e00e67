"""Trains the embedded checkpoint: a small FLUX that paints emoji on plain backgrounds.

    python tools/tiny/train.py sprites     --work W     draws the glyphs (needs the font)
    python tools/tiny/train.py tokenizers  --work W
    python tools/tiny/train.py autoencoder --work W
    python tools/tiny/train.py flow        --work W     text encoders and transformer
    python tools/tiny/train.py last        --work W     the same, at every size and text length
    python tools/tiny/train.py export      --work W     writes W/checkpoint, a diffusers folder

Every stage is seeded, keeps its state in W and goes on from there when it is started again;
`--minutes` ends a sitting early, `--steps` counts over all sittings. README.md tells how long
each took. Needs torch, diffusers, transformers, tokenizers, sentencepiece and Pillow.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import models
import numpy as np
import scenes
import torch
from autoencoder import load_autoencoder, train_autoencoder
from flow import Flow, train_flow
from sprites import FONT, render_sprites


def export(args: argparse.Namespace) -> None:
    state = torch.load(args.work / "flow.pt", map_location=args.device, weights_only=True)
    flow = Flow(args, state["shift"], state["scale"])
    flow.load(state)
    autoencoder = load_autoencoder(args)
    autoencoder.register_to_config(shift_factor=flow.shift, scaling_factor=flow.scale)
    models.save(args.work / "checkpoint", {"vae": autoencoder, **dict(flow.averaged().items())})
    print(f"{args.work / 'checkpoint'} written after {state['steps']} steps")


def make_sprites(args: argparse.Namespace) -> None:
    np.save(args.work / "sprites.npy", render_sprites(args.font))


def make_tokenizers(args: argparse.Namespace) -> None:
    rng = np.random.default_rng(args.seed)
    captions = [scenes.sample(rng)[1] for _ in range(100_000)]
    models.train_t5_tokenizer(captions, args.work / "checkpoint/tokenizer_2")
    models.train_clip_tokenizer(captions, args.work / "checkpoint/tokenizer")


STAGES: dict[str, tuple[Callable[[argparse.Namespace], None], int, int, float]] = {
    # stage: (function, steps, batch, peak learning rate)
    "sprites": (make_sprites, 0, 0, 0.0),
    "tokenizers": (make_tokenizers, 0, 0, 0.0),
    "autoencoder": (train_autoencoder, 2_500, 64, 1e-3),
    "flow": (train_flow, 53_000, 256, 1e-3),
    "last": (train_flow, 1_700, 256, 2e-4),
    "export": (export, 0, 0, 0.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains fluxmesh's embedded checkpoint.")
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--work", type=Path, required=True, help="folder of all state")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="in all, over every sitting")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rate", type=float, help="peak learning rate")
    parser.add_argument("--pool", type=int, default=300_000, help="pictures drawn a sitting")
    parser.add_argument("--minutes", type=float, default=1e6, help="ends this sitting after")
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
    run, steps, batch, rate = STAGES[args.stage]
    args.steps, args.batch = args.steps or steps, args.batch or batch
    args.rate = args.rate or rate
    args.work.mkdir(parents=True, exist_ok=True)
    run(args)


if __name__ == "__main__":
    main()
