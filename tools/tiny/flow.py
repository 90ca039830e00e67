"""The second stage of training: text encoders and transformer together, by flow matching.

Rectified flow (Liu et al. 2022; Esser et al. 2024): a step along a straight line from the tokens
of a picture to noise, the velocity is the target. References stand behind the noised tokens, clean,
and have no part in the loss. Tokens are drawn beforehand, in pools.
"""

from __future__ import annotations

import argparse
import math
import shutil
from pathlib import Path
from typing import Any

import data
import numpy as np
import torch
import torch.nn.functional as F
from autoencoder import FrozenAutoencoder
from blueprint import Blueprint, PictureSizes, TrainingShape
from capture import Captured
from schedule import Sitting, cosine

AVERAGED = 0.002  # part of the newest weights in their moving average


class TinyFlow:
    """Text encoders and transformer in bfloat16, with float32 masters, their EMA and AdamW.

    `step(clean=, given=, image_ids=, **text)` runs one optimizer step at the rate in `rate` and
    returns the loss.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = torch.device(args.device)
        # A first run on CUDA read out of bounds in the backward pass. It went away with these two
        # off and eager attention in the text encoders; which of the changes did it is not known.
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        self.blueprint: Blueprint = args.blueprint
        torch.manual_seed(args.seed)
        self.modules = self.blueprint.build_models(args.work / "checkpoint").to(self.device)
        self.weights = [p for p in self.modules.parameters() if p.requires_grad]
        self.masters = [p.detach().clone() for p in self.weights]
        self.averages = [p.clone() for p in self.masters]
        self.modules.to(torch.bfloat16)
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        self.rate = torch.tensor(0.0, device=self.device)
        self.optimizer = torch.optim.AdamW(
            self.masters, lr=self.rate, betas=(0.9, 0.98), weight_decay=0.01,
            fused=True, capturable=self.device.type == "cuda",
        )  # fmt: skip
        self.step = Captured(self._step, args.graphs)
        if args.compile:
            self.blueprint.compile(self.modules)

    def loss(
        self,
        clean: torch.Tensor,
        given: torch.Tensor,
        image_ids: torch.Tensor,
        **text: torch.Tensor,
    ) -> torch.Tensor:
        """Mean squared error of the velocity; tokens to paint and of references [B, tokens, 4C]."""
        clean = clean.float()
        noise = torch.randn_like(clean)
        t = self.times(len(clean))
        noised = torch.lerp(clean, noise, t[:, None, None])
        # Pictures that people give were decoded before: a little off what they were made as.
        amount = self.blueprint.reference_noise * torch.rand_like(given[:, :1, :1].float())
        given = given.float() + amount * torch.randn_like(given.float())
        velocity = self.blueprint.velocity(
            self.modules, torch.cat([noised, given], dim=1), t,
            self.blueprint.encode(self.modules, text), image_ids,
        )  # fmt: skip
        return F.mse_loss(velocity[:, : clean.shape[1]].float(), noise - clean)

    def times(self, count: int) -> torch.Tensor:
        """Noise levels [count]: half uniform and shifted, half among the noisiest.

        Above 0.9 the picture can't be guessed from its noised self, so that it must come from the
        text; below, it is seen already. Shifted uniform times alone go there one time in six.
        """
        uniform, noisiest, choice = torch.rand(3, count, device=self.device)
        shift = self.blueprint.time_shift
        shifted = shift * uniform / (1 + (shift - 1) * uniform)
        return torch.where(choice < 0.5, shifted, 1 - 0.1 * noisiest)

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
            torch._foreach_lerp_(self.averages, self.masters, AVERAGED)
        return loss.detach()

    def state(self) -> dict[str, list[torch.Tensor]]:
        """What another sitting goes on from.

        In bfloat16, as the models run, and without the optimizer's moments, which the next
        sitting's warm-up finds again: a quarter of the bytes.
        """
        return {
            "masters": [master.bfloat16() for master in self.masters],
            "averages": [average.bfloat16() for average in self.averages],
        }

    def load(self, state: dict[str, Any]) -> None:
        for mine, theirs in ((self.masters, "masters"), (self.averages, "averages")):
            for old, new in zip(mine, state[theirs], strict=True):
                old.data.copy_(new)
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)


def begin(args: argparse.Namespace) -> bool:
    """From a checkpoint's folder, W/checkpoint, the state that further sittings go on from.

    Once: what was trained since is not begun anew by the same command.
    """
    if (args.work / "flow.pt").exists():
        return True
    checkpoint, blueprint = args.work / "checkpoint", args.blueprint
    autoencoder = blueprint.build_autoencoder()
    autoencoder = type(autoencoder).from_pretrained(checkpoint / "vae")
    mean, deviation = blueprint.kept_statistics(autoencoder)
    torch.save(
        {"model": autoencoder.state_dict(), "step": 0, "seconds": 0.0,
         "mean": mean, "deviation": deviation},
        args.work / "autoencoder.pt",
    )  # fmt: skip
    modules = blueprint.build_models(checkpoint)
    for name, module in modules.items():
        module.load_state_dict(type(module).from_pretrained(checkpoint / name).state_dict())
    weights = [p.detach().bfloat16() for p in modules.parameters() if p.requires_grad]
    torch.save(
        {"masters": weights, "averages": weights, "steps": {}, "seconds": {}},
        args.work / "flow.pt",
    )
    print(f"{args.work}: the state of {checkpoint}, of no steps yet", flush=True)
    return True


def averaged(args: argparse.Namespace) -> tuple[torch.nn.ModuleDict, dict[str, int]]:
    """The trained models, averaged weights in bfloat16, and the steps of each stage."""
    state = torch.load(args.work / "flow.pt", map_location=args.device, weights_only=True)
    torch.manual_seed(args.seed)  # for the parts that are never trained
    modules = args.blueprint.build_models(args.work / "checkpoint").to(args.device)
    weights = [p for p in modules.parameters() if p.requires_grad]
    for weight, average in zip(weights, state["averages"], strict=True):
        weight.data.copy_(average)
    return modules.to(torch.bfloat16).eval().requires_grad_(False), state["steps"]


class Pools:
    """Examples of all shapes of a stage, and batches of them."""

    def __init__(
        self, args: argparse.Namespace, shapes: tuple[TrainingShape, ...], seed: int,
        autoencoder: FrozenAutoencoder,
    ) -> None:  # fmt: skip
        self.shapes, self.batch = shapes, args.batch
        self.blueprint: Blueprint = args.blueprint
        self.rng = np.random.default_rng(seed)
        self.device = torch.device(args.device)
        render = data.Renderer(data.load_sprites(args.work), self.device)
        tokens = self.blueprint.load_tokens(args.work / "checkpoint")
        shares: dict[PictureSizes, float] = {}
        for shape in shapes:
            shares[shape.sizes] = shares.get(shape.sizes, 0.0) + shape.share
        total = sum(shares.values())
        self.pools = {
            sizes: data.build_pool(
                autoencoder.encode, render, tokens, seed + index,
                max(64, int(args.pool * share / total)), sizes,
            )
            for index, (sizes, share) in enumerate(shares.items())
        }  # fmt: skip
        self.ids = {
            sizes: self.blueprint.picture_ids(sizes.height, sizes.width, sizes.references).to(
                self.device
            )
            for sizes in self.pools
        }

    def next(self) -> dict[str, torch.Tensor]:
        """Draws a shape and a batch of its pool; longer ones come in smaller batches."""
        shares = np.array([shape.share for shape in self.shapes])
        shape = self.shapes[int(self.rng.choice(len(shares), p=shares / shares.sum()))]
        pool, ids = self.pools[shape.sizes], self.ids[shape.sizes]
        length = shape.text_length
        whole = self.blueprint.whole_batch
        count = max(1, self.batch * whole // max(whole, len(ids) + (length or 0)))
        if length is None:
            length = int(self.rng.integers(5, 17))
            rows = self.rng.choice(np.flatnonzero(pool.real == length), size=count)
        else:
            rows = self.rng.integers(len(pool.real), size=count)
        where = torch.from_numpy(rows).to(self.device)
        text = {name: part[where] for name, part in pool.text.items()}
        clean, *given = (part[where] for part in pool.pictures)
        return {
            "clean": clean,
            "given": torch.cat([clean[:, :0], *given], dim=1),
            "image_ids": ids,
            **self.blueprint.cut_text(text, length),
        }


def train_flow(args: argparse.Namespace) -> bool:
    """One sitting of `flow` (few shapes, many steps) or `last` (every shape, to the end)."""
    device, path = torch.device(args.device), args.work / "flow.pt"
    sitting = Sitting(args.seconds, args.budget)
    state = torch.load(path, map_location=device, weights_only=True) if path.exists() else None
    steps_of: dict[str, int] = dict(state["steps"]) if state else {}
    seconds_of: dict[str, float] = dict(state["seconds"]) if state else {}
    done = steps_of.get(args.stage, 0)
    sitting.spent = seconds_of.get(args.stage, 0.0)
    seed = args.seed * 1_000_003 + 1009 * sum(steps_of.values())
    shapes = args.blueprint.last_shapes if args.stage == "last" else args.blueprint.shapes
    if args.stage == "last":
        args.compile = False  # so many shapes are not worth it
        args.pool //= 4
    pools = Pools(args, shapes, seed, FrozenAutoencoder(args))
    print(f"{args.stage}: pools after {sitting.elapsed:.0f} s, step {done}", flush=True)
    flow = TinyFlow(args)
    if state:
        flow.load(state)
    torch.manual_seed(seed)

    def save() -> None:
        kept = {
            "steps": {**steps_of, args.stage: step},
            "seconds": {**seconds_of, args.stage: sitting.spent + sitting.elapsed},
        }
        torch.save({**flow.state(), **kept}, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    losses: list[torch.Tensor] = []
    step = done
    while step < args.steps and not sitting.is_over:
        flow.rate.fill_(cosine(step, args.steps, args.rate, sitting.share, since=step - done))
        losses.append(flow.step(**pools.next()))
        step += 1
        if step % args.log_every == 0 or step == args.steps:
            loss = torch.stack(losses).mean().item()
            losses.clear()
            sitting.progress(f"{args.stage} {step}/{args.steps} loss {loss:.4f}", step - done)
            if not math.isfinite(loss):
                raise SystemExit(f"{args.stage}: the loss is not finite; the last state is kept")
        if sitting.is_time_to_save:
            save()
    save()
    finished = step >= args.steps or sitting.share >= 1
    print(f"{args.stage}: {step} steps, saved after {sitting.elapsed:.0f} s", flush=True)
    return finished


def export(args: argparse.Namespace) -> bool:
    """Writes the checkpoint: a complete folder, every model in bfloat16."""
    checkpoint: Path = args.work / "checkpoint"
    modules, steps = averaged(args)
    for name, module in {"vae": FrozenAutoencoder(args).model, **modules}.items():
        shutil.rmtree(checkpoint / name, ignore_errors=True)
        module.to(torch.bfloat16).save_pretrained(checkpoint / name)
    args.blueprint.write_index(checkpoint)
    nbytes = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    print(f"{checkpoint}: {nbytes / 1e6:.1f} MB, written after {steps} steps")
    return True
