"""Whether a request fits: what hosts need, what they may use, what they must load first. Pure.

Below `candidates.py`. Hosts that are agents on one machine share its memory, and are counted
together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fluxmesh.cluster.snapshot import HostInfo, MeshView, Placement
from fluxmesh.planning.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Need:
    """Memory of one host that takes part, in bytes."""

    rank: int
    needed: int
    available: int
    load_bytes: int = 0  # of weights that it must read first

    @property
    def fits(self) -> bool:
        return self.needed <= self.available


class Memory:
    """The memory of a view's hosts, as one request sees it."""

    def __init__(self, work: Workload, view: MeshView) -> None:
        self.work, self.view = work, view
        self.devices: dict[str, list[HostInfo]] = {}
        self._needed: dict[tuple[Placement, int, int], int] = {}
        for host in view.hosts:
            self.devices.setdefault(host.device_key, []).append(host)

    def needed(self, placement: Placement, hosts: int, shards: int) -> int:
        """Bytes on each of `hosts` hosts, in the phase and on the platform that needs most."""
        how = (placement, hosts, shards)
        if how not in self._needed:
            platforms = {host.platform for host in self.view.hosts}
            self._needed[how] = max(max(self.work.memory(*how, kind)) for kind in platforms)
        return self._needed[how]

    def needs(
        self, ranks: Sequence[int], needed: Sequence[int], shards: int = 1
    ) -> tuple[Need, ...]:
        """What each rank needs, where rank i of `ranks` holds shard i of `shards` (or all)."""
        asked = dict(zip(ranks, needed, strict=True))
        return tuple(
            Need(
                rank=rank,
                needed=asked[rank],
                available=self.room(rank, asked),
                load_bytes=self._load(rank, shards, shard),
            )
            for shard, rank in enumerate(ranks)
        )

    def room(self, rank: int, asked: dict[int, int]) -> int:
        """What `rank` may use once the others on its device have what they ask for.

        What those who ask hold now counts as free: they let go of it, or go on using it.
        """
        host = self.view.host(rank)
        same = self.devices[host.device_key]
        room = min(other.free_bytes for other in same)
        for other in same:
            if other.rank == rank or other.rank in asked:
                room += other.held_bytes
            if other.rank != rank:
                room -= asked.get(other.rank, 0)
        return max(0, min(host.memory_bytes, room))

    def holds(self, rank: int, shards: int, shard: int) -> bool:
        """Whether the host has exactly this part of the weights in memory."""
        held = self.view.host(rank).holds
        if held is None or held.weights != self.work.weights or held.shards != shards:
            return False
        return shards == 1 or held.shard == shard

    def load_seconds(self, need: Need) -> float:
        """Until the host has read what it lacks."""
        return need.load_bytes / self.view.host(need.rank).load_rate

    def _load(self, rank: int, shards: int, shard: int) -> int:
        return 0 if self.holds(rank, shards, shard) else self.whole_load(shards)

    def whole_load(self, shards: int) -> int:
        """Bytes that a host reads which holds nothing yet."""
        return self.work.transformer_file.on_each_of(shards) + self.work.autoencoder_bytes


def shortage(needs: Sequence[Need]) -> str:
    for need in needs:
        if not need.fits:
            return (
                f"host {need.rank} needs {need.needed / 1e9:.1f} GB "
                f"and may use {need.available / 1e9:.1f} GB"
            )
    return ""
