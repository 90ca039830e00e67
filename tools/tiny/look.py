"""Looks at what a model in training has learnt: paints held-out questions, reads them, scores them.

Without a pipeline: what `evaluate.py` does through fluxmesh or diffusers for a finished checkpoint,
in seconds on the machine that trains.
"""

from __future__ import annotations

import argparse

import data
import edits
import numpy as np
import scenes
import torch
from autoencoder import FrozenAutoencoder
from flow import averaged
from PIL import Image
from score import EditReader, SceneReader, edit_table, judge_all, table

SIDE = 128  # pixels
SHEET_ROWS = 4


@torch.no_grad()
def paint(
    args: argparse.Namespace, modules: torch.nn.ModuleDict, autoencoder: FrozenAutoencoder,
    prompts: list[str], references: list[torch.Tensor], steps: int,
) -> np.ndarray:  # fmt: skip
    """Pictures of prompts by Euler's method, uint8 [prompts, SIDE, SIDE, 3].

    `references` are pictures in [-1, 1], [prompts, 3, SIDE, SIDE], each for one place.
    """
    blueprint, device = args.blueprint, torch.device(args.device)
    tokens = blueprint.load_tokens(args.work / "checkpoint")(prompts)
    text = {name: torch.from_numpy(rows).to(device) for name, rows in tokens.items()}
    del text["real"]
    features = blueprint.encode(modules, blueprint.cut_text(text, blueprint.text_tokens))
    ids = blueprint.picture_ids(SIDE, SIDE, ((SIDE, SIDE),) * len(references)).to(device)
    count = (SIDE // data.PATCH) ** 2
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(prompts), count, 4 * blueprint.latent_channels, generator=generator)
    x = x.to(device)
    given = torch.cat([x[:, :0], *(autoencoder.encode(picture) for picture in references)], dim=1)
    times = blueprint.time_steps(count, steps)
    for now, after in zip(times, times[1:], strict=False):
        t = torch.full((len(x),), now, device=device)
        velocity = blueprint.velocity(modules, torch.cat([x, given], dim=1), t, features, ids)
        x = x + (after - now) * velocity[:, :count].float()
    return autoencoder.decode(x, SIDE, SIDE)


def look(args: argparse.Namespace) -> bool:
    """Scores held-out prompts and edits, and writes contact sheets, `W/look*.png`."""
    (modules, done), autoencoder = averaged(args), FrozenAutoencoder(args)
    print(f"looking at what {done} steps have taught", flush=True)
    sprites = data.load_sprites(args.work)
    asked = scenes.questions(args.questions, 0)
    reader = SceneReader(sprites, SIDE, SIDE)
    for steps in (4, 8):
        pictures = paint(args, modules, autoencoder, [q.prompt for q in asked], [], steps)
        verdicts = judge_all(reader, pictures, asked)
        print(f"{steps} steps: {_row(table(verdicts))}", flush=True)
    _sheet([pictures[i] for i in range(len(pictures))]).save(args.work / "look.png")
    if args.blueprint.edits:
        _look_at_edits(args, modules, autoencoder, sprites)
    return True


def _look_at_edits(
    args: argparse.Namespace, modules: torch.nn.ModuleDict, autoencoder: FrozenAutoencoder,
    sprites: np.ndarray,
) -> None:  # fmt: skip
    render = data.Renderer(sprites, torch.device(args.device))
    reader = EditReader(sprites, SIDE, SIDE)
    asked = edits.questions(args.questions, 0)
    columns, verdicts, questions = [], [], []
    for number in (1, 2):
        group = [edit for edit in asked if len(edit.references) == number]
        drawn = [
            render(
                data.SceneBatch.of([e.references[i].scene(SIDE, SIDE) for e in group]), SIDE, SIDE
            )
            for i in range(number)
        ]
        pictures = paint(args, modules, autoencoder, [e.prompt for e in group], drawn, 4)
        verdicts += judge_all(reader, pictures, group)
        questions += group
        before = [((part.permute(0, 2, 3, 1) + 1) * 127.5).byte().cpu().numpy() for part in drawn]
        blank = np.full_like(pictures[0], 255)
        for row, picture in enumerate(pictures):
            parts = [part[row] for part in before] + [blank] * (2 - number) + [picture]
            columns.append(np.concatenate(parts))
    print(f"edits, 4 steps: {_row(edit_table(questions, verdicts))}", flush=True)
    chosen = range(0, len(columns), max(1, len(columns) // 40))
    _sheet([columns[i] for i in chosen], rows=2).save(args.work / "look_edits.png")


def _row(shares: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.1f}%" for name, value in shares.items())


def _sheet(pictures: list[np.ndarray], rows: int = SHEET_ROWS) -> Image.Image:
    columns = max(1, len(pictures) // rows)
    parts = [np.concatenate(pictures[row * columns :][:columns], axis=1) for row in range(rows)]
    return Image.fromarray(np.concatenate([part for part in parts if part.shape == parts[0].shape]))
