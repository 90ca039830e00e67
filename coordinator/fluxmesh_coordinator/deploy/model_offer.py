"""Which hosts lack a model that another has, and what copying it there would take. Pure.

`up` offers this before it offers the Hub; `model_push.py` does it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fluxmesh.cluster.snapshot import LinkInfo
from fluxmesh_coordinator.deploy import checks
from fluxmesh_coordinator.deploy.checks import Look


@dataclass(frozen=True)
class PushOffer:
    """A copy of a model to the hosts that lack it."""

    model: str
    where: str  # it lies: "here", "on host 2"
    ranks: tuple[int, ...]  # that lack it, or have other files under its name
    nbytes: int
    seconds: float | None  # that it takes; None where no link was measured yet


def push_offer(
    model: str, here: Look, looks: Mapping[int, Look], links: Sequence[LinkInfo]
) -> PushOffer | None:
    """None where nobody lacks it, or nobody has it. `looks` are by rank, `here` is this machine's.

    Each host passes on what it gets, so that many take as long as the one with the slowest link.
    """
    has = checks.reference(here, looks)
    lacking = tuple(
        rank
        for rank, look in looks.items()
        if look.get("model", {}).get("content") != has.model.get("content")
    )
    if not has.model or not lacking:
        return None
    nbytes = int(has.model["bytes"])
    slowest = min(_rate_into(rank, links) for rank in lacking)
    seconds = nbytes / slowest if slowest else None
    return PushOffer(model, has.where, lacking, nbytes, seconds)


def _rate_into(rank: int, links: Sequence[LinkInfo]) -> float:
    """Of a host's fastest link; 0 where none was measured."""
    return max((link.rate for link in links if link.target == rank), default=0.0)
