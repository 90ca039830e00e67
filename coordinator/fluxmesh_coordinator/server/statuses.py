"""What the hosts of the mesh say of themselves, asked at most once a second however many look."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterable
from typing import Any

from fluxmesh.cluster.snapshot import KeptModel
from fluxmesh_coordinator.agents.mesh_file import MeshRecord
from fluxmesh_coordinator.server.catalogue import ServedModel
from fluxmesh_coordinator.server.queue.service import PaintingService

FRESH = 1.0  # seconds


class MeshStatuses:
    """The hosts, as clients see them."""

    def __init__(self, service: PaintingService) -> None:
        self._service = service
        self._lock = asyncio.Lock()
        self._asked = -FRESH
        self._hosts: list[dict[str, Any]] = []
        self._links: list[dict[str, Any]] = []
        self._notes: list[str] = []

    async def hosts_and_links(self) -> dict[str, list[Any]]:
        """Of this moment, or of the last second; and what there is to say of the whole mesh."""
        async with self._lock:
            if time.monotonic() - self._asked > FRESH:
                answer = await asyncio.to_thread(self._service.lane.statuses)
                if answer is not None:
                    self._hosts = [_host(*answer, rank) for rank in answer[1]]
                    self._links = _links(answer[0])
                    self._notes = answer[0].backend_notes
                self._asked = time.monotonic()
            return {"hosts": self._hosts, "links": self._links, "notes": self._notes}

    async def loaded(self) -> set[str]:
        """The models that hosts hold now."""
        hosts = (await self.hosts_and_links())["hosts"]
        return {model for host in hosts for model in host["models"]}

    async def are_loaded(self, models: Iterable[ServedModel]) -> dict[str, bool]:
        """By name, whether a host has it in memory."""
        loaded = await self.loaded()
        return {model.name: bool({model.source, model.name} & loaded) for model in models}


def _host(record: MeshRecord, statuses: dict[int, Any], rank: int) -> dict[str, Any]:
    status, name = statuses[rank], record.hosts[rank].name
    if isinstance(status, str):
        return {
            "rank": rank, "name": name, "chip": "", "state": "gone", "model": None,
            "models": [], "memory_bytes": 0, "memory_used_bytes": 0, "reason": status,
        }  # fmt: skip
    held = [*status.kept, *([KeptModel(holds=status.holds)] if status.holds else [])]
    models = list(dict.fromkeys(_shown(each.holds.weights.model) for each in reversed(held)))
    return {
        "rank": rank,
        "name": name,
        "chip": status.kind,
        "state": status.state,
        "model": models[0] if status.holds else None,
        "models": models,  # in memory, the one used last first
        "memory_bytes": status.memory_bytes,
        "memory_used_bytes": max(0, status.memory_bytes - status.free_bytes),
    }


def _links(record: MeshRecord) -> list[dict[str, Any]]:
    return [
        {"from": link.source, "to": link.target, "bytes_per_second": link.rate}
        for link in record.links
    ]


def _shown(model: str) -> str:
    """A model's name, without the folders that it lies in."""
    return os.path.basename(model.rstrip("/")) if os.path.isabs(model) else model
