"""Training data on the device: scenes drawn in batches, and pools of tokens with their text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import edits
import numpy as np
import scenes
import torch
import torch.nn.functional as F
from blueprint import PictureSizes, Tokens
from sprites import pyramid

LEVELS = (16, 24, 32, 40, 48, 56, 64, 80, 96, 128)  # pixels of the sprites' copies
SPRITES = "sprites.npz"
PART = 4096  # scenes that one call of a worker draws
PATCH = 16  # pixels that one token of the transformer covers along a side


@dataclass(frozen=True)
class SceneBatch:
    """Scenes as arrays: background [B], and name, size, x, y [B, 2] (name -1 is nothing)."""

    background: np.ndarray
    name: np.ndarray
    size: np.ndarray
    x: np.ndarray
    y: np.ndarray

    @staticmethod
    def of(batch: list[scenes.Scene]) -> SceneBatch:
        background = np.array([scene.background for scene in batch])
        table = np.full((len(batch), 2, 4), -1.0)
        for row, scene in enumerate(batch):
            for column, thing in enumerate(scene.things):
                table[row, column] = (thing.name, thing.size, thing.x, thing.y)
        name = table[..., 0].astype(int)
        return SceneBatch(background, name, table[..., 1], table[..., 2], table[..., 3])

    def __getitem__(self, rows: slice) -> SceneBatch:
        return SceneBatch(
            self.background[rows], self.name[rows], self.size[rows], self.x[rows], self.y[rows]
        )


@dataclass(frozen=True)
class Examples:
    """What is painted and, in `pictures[1:]`, what it is made from; with the captions."""

    pictures: list[SceneBatch]
    captions: list[str]


def _sample_many(job: tuple[int, int, PictureSizes]) -> Examples:
    seed, count, sizes = job
    rng = np.random.default_rng(seed)
    rows: list[tuple[scenes.Scene, ...]] = []
    captions = []
    for _ in range(count):
        if sizes.references:
            edit = edits.sample(rng, len(sizes.references))
            every = ((sizes.height, sizes.width), *sizes.references)
            rows.append(
                tuple(
                    layout.scene(*size)
                    for layout, size in zip((edit.target, *edit.references), every, strict=True)
                )
            )
            captions.append(edit.prompt)
        else:
            scene, caption = scenes.sample(rng, sizes.height, sizes.width)
            rows.append((scene,))
            captions.append(caption)
    return Examples([SceneBatch.of(list(column)) for column in zip(*rows, strict=True)], captions)


def sample_examples(seed: int, count: int, sizes: PictureSizes) -> Iterator[Examples]:
    """`count` examples in parts, drawn by all cores; the same for one seed."""
    starts = range(0, count, PART)
    jobs = [(seed * 100_003 + s, min(PART, count - s), sizes) for s in starts]
    with ProcessPoolExecutor(mp_context=get_context("fork")) as workers:
        yield from workers.map(_sample_many, jobs)


def load_sprites(work: Path) -> np.ndarray:
    """What the stage `sprites` kept, so that training needs no font."""
    with np.load(work / SPRITES) as kept:
        sprites: np.ndarray = kept["sprites"]
    return sprites


class Renderer:
    """Draws `SceneBatch`es on a device, antialiased, at places that need not be whole pixels."""

    def __init__(self, sprites: np.ndarray, device: torch.device) -> None:
        self.device = device
        self.levels = {
            side: torch.from_numpy(level).permute(0, 3, 1, 2).contiguous().to(device)
            for side, level in pyramid(sprites, LEVELS).items()
        }
        self.colours = torch.from_numpy(scenes.RGB).to(device).float() / 255

    def __call__(self, batch: SceneBatch, height: int, width: int) -> torch.Tensor:
        """Pictures in [-1, 1], float32 [B, 3, height, width]."""
        image = self.colours[torch.from_numpy(batch.background).to(self.device)]
        image = image[:, :, None, None].repeat(1, 1, height, width)
        pixels = batch.size * min(height, width)
        level = np.searchsorted(LEVELS, pixels.clip(max=LEVELS[-1]))
        rows = (torch.arange(height, device=self.device) + 0.5)[None, :, None]
        columns = (torch.arange(width, device=self.device) + 0.5)[None, None, :]
        for slot in range(2):
            for index, side in enumerate(LEVELS):
                chosen = np.flatnonzero((batch.name[:, slot] >= 0) & (level[:, slot] == index))
                if not len(chosen):
                    continue
                where = torch.from_numpy(chosen).to(self.device)
                name, size, x, y = (
                    torch.from_numpy(values[chosen, slot]).to(self.device)
                    for values in (batch.name, pixels, batch.x, batch.y)
                )
                size, x, y = (v.float()[:, None, None] for v in (size, x, y))
                u = (columns - x * width) / size * 2
                v = (rows - y * height) / size * 2
                grid = torch.stack(torch.broadcast_tensors(u, v), dim=-1)
                sprite = F.grid_sample(self.levels[side][name], grid, align_corners=False)
                image[where] = image[where] * (1 - sprite[:, 3:]) + sprite[:, :3]
        return image * 2 - 1


def pack(latents: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] -> [B, H/2 · W/2, 4C], each token a 2×2 patch, channels outermost."""
    b, c, h, w = latents.shape
    latents = latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return latents.reshape(b, h // 2 * (w // 2), 4 * c)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The inverse of `pack` for a picture of `height` × `width` pixels."""
    h, w = height // PATCH, width // PATCH
    tokens = tokens.view(len(tokens), h, w, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return tokens.reshape(len(tokens), -1, 2 * h, 2 * w)


@dataclass
class Pool:
    """Examples of one shape as tokens of pictures and of text, on the device."""

    pictures: list[torch.Tensor]  # normalized, bfloat16 [N, tokens, 4C]: target, then references
    text: dict[str, torch.Tensor]  # int64 [N, longest], by tokenizer
    real: np.ndarray  # tokens of the caption that are not padding [N]


def build_pool(
    encode: Callable[[torch.Tensor], torch.Tensor], render: Renderer, tokens: Tokens, seed: int,
    count: int, sizes: PictureSizes,
) -> Pool:  # fmt: skip
    """Draws `count` examples and encodes their pictures."""
    device = render.device
    every = ((sizes.height, sizes.width), *sizes.references)
    pictures: list[list[torch.Tensor]] = [[] for _ in every]
    text: dict[str, list[torch.Tensor]] = {}
    real = []
    for examples in sample_examples(seed, count, sizes):
        ids = tokens(examples.captions)
        real.append(ids.pop("real"))
        for name, rows in ids.items():
            text.setdefault(name, []).append(torch.from_numpy(rows).to(device))
        for part, batch, size in zip(pictures, examples.pictures, every, strict=True):
            for start in range(0, len(examples.captions), 512):
                image = render(batch[start : start + 512], *size)
                part.append(encode(image).to(torch.bfloat16))
    return Pool(
        [torch.cat(part) for part in pictures],
        {name: torch.cat(parts) for name, parts in text.items()},
        np.concatenate(real),
    )
