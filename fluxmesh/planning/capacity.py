"""Whether a request fits: what hosts need, what they may use, what they must load first. Pure.

Below `candidates.py`. Hosts that are agents on one machine share its memory, and are counted
together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fluxmesh.cluster.shares import EVEN, Shares
from fluxmesh.cluster.snapshot import HostInfo, MeshView, Placement, Platform
from fluxmesh.planning.workload import OwnShare, Phases, Workload


@dataclass(frozen=True, kw_only=True)
class Need:
    """Memory of one host that takes part, in bytes."""

    rank: int
    needed: int
    available: int
    load_bytes: int = 0  # of weights that it must read first
    shards: int = 1  # of which it holds one
    weights_part: float | None = None  # of the split weights, its own; None: 1/`shards`

    @property
    def fits(self) -> bool:
        return self.needed <= self.available


class Memory:
    """The memory of a view's hosts, as one request sees it."""

    def __init__(self, work: Workload, view: MeshView) -> None:
        self.work, self.view = work, view
        self.devices: dict[str, list[HostInfo]] = {}
        self._needed: dict[tuple[Platform, Placement, int, int, OwnShare | None], Phases] = {}
        self._together: dict[tuple[Placement, tuple[int, ...], int, Shares], tuple[Need, ...]] = {}
        for host in view.hosts:
            self.devices.setdefault(host.device_key, []).append(host)
        self._held_bytes = {host.rank: host.held_bytes for host in view.hosts}
        self._rooms_alone = {  # of hosts that share their device with nobody
            host.rank: min(host.memory_bytes, host.free_bytes + host.held_bytes)
            for (host,) in (same for same in self.devices.values() if len(same) == 1)
        }
        denoiser = work.weights.denoiser
        self._held = {
            host.rank: host.holds
            for host in view.hosts
            if host.holds is not None and host.holds.weights.denoiser == denoiser
        }

    def needed(
        self,
        rank: int,
        placement: Placement,
        hosts: int,
        shards: int,
        share: OwnShare | None = None,
    ) -> int:
        """Bytes on `rank`, one of `hosts` hosts, in the phase that needs most.

        `share` is its own, where they differ.
        """
        return max(self.phases(rank, placement, hosts, shards, share))

    def phases(
        self,
        rank: int,
        placement: Placement,
        hosts: int,
        shards: int,
        share: OwnShare | None = None,
    ) -> Phases:
        """The same in each phase."""
        platform = self.view.host(rank).platform
        how = (platform, placement, hosts, shards, share)
        if how not in self._needed:
            self._needed[how] = self.work.memory(placement, hosts, shards, platform, share)
        return self._needed[how]

    def encoding(self, rank: int, shards: int, part: float | None = None) -> int:
        """Bytes on a host that encodes the request's pictures; 0: nobody has to.

        It holds 1/`shards` of the transformer, or `part`, as `Need.weights_part`.
        """
        return self.work.encoding_memory(shards, self.view.host(rank).platform, part)

    def together(
        self, placement: Placement, ranks: tuple[int, ...], shards: int, shares: Shares = EVEN
    ) -> tuple[Need, ...]:
        """What each rank of a ring needs, with these shares of the work."""
        how, size = (placement, ranks, shards, shares), len(ranks)
        if how not in self._together:
            needed = [
                self.needed(
                    rank, placement, size, shards, self.work.share(placement, size, shares, place)
                )
                for place, rank in enumerate(ranks)
            ]
            self._together[how] = self.needs(ranks, needed, shards, shares)
        return self._together[how]

    def needs(
        self, ranks: Sequence[int], needed: Sequence[int], shards: int = 1, shares: Shares = EVEN
    ) -> tuple[Need, ...]:
        """What each rank needs, where rank i of `ranks` holds shard i of `shards` (or all)."""
        asked, held = dict(zip(ranks, needed, strict=True)), shares if shards > 1 else EVEN
        needs: list[Need] = []
        for shard, rank in enumerate(ranks):
            part = self.work.weights_part(self.work.share("tensor", shards, held, shard))
            is_held = self.holds(rank, shards, shard, held)
            needs.append(
                Need(
                    rank=rank,
                    needed=asked[rank],
                    available=self.room(rank, asked),
                    load_bytes=0 if is_held else self.whole_load(shards, part),
                    shards=shards,
                    weights_part=part,
                )
            )
        return tuple(needs)

    def room(self, rank: int, asked: dict[int, int]) -> int:
        """What `rank` may use once the others on its device have what they ask for.

        What those who ask hold now counts as free: they let go of it, or go on using it.
        """
        if rank in self._rooms_alone:
            return self._rooms_alone[rank]
        host = self.view.host(rank)
        same = self.devices[host.device_key]
        room = min(other.free_bytes for other in same)
        for other in same:
            if other.rank == rank or other.rank in asked:
                room += self._held_bytes[other.rank]
            if other.rank != rank:
                room -= asked.get(other.rank, 0)
        return max(0, min(host.memory_bytes, room))

    def holds(self, rank: int, shards: int, shard: int, shares: Shares = EVEN) -> bool:
        """Whether the host has exactly this part of the weights in memory."""
        held = self._held.get(rank)
        if held is None or held.shards != shards:
            return False
        return shards == 1 or (held.shard, held.shares) == (shard, shares)

    def load_seconds(self, need: Need) -> float:
        """Until the host has read what it lacks."""
        return need.load_bytes / self.view.host(need.rank).load_rate

    def whole_load(self, shards: int, part: float | None = None) -> int:
        """Bytes that a host reads which holds nothing yet; `part` as `Need.weights_part`."""
        return self.work.transformer_file.on_each_of(shards, part) + self.work.autoencoder_bytes


def shortage(needs: Sequence[Need]) -> str:
    for need in needs:
        if not need.fits:
            return (
                f"host {need.rank} needs {need.needed / 1e9:.1f} GB "
                f"and may use {need.available / 1e9:.1f} GB"
            )
    return ""
