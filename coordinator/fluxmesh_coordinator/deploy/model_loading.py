"""A model on its way into the memory of leased hosts, and the steps that are timed with it.

Below `warmup.py`, which takes the leases. What a host holds, and what was timed before, is not done
again.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from fluxmesh.cluster.shares import EVEN, Shares
from fluxmesh.cluster.snapshot import Holding, MeshView, Placement
from fluxmesh.deadlines import DEADLINES
from fluxmesh.errors import HostUnreachableError, WeightsError
from fluxmesh.planning.workload import Workload
from fluxmesh.wire import messages
from fluxmesh_coordinator.deploy.bringup import Watcher
from fluxmesh_coordinator.deploy.leased_work import Errand
from fluxmesh_coordinator.deploy.shard_layout import ShardLayout
from fluxmesh_coordinator.jobs.model_check import remedy

COMPONENTS = ("transformer", "autoencoder")


@dataclass(frozen=True)
class ModelLoading:
    """What the hosts have of one model, and how they get the rest."""

    work: Workload  # of one picture of the model's own size
    content: str  # `Checkpoint.content` of what shall be held; "" is whatever the hosts have
    watcher: Watcher

    def is_held(self, status: messages.Status, place: ShardLayout, rank: int) -> bool:
        """Whole weights serve where a shard would do: nothing is thrown away."""
        held = status.holds
        if held is None or not self._is_meant(held):
            return False
        if held.weights.denoiser != self.work.weights.denoiser:
            return False
        wanted = (place.shards, place.shard(rank), place.shares)
        return held.shards == 1 or (held.shards, held.shard, held.shares) == wanted

    def untimed(self, view: MeshView, place: ShardLayout) -> list[int]:
        """Who has to time a step of this size: one host of each device, or all that hold shards."""
        weights, work = self.work.weights, self.work
        how = ("data", 1) if place.shards == 1 else ("tensor", place.shards)
        wanted = (weights.model, work.height, work.width, weights.dtype, weights.bits, *how)
        devices: dict[str, int] = {}
        for rank in place.ranks:
            known = view.timed(rank).measured
            if wanted not in [
                (o.model, o.height, o.width, o.dtype, o.bits, o.placement, o.hosts) for o in known
            ]:
                devices.setdefault(view.host(rank).device_key, rank)
        if place.shards == 1 or not devices:
            return list(devices.values())
        ring = zip(place.ranks, place.ranks[1:] + place.ranks[:1], strict=True)
        return list(place.ranks) if all(view.link(a, b) for a, b in ring) else []

    async def load(self, errand: Errand, place: ShardLayout, rank: int) -> None:
        """Raises `WeightsError` where a host has other files under the model's name."""
        for is_last in (False, True):
            load = messages.Load(
                **errand.common,
                weights=errand.weights,
                shards=place.shards,
                shard=place.shard(rank),
                shares=place.shares,
                components=COMPONENTS,
            )
            async for report in errand.do(load, DEADLINES.engine_sign):
                if isinstance(report, messages.LoadProgress):
                    what, done, total = report.component, report.done_bytes, report.total_bytes
                    self.watcher.progress(rank, what, done, total)
                elif isinstance(report, messages.Loaded) and self._is_meant(report.holding):
                    return
            if not is_last:  # the engine may have read them before they changed
                await errand.begin_anew()
        model = self.work.weights.model
        raise WeightsError(
            f"{errand.client.title} has other files under the name {model} than this machine. "
            f"{remedy(model)}"
        )

    async def time_step(self, errand: Errand, placement: Placement, shares: Shares = EVEN) -> None:
        """With nothing else running on the device; in these shares of a ring."""
        measure = messages.Measure(
            **errand.common,
            weights=errand.weights,
            height=self.work.height,
            width=self.work.width,
            placement=placement,
            shares=shares,
        )
        try:
            async with asyncio.timeout(DEADLINES.timed_step):
                async for _ in errand.do(measure, DEADLINES.timed_step):
                    pass  # it beats until it is done
        except TimeoutError:
            raise HostUnreachableError(
                f"{errand.client.title}: a step is not done after {DEADLINES.timed_step:.0f} s; "
                "look at `fluxmesh logs`."
            ) from None

    def _is_meant(self, held: Holding) -> bool:
        """Whether it came from the files that this machine has now under that name."""
        return self.content in ("", held.content)
