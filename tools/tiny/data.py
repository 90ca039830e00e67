"""Training data on the device: scenes drawn in batches, and pools of latents with their text."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scenes
import sentencepiece
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from sprites import pyramid
from transformers import CLIPTokenizer

LEVELS = (16, 24, 32, 40, 48, 56, 64, 80, 96, 128)  # pixels of the sprites' copies
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


def _sample_many(job: tuple[int, int, int, int]) -> tuple[SceneBatch, list[str]]:
    seed, count, height, width = job
    rng = np.random.default_rng(seed)
    pairs = [scenes.sample(rng, height, width) for _ in range(count)]
    return SceneBatch.of([scene for scene, _ in pairs]), [caption for _, caption in pairs]


def sample_scenes(
    seed: int, count: int, height: int, width: int
) -> Iterator[tuple[SceneBatch, list[str]]]:
    """`count` scenes with captions in parts, drawn by all cores; the same for one seed."""
    starts = range(0, count, PART)
    jobs = [(seed * 100_003 + s, min(PART, count - s), height, width) for s in starts]
    with ProcessPoolExecutor() as workers:
        yield from workers.map(_sample_many, jobs)


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


class TextTokens:
    """Both tokenizers of the checkpoint folder, over lists of captions."""

    def __init__(self, checkpoint: Path, length: int) -> None:
        self.spiece = sentencepiece.SentencePieceProcessor(
            str(checkpoint / "tokenizer_2/spiece.model")
        )
        self.clip = CLIPTokenizer.from_pretrained(checkpoint / "tokenizer")
        self.length = length

    def __call__(self, captions: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """T5 ids [B, length] padded with 0, how many are real [B], and CLIP's ids [B, 32]."""
        t5 = np.zeros((len(captions), self.length), dtype=np.int64)
        real = np.zeros(len(captions), dtype=np.int64)
        for row, ids in enumerate(self.spiece.encode(captions)):
            ids = [*ids[: self.length - 1], self.spiece.eos_id()]
            t5[row, : len(ids)] = ids
            real[row] = len(ids)
        clip = self.clip(captions, padding="max_length", truncation=True, return_tensors="np")
        return t5, real, clip["input_ids"].astype(np.int64)


@dataclass
class Pool:
    """Pictures of one size as packed latents, with their text, on the device."""

    height: int
    width: int
    latents: torch.Tensor  # bfloat16 [N, tokens, 64], before shift and scale
    t5: torch.Tensor  # int64 [N, longest]
    real: np.ndarray  # T5 tokens that are not padding [N]
    clip: torch.Tensor  # int64 [N, 32]


@torch.no_grad()
def build_pool(
    autoencoder: AutoencoderKL, render: Renderer, text: TextTokens, seed: int, count: int,
    height: int, width: int,
) -> Pool:  # fmt: skip
    """Draws `count` scenes and encodes them to the posterior's mean."""
    device = render.device
    latents, ids, real, clip = [], [], [], []
    for batch, captions in sample_scenes(seed, count, height, width):
        t5, lengths, clip_ids = text(captions)
        ids.append(torch.from_numpy(t5).to(device))
        clip.append(torch.from_numpy(clip_ids).to(device))
        real.append(lengths)
        for start in range(0, len(captions), 512):
            image = render(batch[start : start + 512], height, width)
            with torch.autocast(device.type, torch.bfloat16):
                mean = autoencoder.encode(image).latent_dist.mean
            latents.append(pack(mean).to(torch.bfloat16))
    return Pool(
        height, width, torch.cat(latents), torch.cat(ids), np.concatenate(real), torch.cat(clip)
    )
