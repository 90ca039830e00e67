"""Scores the embedded checkpoint on held-out prompts, painted through fluxmesh or diffusers.

    python tools/tiny/evaluate.py                       # 200 prompts through fluxmesh
    python tools/tiny/evaluate.py --through diffusers   # the same prompts, for comparison

No prompt's combination of object, place and background, or of two objects, was ever trained
(`single_held_out` and `pair_held_out` in `scenes.py`). `score.SceneReader` reads each picture back:
the nearest of all renderings must be the object that the prompt names. Prints a row of the table in
README.md, and writes a contact sheet. Needs the font; the comparison torch and diffusers too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scenes import NAMES, questions
from score import Reader, Verdict, table
from sprites import FONT, render_sprites

COLUMNS = 10  # of the contact sheet
ROWS = 4


def through_fluxmesh(args: argparse.Namespace) -> Callable[[str, int], np.ndarray]:
    """A function from prompt and seed to uint8 [height, width, 3], by fluxmesh's `FluxPipeline`."""
    from fluxmesh.engine.tf32 import prepare

    prepare(args.dtype)
    from fluxmesh.engine.pipeline import FluxPipeline, to_pixels

    flux = FluxPipeline(args.model, not args.no_t5_padding, dtype=args.dtype)
    size = (args.height // 8, args.width // 8)

    def paint(prompt: str, seed: int) -> np.ndarray:
        steps = {"num_steps": args.steps, "latent_size": size, "reload_text_encoders": False}
        return to_pixels(flux.generate_images(prompt, seed=seed, **steps))[0]

    return paint


def through_diffusers(args: argparse.Namespace) -> Callable[[str, int], np.ndarray]:
    """The same by diffusers' FluxPipeline, which also draws its own noise."""
    import torch
    from diffusers import FluxPipeline

    import fluxmesh

    folder = Path(fluxmesh.__file__).parent / "tiny/checkpoint"
    pipeline = FluxPipeline.from_pretrained(
        folder if args.model == "tiny" else args.model, torch_dtype=getattr(torch, args.dtype)
    )
    pipeline.set_progress_bar_config(disable=True)
    length = pipeline.tokenizer_2.model_max_length

    def paint(prompt: str, seed: int) -> np.ndarray:
        result: Any = pipeline(
            prompt, height=args.height, width=args.width, num_inference_steps=args.steps,
            max_sequence_length=length, generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        return np.asarray(result.images[0])

    return paint


THROUGH = {"fluxmesh": through_fluxmesh, "diffusers": through_diffusers}


def judged(
    args: argparse.Namespace, sprites: np.ndarray
) -> Iterator[tuple[str, np.ndarray, Verdict]]:
    """Paints and scores every question: (prompt, picture, verdict)."""
    paint = THROUGH[args.through](args)
    reader = Reader(sprites, args.height, args.width)
    for index, question in enumerate(questions(args.count, args.seed)):
        picture = paint(question.prompt, index)
        yield question.prompt, picture, reader.judge(picture, question)


def contact_sheet(pictures: list[np.ndarray]) -> Image.Image:
    """Half of the rows from the prompts with one object, half from those with two."""
    count = COLUMNS * ROWS // 2
    half = len(pictures) // 2
    chosen = pictures[:count] + pictures[half : half + count]
    rows = [np.concatenate(chosen[i : i + COLUMNS], axis=1) for i in range(0, len(chosen), COLUMNS)]
    width = max(row.shape[1] for row in rows)
    rows = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0))) for row in rows]
    return Image.fromarray(np.concatenate(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description="Scores the embedded checkpoint.")
    parser.add_argument("--through", choices=THROUGH, default="fluxmesh")
    parser.add_argument("--model", default="tiny", help="tiny, or a folder")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--no-t5-padding", action="store_true", help="fluxmesh only")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="chooses the prompts")
    parser.add_argument("--sheet", type=Path, help="writes a contact sheet here")
    parser.add_argument("--misses", action="store_true", help="prints the prompts that went wrong")
    parser.add_argument("--font", type=Path, default=FONT)
    args = parser.parse_args()
    verdicts, pictures, began = [], [], time.time()
    for prompt, picture, verdict in judged(args, render_sprites(args.font)):
        verdicts.append(verdict)
        pictures.append(picture)
        if args.misses and not all(verdict.objects):
            print(f"missed: {prompt}")
        if len(verdicts) % 20 == 0:
            print(f"{len(verdicts)}/{args.count} after {time.time() - began:.0f} s", flush=True)
    if args.sheet:
        contact_sheet(pictures).save(args.sheet)
    scores = table(verdicts)
    print(f"| through | steps | size | {' | '.join(scores)} |")
    print("|---|---|---|" + "---|" * len(scores))
    cells = " | ".join(f"{value:.1f}%" for value in scores.values())
    print(f"| {args.through}, {args.dtype} | {args.steps} | {args.height}x{args.width} | {cells} |")
    print(f"{len(NAMES)} objects, {args.count} held-out prompts")


if __name__ == "__main__":
    main()
