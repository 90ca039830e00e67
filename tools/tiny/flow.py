"""The second stage of training: both text encoders and the transformer, by flow matching.

Rectified flow (Liu et al. 2022; Esser et al. 2024): a step along a straight line from the latents
of a picture to noise, the velocity is the target. Latents are drawn beforehand, in pools.
"""

from __future__ import annotations

import argparse
import copy
import math
import time

import data
import models
import numpy as np
import scenes
import torch
import torch.nn.functional as F
from autoencoder import load_autoencoder
from capture import Captured
from PIL import Image
from schedule import cosine
from score import Reader, table

SHAPES = (  # (height, width, T5's length or None for captions unpadded, share of the steps)
    (128, 128, models.TEXT_TOKENS, 0.76),
    (64, 64, models.TEXT_TOKENS, 0.12),
    (192, 192, models.TEXT_TOKENS, 0.12),
)
# The last stage meets every size and length; so many shapes are not worth compiling for.
LAST_SHAPES = (
    (128, 128, models.TEXT_TOKENS, 0.30),
    (64, 64, models.TEXT_TOKENS, 0.06),
    (192, 192, models.TEXT_TOKENS, 0.06),
    (96, 96, models.TEXT_TOKENS, 0.06),
    (160, 160, models.TEXT_TOKENS, 0.05),
    (128, 192, models.TEXT_TOKENS, 0.06),
    (192, 128, models.TEXT_TOKENS, 0.06),
    (64, 128, models.TEXT_TOKENS, 0.04),
    (128, 64, models.TEXT_TOKENS, 0.04),
    (128, 128, 24, 0.05),
    (128, 128, 48, 0.05),
    (128, 128, 64, 0.04),
    (128, 128, None, 0.13),
)
LONGEST = 64


class TinyFlow:
    """Text encoders and transformer in bfloat16, with float32 masters, their EMA and AdamW.

    `step(latents=, t5=, clip=, image_ids=)` runs one optimizer step at the rate in `rate` and
    returns the loss.
    """

    def __init__(self, args: argparse.Namespace, shift: float, scale: float) -> None:
        self.device = torch.device(args.device)
        # A first run on CUDA read out of bounds in the backward pass. It went away with these two
        # off and eager attention in the text encoders; which of the changes did it is not known.
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        self.shift, self.scale = shift, scale
        torch.manual_seed(args.seed)
        t5, clip = models.build_text_encoders(args.work / "checkpoint")
        self.modules = torch.nn.ModuleDict(
            {"text_encoder_2": t5, "text_encoder": clip, "transformer": models.build_transformer()}
        ).to(self.device)
        self.masters = [p.detach().clone() for p in self.modules.parameters()]
        self.averages = [p.clone() for p in self.masters]
        self.modules.to(torch.bfloat16)
        self.weights = list(self.modules.parameters())
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        self.rate = torch.tensor(0.0, device=self.device)
        self.optimizer = torch.optim.AdamW(
            self.masters, lr=self.rate, betas=(0.9, 0.98), weight_decay=0.01,
            fused=True, capturable=self.device.type == "cuda",
        )  # fmt: skip
        self.step = Captured(self._step, args.graphs)
        if args.compile:
            self.modules["transformer"].compile_repeated_blocks(dynamic=False)
        # diffusers rounds t·1000 to the weights' dtype; the embedding gets the exact value here.
        self.time = torch.zeros(1, device=self.device)
        self.modules["transformer"].time_text_embed.register_forward_pre_hook(
            lambda _, inputs: (self.time, *inputs[1:])
        )

    def loss(
        self, latents: torch.Tensor, t5: torch.Tensor, clip: torch.Tensor, image_ids: torch.Tensor
    ) -> torch.Tensor:
        """Mean squared error of the velocity; latents [B, L, 64]."""
        clean = (latents.float() - self.shift) * self.scale
        noise = torch.randn_like(clean)
        t = self.times(len(clean))
        noised = torch.lerp(clean, noise, t[:, None, None])
        velocity = self.velocity(noised, t, *self.encode(t5, clip), image_ids)
        return F.mse_loss(velocity.float(), noise - clean)

    def times(self, count: int) -> torch.Tensor:
        """Noise levels [count]: half uniform and shifted, half among the noisiest.

        Above 0.9 the picture can't be guessed from its noised self, so that it must come from the
        text; below, it is seen already. Shifted uniform times alone go there one time in six.
        """
        uniform, noisiest, choice = torch.rand(3, count, device=self.device)
        shifted = models.SHIFT * uniform / (1 + (models.SHIFT - 1) * uniform)
        return torch.where(choice < 0.5, shifted, 1 - 0.1 * noisiest)

    def encode(self, t5: torch.Tensor, clip: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Whole masks of our own: the ones that transformers makes can't be captured in a graph.
        full = torch.zeros(1, 1, t5.shape[1], t5.shape[1], device=self.device).bfloat16()
        causal = torch.full((1, 1, clip.shape[1], clip.shape[1]), -1e9, device=self.device)
        causal = causal.triu(1).bfloat16()
        features = self.modules["text_encoder_2"](t5, attention_mask=full).last_hidden_state
        return features, self.modules["text_encoder"](clip, attention_mask=causal).pooler_output

    def velocity(
        self, noised: torch.Tensor, t: torch.Tensor, features: torch.Tensor, pooled: torch.Tensor,
        image_ids: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        self.time = t * 1000
        return self.modules["transformer"](
            hidden_states=noised.bfloat16(), timestep=t,
            encoder_hidden_states=features, pooled_projections=pooled, img_ids=image_ids,
            txt_ids=torch.zeros(features.shape[1], 3, device=self.device), return_dict=False,
        )[0]  # fmt: skip

    def _step(self, **inputs: torch.Tensor) -> torch.Tensor:
        for weight in self.weights:
            weight.grad = None
        loss = self.loss(**inputs)
        loss.backward()
        gradients = [master.grad for master in self.masters]
        torch._foreach_copy_(gradients, [w.grad if w.grad is not None else torch.zeros_like(w)
                                         for w in self.weights])  # fmt: skip
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0, foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)
            torch._foreach_lerp_(self.averages, self.masters, 0.002)
        return loss.detach()

    def state(self) -> dict:
        return {
            "masters": self.masters,
            "averages": self.averages,
            "optimizer": self.optimizer.state_dict(),
        }

    def load(self, state: dict) -> None:
        for mine, theirs in ((self.masters, "masters"), (self.averages, "averages")):
            for old, new in zip(mine, state[theirs], strict=True):
                old.data.copy_(new)
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["lr"], group["capturable"] = self.rate, self.device.type == "cuda"
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)

    def averaged(self) -> torch.nn.ModuleDict:
        """A copy of the modules that holds the averaged weights, in bfloat16."""
        modules = copy.deepcopy(self.modules)
        for weight, average in zip(modules.parameters(), self.averages, strict=True):
            weight.data.copy_(average)
        return modules


def image_ids(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Positions of image tokens, float32 [tokens, 3]: (0, row, column)."""
    rows, columns = height // data.PATCH, width // data.PATCH
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)[None, :]
    return ids.view(-1, 3).to(device)


def next_batch(
    pools: dict[tuple[int, int], data.Pool],
    shapes: tuple[tuple[int, int, int | None, float], ...],
    rng: np.random.Generator,
    batch: int,
) -> dict[str, torch.Tensor]:
    """Draws a shape and a batch of its pool; large pictures come in smaller batches."""
    shares = np.array([share for *_, share in shapes])
    height, width, length, _ = shapes[int(rng.choice(len(shapes), p=shares / shares.sum()))]
    pool = pools[height, width]
    count = max(1, batch * 128 * 128 // max(128 * 128, height * width))
    if length is None:
        length = int(rng.integers(5, 17))
        rows = rng.choice(np.flatnonzero(pool.real == length), size=count)
    else:
        rows = rng.integers(len(pool.real), size=count)
    where = torch.from_numpy(rows).to(pool.t5.device)
    return {
        "latents": pool.latents[where],
        "t5": pool.t5[where, :length],
        "clip": pool.clip[where],
        "image_ids": image_ids(height, width, pool.t5.device),
    }


def pool_shares(shapes: tuple[tuple[int, int, int | None, float], ...]) -> dict:
    """(height, width) to its share of the pool, in the order of `shapes`."""
    shares: dict[tuple[int, int], float] = {}
    for height, width, _, share in shapes:
        shares[height, width] = shares.get((height, width), 0.0) + share
    total = sum(shares.values())
    return {size: share / total for size, share in shares.items()}


def train_flow(args: argparse.Namespace) -> None:
    """One sitting of `flow` (few shapes, many steps) or `last` (every shape, to the end)."""
    work, device = args.work, torch.device(args.device)
    end = time.time() + 60 * args.minutes
    shapes = LAST_SHAPES if args.stage == "last" else SHAPES
    autoencoder = load_autoencoder(args)
    render = data.Renderer(np.load(work / "sprites.npy"), device)
    text = data.TextTokens(work / "checkpoint", LONGEST)
    path = work / "flow.pt"
    state = torch.load(path, map_location=device, weights_only=True) if path.exists() else None
    done = state["steps"].get(args.stage, 0) if state else 0
    seed = args.seed * 1_000_003 + 1009 * sum(state["steps"].values() if state else (0,))
    pools = {}
    for index, (size, share) in enumerate(pool_shares(shapes).items()):
        count = max(64, int(args.pool * share))
        pools[size] = data.build_pool(autoencoder, render, text, seed + index, count, *size)
    print(
        f"{args.stage}: pools of {args.pool} pictures, {end - time.time():.0f} s left", flush=True
    )
    if state:
        shift, scale = state["shift"], state["scale"]
    else:
        latents = pools[128, 128].latents.float()
        shift, scale = latents.mean().item(), 1 / latents.std().item()
    flow = TinyFlow(args, shift, scale)
    if state:
        flow.load(state)
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    losses: list[torch.Tensor] = []
    began, step = time.time(), done
    while step < args.steps and time.time() < end:
        flow.rate.fill_(cosine(step, args.steps, args.rate))
        losses.append(flow.step(**next_batch(pools, shapes, rng, args.batch)))
        step += 1
        if step % args.log_every == 0 or step == args.steps:
            loss = torch.stack(losses).mean().item()
            losses.clear()
            rate = (step - done) / (time.time() - began)
            print(
                f"{args.stage} {step}/{args.steps} loss {loss:.4f} {rate:.1f} steps/s", flush=True
            )
            if not math.isfinite(loss):
                raise SystemExit(f"{args.stage}: the loss is not finite; the last state is kept")
    steps = {**(state["steps"] if state else {}), args.stage: step}
    torch.save({**flow.state(), "steps": steps, "shift": shift, "scale": scale}, path)
    look(args, flow, autoencoder, text)


@torch.no_grad()
def paint(
    flow: TinyFlow, modules: torch.nn.ModuleDict, autoencoder: torch.nn.Module,
    text: data.TextTokens, prompts: list[str], steps: int,
) -> np.ndarray:  # fmt: skip
    """Pictures of prompts at 128×128 by Euler's method, uint8 [prompts, 128, 128, 3]."""
    t5, _, clip = text(prompts)
    original, flow.modules = flow.modules, modules
    ids = image_ids(128, 128, flow.device)
    words = torch.from_numpy(t5[:, : models.TEXT_TOKENS]).to(flow.device)
    features, pooled = flow.encode(words, torch.from_numpy(clip).to(flow.device))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(prompts), len(ids), 64, generator=generator).to(flow.device)
    times = torch.linspace(1, 0, steps + 1)
    times = (models.SHIFT * times / (1 + (models.SHIFT - 1) * times)).tolist()
    for now, after in zip(times, times[1:], strict=False):
        t = torch.full((len(x),), now, device=flow.device)
        x = x + (after - now) * flow.velocity(x, t, features, pooled, ids).float()
    flow.modules = original
    image = autoencoder.decode(data.unpack(x / flow.scale + flow.shift, 128, 128)).sample
    return ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def look(
    args: argparse.Namespace, flow: TinyFlow, autoencoder: torch.nn.Module, text: data.TextTokens
) -> None:
    """Scores held-out prompts and writes a contact sheet, `W/look.png`."""
    questions = scenes.questions(args.questions, 0)
    modules = flow.averaged()
    reader = Reader(np.load(args.work / "sprites.npy"), 128, 128)
    for steps in (4, 8):
        pictures = paint(flow, modules, autoencoder, text, [q.prompt for q in questions], steps)
        verdicts = [reader.judge(p, q) for p, q in zip(pictures, questions, strict=True)]
        row = "  ".join(f"{name} {value:.1f}%" for name, value in table(verdicts).items())
        print(f"{steps} steps: {row}", flush=True)
    columns = len(questions) // 4
    rows = [np.concatenate(pictures[r * columns :][:columns], axis=1) for r in range(4)]
    Image.fromarray(np.concatenate(rows)).save(args.work / "look.png")
