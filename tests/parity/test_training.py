"""Training against PyTorch: loss and gradients on diffusers' transformers, Adam and AdamW."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding

from fluxmesh.models import double_stream
from fluxmesh.models.base import Architecture
from fluxmesh.models.flux1 import positions as flux1_positions
from fluxmesh.models.flux2 import positions as flux2_positions
from fluxmesh.models.registry import published, runtime_of
from fluxmesh.models.tensor_map import to_diffusers
from fluxmesh.training.compute import optimizer
from fluxmesh.training.compute.lora_layers import TrainedLoras
from fluxmesh.training.compute.loss import Batch, loss_and_gradient
from fluxmesh.training.request import TrainRequest
from tests.flux2_checkpoint import architecture_of
from tests.parity import test_flux2_transformer as flux2_oracle
from tests.parity import test_transformer as flux1_oracle
from tests.parity.oracles import normal

GRADIENT_BOUND = 1e-5  # relative L2 error of every LoRA's gradient
SCALE = 0.75
GUIDANCE = 3.5
Arrays = dict[str, np.ndarray]
Factors = dict[str, tuple[torch.Tensor, ...]]  # a and b of each module


@dataclass(frozen=True)
class TrainedCase:
    """A transformer, here and in diffusers, and what differs between families."""

    family: str
    oracle: torch.nn.Module
    flow: Any
    model: Architecture
    batch: int
    grid: tuple[int, int]
    channels: int
    text: int
    has_guidance: bool
    positions: ModuleType

    def drawn(self) -> Arrays:
        """A batch."""
        B, (rows, columns) = self.batch, self.grid
        return {
            "clean": normal(B, rows * columns, self.channels, seed=1),
            "noise": normal(B, rows * columns, self.channels, seed=2),
            "times": np.linspace(0.9, 0.2, B, dtype=np.float32),
            "txt": normal(B, self.text, 20, seed=3),
            "y": normal(B, 12, seed=4),
            "img_ids": self.positions.image_positions(rows, columns),
            "txt_ids": self.positions.text_positions(self.text),
        }

    def features(self, drawn: Arrays) -> dict[str, mx.array]:
        names = {"t5": "txt", "clip": "y"} if self.family == "FLUX.1" else {"prompt": "txt"}
        return {name: mx.array(drawn[key]) for name, key in names.items()}

    def theirs(self, factors: Factors, drawn: Arrays) -> torch.Tensor:
        """The same LoRAs added to diffusers' weights, row by row; the sum of mean square errors."""
        parameters = dict(self.oracle.state_dict())
        for key, pieces in to_diffusers(self.model.transformer_tensors).items():
            deltas = []
            for piece in pieces:
                module = piece.key.removesuffix(".weight")
                if piece.key.endswith(".weight") and module in factors:
                    a, b = factors[module]
                    deltas.append(SCALE * (b.T @ a.T)[piece.start : piece.stop])
            if deltas:
                parameters[key] = parameters[key] + torch.cat(deltas)
        clean, noise, times = (torch.from_numpy(drawn[key]) for key in ("clean", "noise", "times"))
        t = times[:, None, None]
        arguments = {
            "hidden_states": (1 - t) * clean + t * noise,
            "encoder_hidden_states": torch.from_numpy(drawn["txt"]),
            "timestep": times,
            "img_ids": torch.from_numpy(drawn["img_ids"]).float(),
            "txt_ids": torch.from_numpy(drawn["txt_ids"]).float(),
            "guidance": torch.full((len(times),), GUIDANCE) if self.has_guidance else None,
        }
        if self.family == "FLUX.1":
            arguments["pooled_projections"] = torch.from_numpy(drawn["y"])
        out = torch.func.functional_call(self.oracle, parameters, kwargs=arguments).sample
        return ((out - (noise - clean)) ** 2).mean(dim=(1, 2)).sum()


def flux1(name: str) -> TrainedCase:
    case = flux1_oracle.CASES[name]
    oracle, flow = flux1_oracle.build(case, seed=3)
    model = replace(published("dev"), transformer=flow.config)
    sizes = (case.batch, case.grid, case.channels, case.text, case.guidance)
    return TrainedCase("FLUX.1", oracle, flow, model, *sizes, flux1_positions)


def flux2(name: str) -> TrainedCase:
    case = flux2_oracle.CASES[name]
    oracle, flow = flux2_oracle.build(case, seed=3)
    model = architecture_of("dev" if case.guidance else "base", flow.config)
    sizes = (case.batch, case.grid, 16, case.text, case.guidance)
    return TrainedCase("FLUX.2", oracle, flow, model, *sizes, flux2_positions)


def diffusers_embedding(t: mx.array) -> mx.array:
    """`layers.timestep_embedding`, by diffusers."""
    angles = 1000 * torch.from_numpy(np.array(t))
    kind = {"flip_sin_to_cos": True, "downscale_freq_shift": 0}
    return mx.array(get_timestep_embedding(angles, 256, **kind).numpy())


@pytest.mark.parametrize("checkpoint", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        *((flux1, name) for name in ("guidance", "three images, wide", "twelve heads")),
        *((flux2, name) for name in ("guidance", "two images, wide, uneven axes", "twelve heads")),
    ],
)
def test_loss_and_every_lora_gradient_equal_pytorch_s(
    make: Callable[[str], TrainedCase],
    name: str,
    checkpoint: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With diffusers' sinusoids of t and guidance, whose angles of up to 3500 float32 rounds in
    another way than ours do: that alone moves a gradient by up to 1.1e-4."""
    monkeypatch.setattr(double_stream, "timestep_embedding", diffusers_embedding)
    case = make(name)
    request = TrainRequest("data", 5, lora_rank=4, lora_alpha=4 * SCALE)
    adapters = TrainedLoras(case.flow, case.model, request)
    factors, weights = {}, {}
    for i, (module, pair) in enumerate(adapters.weights().items()):
        a = np.array(pair["a"])
        b = 0.2 * normal(*pair["b"].shape, seed=100 + i)  # at zero, A has no gradient
        weights[module] = {"a": mx.array(a), "b": mx.array(b)}
        factors[module] = tuple(torch.from_numpy(x).requires_grad_() for x in (a, b))
    adapters.install(weights)

    drawn = case.drawn()
    ours, gradient = loss_and_gradient(
        runtime_of(case.model),
        adapters,
        Batch(
            *(mx.array(drawn[key]) for key in ("clean", "noise", "times")),
            case.features(drawn),
            case.grid,
        ),
        GUIDANCE,
        checkpoint=checkpoint,
    )
    theirs = case.theirs(factors, drawn)
    theirs.backward()

    assert ours.item() == pytest.approx(theirs.item(), rel=GRADIENT_BOUND)
    worst = 0.0
    for module, pair in adapters.unflatten(gradient).items():
        for part, factor in zip(("a", "b"), factors[module], strict=True):
            mine, expected = np.array(pair[part]), factor.grad.numpy()
            error = np.linalg.norm(mine - expected) / np.linalg.norm(expected)
            worst = max(worst, float(error))
            assert error <= GRADIENT_BOUND, f"{module}.{part}"
    print(f"gradients, {case.family}, {name}: {worst:.1e}")


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
