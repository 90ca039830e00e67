"""The first stage of training: the autoencoder, on pictures of random scenes."""

from __future__ import annotations

import argparse
import math
import time

import data
import models
import numpy as np
import scenes
import torch
from capture import Captured
from schedule import cosine


def autoencoder_loss(image: torch.Tensor, output: torch.Tensor, kl: torch.Tensor) -> torch.Tensor:
    """L1 + squared error + differences of neighbours (sharp edges) + a light KL."""
    error = (output - image).float()
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + (error**2).mean() + 0.5 * edges + 2e-4 * kl


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
    for batch, _ in data.sample_scenes(seed, count, height, width):
        for start in range(0, len(batch.background), 512):
            image = render(batch[start : start + 512], height, width)
            parts.append(((image + 1) * 127.5).round().byte())
    return torch.cat(parts)


def train_autoencoder(args: argparse.Namespace) -> None:
    work, device = args.work, torch.device(args.device)
    torch.manual_seed(args.seed)
    model = models.build_autoencoder().to(device, memory_format=torch.channels_last)
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
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        for group in optimizer.param_groups:
            group["lr"], group["capturable"] = lr, device.type == "cuda"
        done = state["step"]
    render = data.Renderer(np.load(work / "sprites.npy"), device)
    pictures = {
        size: draw_pictures(render, args.seed, max(1, args.pool // 10 * share // 10), *size)
        for size, share in {(128, 128): 8, (64, 64): 1, (192, 192): 1}.items()
    }
    sizes = [(128, 128)] * 8 + [(64, 64), (192, 192)]

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

    run = Captured(train, args.graphs)
    began, step, end = time.time(), done, time.time() + 60 * args.minutes
    while step < args.steps and time.time() < end:
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        lr.fill_(cosine(step, args.steps, args.rate))
        height, width = sizes[int(torch.randint(len(sizes), (), generator=generator))]
        count = max(1, args.batch * 128 * 128 // (height * width))
        source = pictures[height, width]
        rows = torch.randint(len(source), (count,), generator=generator).to(device)
        image = vary_colours(source[rows].float() / 127.5 - 1, generator)
        error = run(image=image.contiguous(memory_format=torch.channels_last))
        step += 1
        if step % args.log_every == 0 or step == args.steps:
            psnr = -10 * math.log10(error.item() / 4)
            speed = (step - done) / (time.time() - began)
            print(f"autoencoder {step}/{args.steps} {psnr:.2f} dB {speed:.1f} steps/s", flush=True)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    torch.save(state, path)
    print(f"autoencoder: {held_out_psnr(model, render, args.seed):.2f} dB on new scenes")


@torch.no_grad()
def held_out_psnr(model: torch.nn.Module, render: data.Renderer, seed: int) -> float:
    """Peak signal-to-noise ratio, in dB, of 64 scenes at 128×128 never trained on."""
    rng = np.random.default_rng([seed, 1 << 30])
    image = render(data.SceneBatch.of([scenes.sample(rng)[0] for _ in range(64)]), 128, 128)
    output = model.decode(model.encode(image).latent_dist.mean).sample.clamp(-1, 1)
    return -10 * math.log10(((output - image) ** 2).mean().item() / 4)


def load_autoencoder(args: argparse.Namespace) -> torch.nn.Module:
    autoencoder = models.build_autoencoder().to(args.device)
    state = torch.load(args.work / "autoencoder.pt", map_location=args.device, weights_only=True)
    autoencoder.load_state_dict(state["model"])
    return autoencoder.eval().requires_grad_(False)
