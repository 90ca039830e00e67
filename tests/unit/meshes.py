"""Meshes and models for tests of the planner, of FLUX.1's real sizes and small; its options."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fluxmesh.cluster.snapshot import (
    Holding,
    HostInfo,
    LinkInfo,
    MeshView,
    ModelVariant,
    TextHolding,
    prompt_mark,
)
from fluxmesh.models.base import ModelDefaults
from fluxmesh.models.flux1.architecture import Flux1Architecture
from fluxmesh.models.flux1.config import AutoencoderConfig, ClipConfig, FluxConfig, T5Config
from fluxmesh.planning.plan import Option, Plan
from fluxmesh.planning.workload import ModelSizes
from fluxmesh.request import FilledRequest, GenerateRequest
from fluxmesh_coordinator.runtime.resolved import Resolved, ResolvedModel

GB = 10**9
LOWER = ("jaccl-ring", "ring")  # what a ring over jaccl falls back to, in turn
FLUX = ModelSizes(
    Flux1Architecture(
        FluxConfig(),
        T5Config(),
        ClipConfig(),
        AutoencoderConfig(),
        ModelDefaults(steps=4, guidance=0.0, height=1024, width=1024, t5_max_length=512),
    )
)


def small(heads: int = 4, head_dim: int = 16, mlp_ratio: float = 4.0) -> ModelSizes:
    """A model that is quick to count."""
    return ModelSizes(
        Flux1Architecture(
            FluxConfig(
                in_channels=16,
                vec_in_dim=32,
                context_in_dim=32,
                hidden_size=heads * head_dim,
                num_heads=heads,
                depth=1,
                depth_single_blocks=2,
                mlp_ratio=mlp_ratio,
                axes_dim=(head_dim // 2, head_dim // 4, head_dim // 4),
            ),
            T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4),
            ClipConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1),
            AutoencoderConfig(widths=(16, 32), num_res_blocks=1, norm_groups=8),
            ModelDefaults(steps=2, guidance=0.0, height=64, width=64, t5_max_length=16),
        )
    )


def with_defaults(sizes: ModelSizes, defaults: ModelDefaults) -> ModelSizes:
    """The same model, with other defaults."""
    assert isinstance(sizes.architecture, Flux1Architecture)
    return replace(sizes, architecture=replace(sizes.architecture, defaults=defaults))


def ask(**keys: Any) -> FilledRequest:
    """A request, with what is not given as `FLUX` has it."""
    return FLUX.fill(GenerateRequest(**{"prompt": "a cat", "seed": 0, "model": "m", **keys}))


def resolved(request: GenerateRequest, revision: str = "abc") -> Resolved:
    """A request to a model of `small` sizes, which is called as the request calls it."""
    return Resolved.of(request, ResolvedModel(request.model, request.model, small(), revision))


def held(shards: int = 1, shard: int = 0, **keys: Any) -> Holding:
    """What an engine with the weights of `ask(**keys)` holds."""
    return Holding(
        weights=ModelVariant.of(ask(**keys)), nbytes=24 * GB // shards, shards=shards, shard=shard
    )


def warm_text(prompt: str = "a cat", nbytes: int = 10 * GB, **keys: Any) -> TextHolding:
    """What an engine that has read `prompt` for `ask(**keys)` keeps of that."""
    marks = (prompt_mark(prompt),)
    return TextHolding(weights=ModelVariant.of(ask(**keys)), nbytes=nbytes, prompts=marks)


def mac(rank: int, **keys: Any) -> HostInfo:
    """An M2 Ultra with 192 GB, FLUX in memory, and 2.86 s a step at 1024x1024."""
    fields: dict[str, Any] = {
        "name": f"mac{rank}",
        "kind": "Apple M2 Ultra",
        "memory_bytes": 144 * GB,
        "free_bytes": 120 * GB,
        "flops_per_second": 26e12,
        "load_rate": 3e9,
        "holds": held(),
        "platform": "cuda",  # a GPU that decodes all of a picture at once
    }
    if "holds" not in keys:  # and "a cat" was asked for before
        fields["text"] = warm_text()
    return HostInfo(rank=rank, **{**fields, **keys})


def ring(*hosts: HostInfo, rate: float = 5e9) -> MeshView:
    """Cables between neighbours alone, as in a thunderbolt ring."""
    ranks = [host.rank for host in hosts]
    following = zip(ranks, ranks[1:] + ranks[:1], strict=True)
    pairs = {pair for a, b in following for pair in ((a, b), (b, a))}
    return MeshView(
        hosts,
        tuple(
            LinkInfo(source=a, target=b, rate=rate, latency=1e-4)
            for a, b in sorted(pairs)
            if a != b
        ),
    )


def full(*hosts: HostInfo, rate: float = 5e9, backend: str = "ring") -> MeshView:
    """A link from every host to every other."""
    return MeshView(
        hosts,
        tuple(
            LinkInfo(source=a.rank, target=b.rank, rate=rate, latency=1e-4)
            for a in hosts
            for b in hosts
            if a.rank != b.rank
        ),
        backend,
    )


def without(view: MeshView, rank: int) -> MeshView:
    """The mesh after a host is gone."""
    return replace(view, hosts=tuple(host for host in view.hosts if host.rank != rank))


def option(choice: Plan, name: str, hosts: int | None = None) -> Option:
    """The plan's option of that name and, for rings, on so many hosts."""
    (match,) = [
        option
        for option in choice.options
        if option.name == name and (hosts is None or len(option.ranks) == hosts)
    ]
    return match


def won(choice: Plan) -> Option:
    """What the plan takes, which there must be."""
    assert choice.winner is not None, choice.reason
    return choice.winner


def reading(choice: Plan) -> tuple[int, str]:
    """Who reads the prompt as the plan takes it, and how."""
    text = won(choice).text
    assert text is not None
    return text.rank, text.way
