"""Training against PyTorch: loss and gradients on diffusers' transformer, Adam and AdamW."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch

from fluxmesh.models.flux1.tensor_maps import to_diffusers, transformer_tensors
from fluxmesh.sampling import latents
from fluxmesh.training.compute import optimizer
from fluxmesh.training.compute.lora_layers import TrainedLoras
from fluxmesh.training.compute.loss import Batch, loss_and_gradient
from fluxmesh.training.request import TrainRequest
from tests.parity.oracles import normal
from tests.parity.test_transformer import CASES, build

GRADIENT_BOUND = 1e-3  # relative L2 error of every LoRA's gradient
SCALE = 0.75


def oracle_loss(oracle, config, factors, batch: dict, guidance: float | None) -> torch.Tensor:
    """The same LoRAs added to diffusers' weights, row by row; the sum of mean square errors."""
    parameters = dict(oracle.state_dict())
    for key, pieces in to_diffusers(transformer_tensors(config)).items():
        deltas = []
        for piece in pieces:
            module = piece.key.removesuffix(".weight")
            if piece.key.endswith(".weight") and module in factors:
                a, b = factors[module]
                deltas.append(SCALE * (b.T @ a.T)[piece.start : piece.stop])
        if deltas:
            parameters[key] = parameters[key] + torch.cat(deltas)
    clean, drawn = (torch.from_numpy(batch[name]) for name in ("clean", "noise"))
    times = torch.from_numpy(batch["times"])
    t = times[:, None, None]
    arguments = {
        "hidden_states": (1 - t) * clean + t * drawn,
        "encoder_hidden_states": torch.from_numpy(batch["txt"]),
        "pooled_projections": torch.from_numpy(batch["y"]),
        "timestep": times,
        "img_ids": torch.from_numpy(batch["img_ids"]).float(),
        "txt_ids": torch.from_numpy(batch["txt_ids"]).float(),
        "guidance": None if guidance is None else torch.full((len(times),), guidance),
    }
    out = torch.func.functional_call(oracle, parameters, kwargs=arguments).sample
    return ((out - (drawn - clean)) ** 2).mean(dim=(1, 2)).sum()


@pytest.mark.parametrize("checkpoint", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("name", ["guidance", "three images, wide", "twelve heads"])
def test_loss_and_every_lora_gradient_equal_pytorch_s(name: str, checkpoint: bool) -> None:
    case = CASES[name]
    oracle, flux = build(case, seed=3)
    request = TrainRequest("data", 5, lora_rank=4, lora_alpha=4 * SCALE)
    adapters = TrainedLoras(flux, request)
    factors, weights = {}, {}
    for i, (module, pair) in enumerate(adapters.weights().items()):
        a = np.array(pair["a"])
        b = 0.2 * normal(*pair["b"].shape, seed=100 + i)  # at zero, A has no gradient
        weights[module] = {"a": mx.array(a), "b": mx.array(b)}
        factors[module] = tuple(torch.from_numpy(x).requires_grad_() for x in (a, b))
    adapters.install(weights)

    B, (rows, columns) = case.batch, case.grid
    batch = {
        "clean": normal(B, rows * columns, case.channels, seed=1),
        "noise": normal(B, rows * columns, case.channels, seed=2),
        "times": np.linspace(0.9, 0.2, B, dtype=np.float32),
        "txt": normal(B, case.text, 20, seed=3),
        "y": normal(B, 12, seed=4),
        "img_ids": latents.image_positions(rows, columns),
        "txt_ids": latents.text_positions(case.text),
    }
    guidance = 3.5 if case.guidance else None
    ours, gradient = loss_and_gradient(
        flux,
        adapters,
        Batch(
            *(mx.array(batch[key]) for key in ("clean", "noise", "times", "txt", "y")), case.grid
        ),
        3.5,
        checkpoint=checkpoint,
    )
    theirs = oracle_loss(oracle, flux.config, factors, batch, guidance)
    theirs.backward()

    assert ours.item() == pytest.approx(theirs.item(), rel=GRADIENT_BOUND)
    worst = 0.0
    for module, pair in adapters.unflatten(gradient).items():
        for part, factor in zip(("a", "b"), factors[module], strict=True):
            mine, expected = np.array(pair[part]), factor.grad.numpy()
            error = np.linalg.norm(mine - expected) / np.linalg.norm(expected)
            worst = max(worst, float(error))
            assert error <= GRADIENT_BOUND, f"{module}.{part}"
    print(f"gradients, {name}: {worst:.1e}")


@pytest.mark.parametrize("kind", ["adam", "adamw"])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_the_optimizer_moves_as_pytorch_s(kind: str, clip: float | None) -> None:
    request = TrainRequest("data", 1, optimizer=kind, weight_decay=0.1, clip_norm=clip)
    start = normal(50, seed=0)
    theirs = torch.nn.Parameter(torch.from_numpy(start.copy()))
    if kind == "adam":
        oracle: torch.optim.Optimizer = torch.optim.Adam([theirs])
    else:
        oracle = torch.optim.AdamW([theirs], weight_decay=0.1)
    state = optimizer.begin(mx.array(start), request)
    for step in range(12):
        gradient, rate = normal(50, seed=step + 1) * 10.0 ** -(step % 5), 1e-2 / (step + 1)
        theirs.grad = torch.from_numpy(gradient.copy())
        norm = float(np.linalg.norm(gradient))
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([theirs], clip)
        oracle.param_groups[0]["lr"] = rate
        oracle.step()
        state, measured_norm = optimizer.advance(state, mx.array(gradient), rate, request)
        assert measured_norm == pytest.approx(norm, rel=1e-5)
    moved = np.linalg.norm(theirs.detach().numpy() - start)
    away = np.linalg.norm(np.array(state.weights) - theirs.detach().numpy())
    assert away <= 1e-5 * moved
