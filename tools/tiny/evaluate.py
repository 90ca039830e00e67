"""Scores an embedded checkpoint on what training never showed: prompts, and edits of pictures.

    python tools/tiny/evaluate.py                              # 200 prompts through fluxmesh
    python tools/tiny/evaluate.py --model tiny-klein --edits   # 200 edits
    python tools/tiny/evaluate.py --model tiny-klein --edits --count 11 --examples docs/edits.png
    python tools/tiny/evaluate.py --through mesh               # on the hosts of `fluxmesh up`
    python tools/tiny/evaluate.py --through diffusers          # the same, for comparison
    python tools/tiny/evaluate.py --through drawing            # drawn as asked: must be 100%

No prompt's combination of object, place and background, or of two objects, was ever trained, nor
any edit that makes one (`scenes.py`, `edits.py`). `score.py` reads each picture back: the nearest
of all renderings must be what was asked for. Prints a row of the table in README.md, and writes a
contact sheet; of edits `--examples` makes one with the words of each. Needs the font, or
`--sprites`; the comparison torch and diffusers too.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import edits
import numpy as np
import scenes
from example_sheet import EditExample, example_sheet
from PIL import Image
from score import EditReader, SceneReader, edit_table, table
from sprites import FONT, draw, render_sprites

COLUMNS = 10  # of the contact sheet
ROWS = 4

# (question, its pictures, seed) to what is painted, uint8 [height, width, 3].
Paint = Callable[[Any, Sequence[np.ndarray], int], np.ndarray]


def through_fluxmesh(args: argparse.Namespace, sprites: np.ndarray) -> Paint:
    """By fluxmesh's `FluxPipeline`."""
    from fluxmesh.engine.tf32 import prepare

    prepare(args.dtype)
    from fluxmesh.engine.pipeline import FluxPipeline
    from fluxmesh.engine.stages import to_pixels

    flux = FluxPipeline(args.model, not args.no_t5_padding, dtype=args.dtype)
    size = (args.height // 8, args.width // 8)

    def paint(question: Any, references: Sequence[np.ndarray], seed: int) -> np.ndarray:
        image = flux.generate_images(
            question.prompt, num_steps=args.steps, latent_size=size, seed=seed,
            reload_text_encoders=False, references=references,
        )  # fmt: skip
        return to_pixels(image)[0]

    return paint


def through_mesh(args: argparse.Namespace, sprites: np.ndarray) -> Paint:
    """By the hosts of `fluxmesh up`, or by an engine of this machine where none are up."""
    from fluxmesh import Mesh
    from fluxmesh.events import Picture
    from fluxmesh.request import GenerateRequest

    mesh = args.opened.enter_context(Mesh.connect())

    def paint(question: Any, references: Sequence[np.ndarray], seed: int) -> np.ndarray:
        request = GenerateRequest(
            question.prompt, seed, args.model, references=tuple(references), steps=args.steps,
            height=args.height, width=args.width, dtype=args.dtype,
        )  # fmt: skip
        (pixels,) = (
            e.pixels for e in mesh.generate(request, args.placement) if isinstance(e, Picture)
        )
        return pixels

    return paint


def through_diffusers(args: argparse.Namespace, sprites: np.ndarray) -> Paint:
    """The same by diffusers' own pipeline, which also draws its own noise."""
    import torch
    from diffusers import DiffusionPipeline

    from fluxmesh.weights.embedded.checkpoints import FOLDERS, folder_of

    named = args.model in FOLDERS
    pipeline = DiffusionPipeline.from_pretrained(
        folder_of(args.model) if named else args.model,
        torch_dtype=getattr(torch, args.dtype),
    )
    pipeline.set_progress_bar_config(disable=True)
    # FLUX.1's pipeline has two tokenizers, and takes no pictures.
    longest = getattr(pipeline, "tokenizer_2", pipeline.tokenizer).model_max_length

    def paint(question: Any, references: Sequence[np.ndarray], seed: int) -> np.ndarray:
        pictures = {"image": [Image.fromarray(pixels) for pixels in references]}
        result: Any = pipeline(
            prompt=question.prompt, height=args.height, width=args.width,
            num_inference_steps=args.steps, guidance_scale=1.0, max_sequence_length=longest,
            generator=torch.Generator().manual_seed(seed), **(pictures if references else {}),
        )  # fmt: skip
        return np.asarray(result.images[0])

    return paint


def through_drawing(args: argparse.Namespace, sprites: np.ndarray) -> Paint:
    """What was asked for, drawn: whoever reads pictures must find all of it right."""

    def paint(question: Any, references: Sequence[np.ndarray], seed: int) -> np.ndarray:
        layout = question.target if args.edits else edits.answer(question)
        return draw(layout.scene(args.height, args.width), sprites, args.height, args.width)

    return paint


THROUGH = {
    "fluxmesh": through_fluxmesh,
    "mesh": through_mesh,
    "diffusers": through_diffusers,
    "drawing": through_drawing,
}


def painted(
    args: argparse.Namespace, sprites: np.ndarray, questions: Sequence[Any]
) -> Iterator[tuple[Any, np.ndarray, list[np.ndarray]]]:
    """Every question with the picture that answers it, and with the pictures that it speaks of."""
    paint = THROUGH[args.through](args, sprites)
    size = args.height, args.width
    for seed, question in enumerate(questions):
        given = question.references if args.edits else ()
        references = [draw(layout.scene(*size), sprites, *size) for layout in given]
        yield question, paint(question, references, seed), references


def contact_sheet(columns: list[np.ndarray], rows: int) -> Image.Image:
    """As many of the pictures as fit, from the beginning to the end of what was asked."""
    count = min(len(columns), COLUMNS * rows)
    chosen = [columns[i * len(columns) // count] for i in range(count)]
    lines = [np.concatenate(chosen[i : i + COLUMNS], axis=1) for i in range(0, count, COLUMNS)]
    width = max(line.shape[1] for line in lines)
    lines = [np.pad(line, ((0, 0), (0, width - line.shape[1]), (0, 0))) for line in lines]
    return Image.fromarray(np.concatenate(lines))


def stacked(picture: np.ndarray, references: list[np.ndarray]) -> np.ndarray:
    """The pictures of an edit, one below the other; the last is what was painted."""
    blanks = [np.full_like(picture, 255)] * (2 - len(references))
    return np.concatenate([*references, *blanks, picture])


def main() -> None:
    parser = argparse.ArgumentParser(description="Scores an embedded checkpoint.")
    parser.add_argument("--through", choices=THROUGH, default="fluxmesh")
    parser.add_argument("--model", default="tiny", help="tiny, tiny-klein, or a folder")
    parser.add_argument("--placement", help="how `--through mesh` splits a picture")
    parser.add_argument("--edits", action="store_true", help="edits instead of prompts")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--no-t5-padding", action="store_true", help="tiny in fluxmesh only")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="chooses what is asked")
    parser.add_argument("--sheet", type=Path, help="writes a contact sheet here")
    parser.add_argument("--examples", type=Path, help="writes all edits, with their words, here")
    parser.add_argument("--misses", action="store_true", help="prints what went wrong")
    parser.add_argument("--font", type=Path, default=FONT)
    parser.add_argument("--sprites", type=Path, help="what train.py's `sprites` kept")
    args = parser.parse_args()
    with contextlib.ExitStack() as args.opened:
        evaluate(parser, args)


def evaluate(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.examples and not args.edits:
        parser.error("--examples is of --edits.")
    if args.sprites:
        with np.load(args.sprites) as kept:
            sprites = kept["sprites"]
    else:
        sprites = render_sprites(args.font)
    reader = (EditReader if args.edits else SceneReader)(sprites, args.height, args.width)
    questions = (edits if args.edits else scenes).questions(args.count, args.seed)
    verdicts, columns, examples, began = [], [], [], time.time()
    for question, picture, references in painted(args, sprites, questions):
        verdict = reader.judge(picture, question)
        verdicts.append(verdict)
        columns.append(stacked(picture, references) if args.edits else picture)
        examples.append(EditExample(references, question.prompt, picture))
        if args.misses and not verdict.is_right:
            print(f"missed: {question.prompt}: {verdict}")
        if len(verdicts) % 20 == 0:
            print(f"{len(verdicts)}/{args.count} after {time.time() - began:.0f} s", flush=True)
    if args.sheet:
        contact_sheet(columns, 2 if args.edits else ROWS).save(args.sheet)
    if args.examples:
        example_sheet(examples).save(args.examples)
    scores = edit_table(questions, verdicts) if args.edits else table(verdicts)
    print(f"| through | steps | size | {' | '.join(scores)} |")
    print("|---|---|---|" + "---|" * len(scores))
    cells = " | ".join(f"{value:.1f}%" for value in scores.values())
    print(f"| {args.through}, {args.dtype} | {args.steps} | {args.height}x{args.width} | {cells} |")
    print(
        f"{len(scenes.NAMES)} objects, {args.count} held-out {'edits' if args.edits else 'prompts'}"
    )


if __name__ == "__main__":
    main()
