"""Which hosts hold which part of a model: all of it on each, or a shard each. Pure.

`warmup.py` asks it once it knows what every host has in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from fluxmesh.cluster.shares import EVEN, Shares
from fluxmesh.cluster.snapshot import MeshView
from fluxmesh.errors import DoesNotFitError
from fluxmesh.planning.capacity import Memory, shortage
from fluxmesh.planning.remedies import for_weights
from fluxmesh.planning.share_choice import ShareChoice
from fluxmesh.planning.step_times import StepTimes
from fluxmesh.planning.workload import Workload
from fluxmesh_coordinator.jobs import remedies


@dataclass(frozen=True)
class ShardLayout:
    """Who holds what: shard i of `shards` on `ranks[i]`, or all of it on each where that is 1."""

    ranks: tuple[int, ...]
    shards: int
    idle: tuple[int, ...] = ()  # hosts that can't hold their part
    why: str = ""  # they can't
    shares: Shares = EVEN  # of the shards

    def shard(self, rank: int) -> int:
        return self.ranks.index(rank) if self.shards > 1 else 0


def layout(work: Workload, view: MeshView) -> ShardLayout:
    """As `_layout`. Raises `DoesNotFitError`, with what helps, where no host can hold its part."""
    place = _layout(work, view)
    if place.ranks:
        return place

    def fits(work: Workload, view: MeshView) -> int | None:
        place, memory = _layout(work, view), Memory(work, view)
        if place.shards < 2:
            needed = (memory.needed(rank, "data", 1, 1) for rank in place.ranks)
            return max(needed, default=None)
        needs = memory.together("tensor", place.ranks, place.shards, place.shares)
        return max(need.needed for need in needs)

    helps = remedies.sentences(for_weights(work, view, fits)) or "Use more hosts."
    raise DoesNotFitError(f"{work.weights.model} does not fit: {place.why}. {helps}")


def _layout(work: Workload, view: MeshView) -> ShardLayout:
    """Replicated where that fits, else sharded, else replicated on the hosts where it fits.

    Without ranks or shards where no host can hold its part.
    """
    memory, ranks, size = Memory(work, view), view.ranks, len(view.ranks)
    whole = {rank: memory.needed(rank, "data", 1, 1) for rank in ranks}
    needs = memory.needs(ranks, list(whole.values()))
    if all(need.fits for need in needs):
        return ShardLayout(ranks, 1)
    if size > 1:
        choice = ShareChoice(work, view, memory, StepTimes(work, view))
        shares = choice.of("tensor", ranks, size)
        if choice.can("tensor", ranks, size, shares):
            return ShardLayout(ranks, size, shares=shares)
    able: tuple[int, ...] = ()
    for rank in ranks:
        more = (*able, rank)
        if all(need.fits for need in memory.needs(more, [whole[each] for each in more])):
            able = more
    idle = tuple(rank for rank in ranks if rank not in able)
    return ShardLayout(able, 1 if able else 0, idle, shortage(needs))
