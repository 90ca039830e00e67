"""The first stage of training: the autoencoder, on pictures of random scenes.

At its end it measures mean and deviation of its tokens, which normalize them for the transformer.
"""

from __future__ import annotations

import argparse
import math

import data
import numpy as np
import scenes
import torch
from blueprint import PictureSizes
from capture import Captured
from schedule import Sitting, cosine

MEASURED = 4096  # pictures that the statistics of tokens are taken of


def autoencoder_loss(image: torch.Tensor, output: torch.Tensor, kl: torch.Tensor) -> torch.Tensor:
    """L1 + squared error + differences of neighbours (sharp edges) + a light KL."""
    error = (output - image).float()
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + 2 * (error**2).mean() + 0.5 * edges + 1e-4 * kl


def vary_colours(image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mirrors pictures and swaps colour channels of some, so that the autoencoder sees more."""
    if torch.rand((), generator=generator) < 0.5:
        image = image.flip(3)
    order = torch.randperm(3, generator=generator)
    part = len(image) // 3
    return torch.cat([image[:part][:, order], image[part:]])


def draw_pictures(
    render: data.Renderer, seed: int, count: int, height: int, width: int
) -> torch.Tensor:
    """`count` pictures of random scenes, uint8 [count, 3, height, width], on the device."""
    parts = []
    for batch in data.sample_examples(seed, count, PictureSizes(height, width)):
        scene = batch.pictures[0]
        for start in range(0, len(scene.background), 512):
            image = render(scene[start : start + 512], height, width)
            parts.append(((image + 1) * 127.5).round().byte())
    return torch.cat(parts)


def train_autoencoder(args: argparse.Namespace) -> bool:
    """One sitting; the state on the disk is that of its end, and of every few minutes before."""
    work, device = args.work, torch.device(args.device)
    torch.backends.cudnn.benchmark = True  # three shapes, thousands of times each
    torch.manual_seed(args.seed)
    model = args.blueprint.build_autoencoder().to(device, memory_format=torch.channels_last)
    model.train().requires_grad_(True)
    lr = torch.tensor(0.0, device=device)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=lr,
        betas=(0.9, 0.99),
        weight_decay=0.0,
        fused=True,
        capturable=device.type == "cuda",
    )
    done, path = 0, work / "autoencoder.pt"
    sitting = Sitting(args.seconds, args.budget)
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        done, sitting.spent = state["step"], state["seconds"]
    render = data.Renderer(data.load_sprites(work), device)
    pictures = {
        size: draw_pictures(render, args.seed + done, max(1, args.pool * share // 100), *size)
        for size, share in {(128, 128): 8, (64, 64): 1, (192, 192): 1}.items()
    }
    sizes = [(128, 128)] * 8 + [(64, 64), (192, 192)]
    print(f"autoencoder: pictures after {sitting.elapsed:.0f} s, step {done}", flush=True)

    def train(image: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            posterior = model.encode(image).latent_dist
            latents = posterior.mean + posterior.std * torch.randn_like(posterior.mean)
            output = model.decode(latents).sample
        kl = posterior.kl().float().mean() / latents[0].numel()
        for parameter in model.parameters():
            parameter.grad = None
        autoencoder_loss(image, output, kl).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return ((output.detach() - image) ** 2).mean()

    def save() -> None:
        mean, deviation = measured(args, model, render)
        torch.save(
            {
                "model": model.state_dict(),
                "step": step,
                "seconds": sitting.spent + sitting.elapsed,
                "mean": mean,
                "deviation": deviation,
            },
            path,
        )

    run = Captured(train, args.graphs)
    step = done
    while step < args.steps and not sitting.is_over:
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        lr.fill_(cosine(step, args.steps, args.rate, sitting.share, since=step - done))
        height, width = sizes[int(torch.randint(len(sizes), (), generator=generator))]
        count = max(1, args.batch * 128 * 128 // (height * width))
        source = pictures[height, width]
        rows = torch.randint(len(source), (count,), generator=generator).to(device)
        image = vary_colours(source[rows].float() / 127.5 - 1, generator)
        error = run(image=image.contiguous(memory_format=torch.channels_last))
        step += 1
        if step % args.log_every == 0 or step == args.steps:
            psnr = -10 * math.log10(error.item() / 4)
            sitting.progress(f"autoencoder {step}/{args.steps} {psnr:.2f} dB", step - done)
        if sitting.is_time_to_save:
            save()
    save()
    print(f"autoencoder: {held_out_psnr(model, render, args.seed):.2f} dB on new scenes")
    return step >= args.steps or sitting.share >= 1


@torch.no_grad()
def measured(
    args: argparse.Namespace, model: torch.nn.Module, render: data.Renderer
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of the tokens of new pictures, as the blueprint has them."""
    count = max(64, min(MEASURED, args.pool // 10))
    parts = []
    for batch in data.sample_examples(args.seed + 17, count, PictureSizes(128, 128)):
        scene = batch.pictures[0]
        for start in range(0, len(scene.background), 256):
            image = render(scene[start : start + 256], 128, 128)
            parts.append(data.pack(model.encode(image).latent_dist.mean.float()))
    mean, deviation = args.blueprint.statistics(torch.cat(parts))
    return mean.float().cpu(), deviation.float().cpu()


@torch.no_grad()
def held_out_psnr(model: torch.nn.Module, render: data.Renderer, seed: int) -> float:
    """Peak signal-to-noise ratio, in dB, of 64 scenes at 128×128 never trained on."""
    rng = np.random.default_rng([seed, 1 << 30])
    image = render(data.SceneBatch.of([scenes.sample(rng)[0] for _ in range(64)]), 128, 128)
    output = model.decode(model.encode(image).latent_dist.mean).sample.clamp(-1, 1)
    return -10 * math.log10(((output - image) ** 2).mean().item() / 4)


class FrozenAutoencoder:
    """The trained autoencoder, between pictures and the normalized tokens of the transformer."""

    def __init__(self, args: argparse.Namespace) -> None:
        state = torch.load(
            args.work / "autoencoder.pt", map_location=args.device, weights_only=True
        )
        model = args.blueprint.build_autoencoder().to(args.device)
        model.load_state_dict(state["model"])
        model = model.to(memory_format=torch.channels_last)
        self.model = model.eval().requires_grad_(False)
        self.mean, self.deviation = (state[name].to(args.device) for name in ("mean", "deviation"))
        args.blueprint.keep_statistics(self.model, self.mean, self.deviation)

    @torch.no_grad()
    def encode(self, image: torch.Tensor) -> torch.Tensor:
        """Pictures in [-1, 1], [B, 3, H, W], to tokens [B, tokens, 4C]: the posterior's mean."""
        image = image.contiguous(memory_format=torch.channels_last)
        with torch.autocast(image.device.type, torch.bfloat16):
            mean = self.model.encode(image).latent_dist.mean
        return (data.pack(mean.float()) - self.mean) / self.deviation

    @torch.no_grad()
    def decode(self, tokens: torch.Tensor, height: int, width: int) -> np.ndarray:
        """Tokens to pictures, uint8 [B, H, W, 3]."""
        latents = data.unpack(tokens * self.deviation + self.mean, height, width)
        image = self.model.decode(latents).sample.clamp(-1, 1)
        pixels: np.ndarray = ((image + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return pixels
