"""Each rank's peak of memory while hosts that hold shards paint together, as MLX counted it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fluxmesh import events
from fluxmesh.kernels.ops import device
from fluxmesh.planning.workload import ModelSizes, Workload
from fluxmesh.request import GenerateRequest
from fluxmesh.storage.keys import Keys
from fluxmesh.weights import hub
from fluxmesh.wire import messages
from fluxmesh_coordinator.agents.client import AgentClient
from tests.integration.agents import agent
from tests.integration.test_mesh import connected_to, record_of

# The embedded checkpoint, since its weights outweigh the activations of so small a picture.
REQUEST = GenerateRequest("two dogs", 5, "tiny", 1, 32, 32, 2)
HOSTS = 2


def peaks(
    folder: Path, hosts: int, placement: Any, *options: str, shards: int = 1
) -> dict[int, int]:
    """Bytes of each rank while it denoised, by the reports of its steps.

    Each must have held one of so many shards.
    """
    user = Keys.new()
    with ExitStack() as stack:
        agents = [
            stack.enter_context(agent(folder / str(rank), *options, user=user))
            for rank in range(hosts)
        ]
        mesh = stack.enter_context(connected_to(record_of(agents), user))
        highest: dict[int, int] = {}
        receive = AgentClient.report

        async def spy(self: AgentClient) -> messages.Report:
            report = await receive(self)
            if isinstance(report, messages.Stepped):
                rank = self.member.rank
                highest[rank] = max(report.peak_bytes, highest.get(rank, 0))
            return report

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(AgentClient, "report", spy)
            job_events = list(mesh.generate(REQUEST, placement))
        assert any(isinstance(event, events.Picture) for event in job_events)
        held = [
            status.holds for status in mesh.status().values() if isinstance(status, messages.Status)
        ]
        assert [holding.shards for holding in held if holding is not None] == [shards] * hosts
    return highest


def test_each_rank_of_a_sharded_mesh_stays_within_its_share_of_memory(tmp_path: Path) -> None:
    sizes = ModelSizes.of(hub.resolve("tiny"))
    work = Workload.of(sizes.fill(REQUEST), sizes)
    (whole,) = peaks(tmp_path / "whole", 1, "data").values()
    needs = [max(work.memory("tensor", HOSTS, shards, device())) for shards in (1, HOSTS)]
    cap = str(sum(needs) // 2)  # bytes: less than all of it needs, more than a share of it does
    parts = peaks(tmp_path / "parts", HOSTS, "tensor", "--memory", cap, shards=HOSTS)
    assert sorted(parts) == list(range(HOSTS))
    saved = work.transformer.split * (HOSTS - 1) / HOSTS
    for rank, peak in parts.items():
        assert work.transformer.on_each_of(HOSTS) <= peak <= whole - 0.9 * saved, (rank, peak)


def test_ranks_that_hold_the_whole_model_hold_no_part_of_it_twice(tmp_path: Path) -> None:
    sizes = ModelSizes.of(hub.resolve("tiny"))
    work = Workload.of(sizes.fill(REQUEST), sizes)
    (alone,) = peaks(tmp_path / "alone", 1, "data").values()
    parts = peaks(tmp_path / "parts", HOSTS, "tensor")
    assert sorted(parts) == list(range(HOSTS))
    share = work.transformer.split / HOSTS
    for rank, peak in parts.items():
        assert work.transformer.on_each_of(1) <= peak <= alone + 0.2 * share, (rank, peak)
