"""Which shares of a step the hosts of a ring are given: equal ones unless others pay. Pure.

Between `shares.py` (the arithmetic) and `candidates.py`, which asks for each ring that it tries.
Hosts whose steps take nearly the same time keep equal shares, and shares that are in use stay until
others are clearly better: plans must not change with the noise of what was measured, and a shard
that changes is a reload.
"""

from __future__ import annotations

from collections.abc import Callable

from fluxmesh.cluster.shares import EVEN, Shares
from fluxmesh.cluster.snapshot import MeshView, Placement
from fluxmesh.planning.capacity import Memory, shortage
from fluxmesh.planning.collectives import compute_share
from fluxmesh.planning.shares import HostPace, fastest, least_slowest
from fluxmesh.planning.step_times import StepTimes
from fluxmesh.planning.workload import OwnShare, Workload, tensor_problem

PARTS = 144  # of all tokens: of 4608, each is 32; whole halves, thirds, quarters, sixths
NOISE = 1.05  # a step that is longer by less is not worth unequal shares
GUESSED = 1.25  # nor by less than this, where no step was timed on some host
STAYS: dict[Placement, float] = {"sequence": 1.02, "tensor": 1.10}  # shares in use stay within


class ShareChoice:
    """The shares of one request's rings on one view of a mesh."""

    def __init__(self, work: Workload, view: MeshView, memory: Memory, times: StepTimes) -> None:
        self.work, self.view, self.memory, self.times = work, view, memory, times

    def of(self, placement: Placement, ranks: tuple[int, ...], shards: int) -> Shares:
        """Those of a ring whose hosts hold a shard each, or all of the weights where that is 1.

        Equal ones also where nothing fits: then they say what is missing.
        """
        paces, is_timed = self.times.paces(ranks)
        worth = NOISE if is_timed else GUESSED
        differ = max(paces) > worth * min(paces)
        in_use = self._in_use(placement, ranks, shards)
        is_free = in_use in (None, EVEN) and not differ
        if is_free and self._obstacle(placement, len(ranks), EVEN):
            return EVEN
        even_fits = self.can(placement, ranks, shards, EVEN)
        if even_fits and is_free:
            return EVEN
        best = self._best(placement, ranks, shards, paces)
        if best is None or not self.can(placement, ranks, shards, best):
            return EVEN

        def seconds(shares: Shares) -> float:
            return self.times.spread_seconds(placement, ranks, shares)

        limit = seconds(best)
        if in_use is not None and self.can(placement, ranks, shards, in_use):
            saved = (seconds(in_use) - limit) * self.work.steps * self.work.images
            needs = self.memory.together(placement, ranks, shards, best)
            load = max(self.memory.load_seconds(need) for need in needs) if shards > 1 else 0.0
            if seconds(in_use) <= STAYS[placement] * limit or saved <= load:
                return in_use
        return EVEN if even_fits and seconds(EVEN) <= worth * limit else best

    def can(
        self, placement: Placement, ranks: tuple[int, ...], shards: int, shares: Shares
    ) -> bool:
        """Whether the model can be dealt out so, and all hosts have the memory."""
        if self._obstacle(placement, len(ranks), shares):
            return False
        return not shortage(self.memory.together(placement, ranks, shards, shares))

    def _obstacle(self, placement: Placement, size: int, shares: Shares) -> str:
        return tensor_problem(self.work, size, shares) if placement == "tensor" else ""

    def _in_use(self, placement: Placement, ranks: tuple[int, ...], shards: int) -> Shares | None:
        """What these hosts hold, or the unequal shares of their last job; None without any.

        Equal ones of a job were no choice that would have to be kept.
        """
        if shards > 1:
            held = [self.view.host(rank).holds for rank in ranks]
            if held[0] is None:
                return None
            shares = held[0].shares
            are_held = all(
                self.memory.holds(rank, shards, shard, shares) for shard, rank in enumerate(ranks)
            )
            return shares if are_held else None
        backend = self.view.backend_of(ranks)
        jobs = [
            job.measured
            for job in self.view.timings.jobs
            if job.ranks == ranks
            and job.backend == backend
            and (job.measured.placement, job.measured.model) == (placement, self.work.weights.model)
        ]
        latest = max(jobs, key=lambda job: job.when, default=None)
        return None if latest is None or latest.shares.are_even else latest.shares

    def _best(
        self, placement: Placement, ranks: tuple[int, ...], shards: int, paces: tuple[float, ...]
    ) -> Shares | None:
        """With which a step is predicted to take the least time; None where nobody can."""
        if placement == "sequence":
            return self._tokens(ranks, paces)
        return self._heads(ranks, shards, paces)

    def _tokens(self, ranks: tuple[int, ...], paces: tuple[float, ...]) -> Shares | None:
        tokens, size = self.work.tokens, len(ranks)
        parts, even = min(PARTS, tokens), -(-tokens // size)

        def share(units: int) -> OwnShare:
            own = -(-tokens * units // parts)
            return OwnShare(own, max(own, even))

        most = self._most("sequence", ranks, 1, parts, lambda place, units: share(units))
        each = [
            HostPace(pace * fixed, pace * (1 - fixed) / parts)
            for pace, fixed in zip(paces, self._unsplit("sequence", ranks), strict=True)
        ]
        units = fastest(
            parts,
            each,
            most,
            lambda units: self.times.spread_seconds("sequence", ranks, Shares(tokens=units)),
        )
        return None if units is None else Shares(tokens=units)

    def _heads(
        self, ranks: tuple[int, ...], shards: int, paces: tuple[float, ...]
    ) -> Shares | None:
        """Heads first, which are few; then columns make up for what heads could not."""
        partition = self.work.model.architecture.partition
        of_heads, of_columns = partition.units(self.work.is_quantized)
        heads, left = divmod(partition.heads, of_heads)
        columns, odd = divmod(partition.columns, of_columns)
        if left or odd:
            return None
        unsplit = self._unsplit("tensor", ranks)
        most = self._most(
            "tensor",
            ranks,
            shards,
            heads,
            lambda place, units: OwnShare(heads=units / heads, columns=units / heads),
        )
        each = [
            HostPace(pace * fixed, pace * (1 - fixed) / heads)
            for pace, fixed in zip(paces, unsplit, strict=True)
        ]
        own = least_slowest(heads, each, most)
        if own is None:
            return None
        by_heads = self.work.shape.heads_part(self.work.tokens)
        most = self._most(
            "tensor",
            ranks,
            shards,
            columns,
            lambda place, units: OwnShare(heads=own[place] / heads, columns=units / columns),
        )
        each = [
            HostPace(
                pace * (fixed + (1 - fixed) * by_heads * count / heads),
                pace * (1 - fixed) * (1 - by_heads) / columns,
            )
            for pace, fixed, count in zip(paces, unsplit, own, strict=True)
        ]
        groups = least_slowest(columns, each, most)
        if groups is None:
            return None
        return Shares(
            heads=tuple(of_heads * count for count in own),
            columns=tuple(of_columns * count for count in groups),
        )

    def _unsplit(self, placement: Placement, ranks: tuple[int, ...]) -> list[float]:
        """Of each host's step alone, the part that does not become less with its share."""
        return [compute_share(placement, 0.0, self.view.host(rank).platform) for rank in ranks]

    def _most(
        self,
        placement: Placement,
        ranks: tuple[int, ...],
        shards: int,
        units: int,
        share: Callable[[int, int], OwnShare],
    ) -> list[int]:
        """Of so many units, how many each host has memory for; agents on one device share it."""
        size, crowd, asked = len(ranks), self.times.crowd(ranks), dict.fromkeys(ranks, 0)
        most: list[int] = []
        for place, rank in enumerate(ranks):
            room = self.memory.room(rank, asked) // crowd[rank]
            low, middle, high = 0, units, units  # the most that fits is from `low` to `high`
            while low < high:  # all of them is tried first, for which most hosts have room
                needed = self.memory.needed(rank, placement, size, shards, share(place, middle))
                low, high = (middle, high) if needed <= room else (low, middle - 1)
                middle = (low + high + 1) // 2
            most.append(low)
        return most
