"""What is remembered of a backend that failed, which backends are below it, and who is told."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from fluxmesh.cluster.backends import BackendFault, Fallback, below, with_addresses
from fluxmesh.cluster.hostfile import Host, HostfileError, parse
from fluxmesh.cluster.rendezvous import for_sockets
from fluxmesh.cluster.snapshot import CollectiveTime, MeshView, RingTiming, Timings
from fluxmesh.errors import FluxmeshError
from fluxmesh.storage.homes import Home
from fluxmesh.storage.keys import Keys
from fluxmesh.wire import messages
from fluxmesh_coordinator.agents import mesh_file
from fluxmesh_coordinator.agents.mesh_file import Member, MeshRecord
from fluxmesh_coordinator.deploy import leased_work
from fluxmesh_coordinator.runtime.agent_pool import AgentPool
from fluxmesh_coordinator.server.queue import lane
from fluxmesh_coordinator.server.statuses import MeshStatuses
from tests.messages import sample
from tests.unit.meshes import LOWER, mac

FAULT = BackendFault(backend="jaccl", ranks=(0, 1), reason="mac1: errno 60.")


def test_a_fault_concerns_rings_that_join_two_of_its_hosts() -> None:
    fallback = Fallback(LOWER, (FAULT,))
    assert fallback.backend("jaccl", (0, 1)) == fallback.backend("jaccl", (0, 1, 2)) == "jaccl-ring"
    assert fallback.backend("jaccl", (1, 2)) == "jaccl"  # over another cable
    worse = fallback.noted(replace(FAULT, backend="jaccl-ring"))
    assert worse.backend("jaccl", (0, 1)) == "ring"
    assert [fallback.after(name) for name in ("jaccl", *LOWER)] == ["jaccl-ring", "ring", None]


def test_a_first_death_is_remembered_for_as_long_as_a_hosts() -> None:
    once = Fallback(LOWER, (replace(FAULT, is_out=False, when=1000.0),))
    assert once.backend("jaccl", (0, 1)) == "jaccl" and once.has_failed_once("jaccl", (0, 1))
    assert not once.forgiving(1000.5).has_failed_once("jaccl", (0, 1))
    out = once.noted(FAULT)
    assert out.faults == (FAULT,) and out.forgiving(1000.5) == out
    assert out.noted(once.faults[0]) == out  # by somebody whose job had begun before


def test_a_plan_goes_by_the_figures_of_the_backend_that_is_used() -> None:
    def timing(backend: str, seconds: float) -> RingTiming:
        table = (CollectiveTime(1 << 20, seconds),)
        return RingTiming(backend=backend, ranks=(0, 1), gathers=table, sums=table, hidden=0.5)

    fast, slow = timing("jaccl", 0.001), timing("jaccl-ring", 0.5)
    view = MeshView((), (), "jaccl", Timings((fast, slow)), Fallback(LOWER))
    assert view.ring_timing((0, 1)) == fast
    assert replace(view, fallback=Fallback(LOWER, (FAULT,))).ring_timing((0, 1)) == slow


def hosts(*ips: str) -> tuple[Host, ...]:
    return tuple(Host(rank, f"mac{rank}", (ip,) if ip else ()) for rank, ip in enumerate(ips))


def jaccl_file(**more: Any) -> str:
    entries = [
        {"ssh": "mac0", "ips": ["10.0.0.1"], "rdma": [None, "rdma_en5"]},
        {"ssh": "mac1", "ips": [], "rdma": ["rdma_en5", None]},
    ]
    return json.dumps({"backend": "jaccl", "hosts": entries, **more})


def test_sockets_need_an_address_of_every_host_and_agents_have_one() -> None:
    known = hosts("10.0.0.1", "")
    assert [host.ips for host in for_sockets(known)] == [(), ()]
    filled = with_addresses(known, {0: "192.168.0.1", 1: "192.168.0.2"})
    assert [host.ips for host in for_sockets(filled)] == [("10.0.0.1",), ("192.168.0.2",)]
    here = with_addresses(known, {0: "192.168.0.1", 1: "127.0.0.1"})
    assert [host.ips for host in here] == [("10.0.0.1",), ()]  # nobody else reaches that
    several = (Host(0, "a", ("fd00::1", "10.0.0.1", "10.0.1.1")), Host(1, "b", ("10.0.0.2",)))
    assert [host.ips for host in for_sockets(several)] == [("10.0.0.1",), ("10.0.0.2",)]


def test_a_hostfile_tells_what_is_below_its_backend() -> None:
    assert below(parse(jaccl_file())) == ("jaccl-ring",)  # host 1 has no address
    assert below(parse(jaccl_file(fallback=False))) == ()
    assert (
        below(parse('[{"ssh": "a", "ips": ["10.0.0.1"]}, {"ssh": "b", "ips": ["10.0.0.2"]}]')) == ()
    )
    nccl = {"backend": "nccl", "hosts": [{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}] * 2}
    assert below(parse(json.dumps(nccl))) == ("ring",)
    with pytest.raises(HostfileError, match="fallback: expected true or false"):
        parse(jaccl_file(fallback="no"))


def record(**more: Any) -> MeshRecord:
    key = Keys.new().public
    members = tuple(
        Member(rank, f"192.168.0.{rank + 1}:47100", key, "boot", "/state", "/python")
        for rank in range(2)
    )
    return MeshRecord("mesh.json", jaccl_file(), members, **more)


def test_a_mesh_remembers_faults_by_members_until_the_next_up(tmp_path: Any) -> None:
    home = Home(tmp_path)
    tmp_path.chmod(0o700)
    mesh_file.save(record(), home)
    assert record().fallback == Fallback(LOWER)  # the agent of host 1 has an address
    mesh_file.learn(jaccl_file(), [FAULT, replace(FAULT, backend="jaccl-ring")], home)
    mesh_file.learn("another hostfile", [replace(FAULT, ranks=(7, 8))], home)
    known = mesh_file.load(home)
    assert known is not None and known.fallback.backend("jaccl", (0, 1)) == "ring"
    assert [fault.backend for fault in known.faults] == ["jaccl", "jaccl-ring"]
    assert known.backend_notes == [
        "Hosts 0, 1 go on over ring until the next `fluxmesh up`, since jaccl-ring failed: mac1: "
        "errno 60."
    ]
    assert record().backend_notes == []


def test_hosts_without_an_agent_need_no_address_and_take_nothing_away() -> None:
    entries = [{"ssh": f"mac{k}", "ips": [f"10.0.0.{k}"] if k == 0 else []} for k in range(3)]
    for entry, k in zip(entries, range(3), strict=True):
        entry["rdma"] = [None if other == k else "rdma_en5" for other in range(3)]
    partial = replace(record(), text=json.dumps({"backend": "jaccl", "hosts": entries}))
    assert partial.fallback.below == LOWER
    alone = replace(record(faults=(FAULT,)), text=jaccl_file(fallback=False)).only([0])
    assert alone.fallback == Fallback((), (FAULT,)) and len(alone.backend_notes) == 1
    assert alone.fallback.backend("jaccl", (0, 1)) == "jaccl"  # where nothing is below


def test_a_pool_remembers_for_later_jobs_and_adopts_what_others_know() -> None:
    kept: list[Any] = []

    async def play() -> None:
        pool = AgentPool(record(), NoDialer(), keep=kept.append)
        pool.remember(FAULT)
        assert pool.links.backend_of((0, 1)) == "jaccl-ring"
        pool.adopt(())  # as the record was before that was written
        assert pool.links.backend_of((0, 1)) == "jaccl-ring"
        await pool.__aexit__()
        ((written,),) = kept
        assert replace(written, when=0.0) == FAULT and written.when > 0
        pool.adopt(())  # an `up` has cleared it
        assert pool.links.backend_of((0, 1)) == "jaccl"
        pool.remember(replace(FAULT, is_out=False))
        pool.forgive()
        assert pool.links.fallback.has_failed_once("jaccl", (0, 1))
        await pool.__aexit__()
        pool.adopt((replace(FAULT, is_out=False, when=1.0),))
        pool.forgive()
        assert pool.links.fallback.faults == ()

    asyncio.run(play())


class NoDialer:
    async def connect(self, *_: Any) -> Any:
        raise AssertionError("nobody is called")

    async def close(self) -> None:
        pass


def test_a_server_goes_by_what_the_record_says_now(monkeypatch: pytest.MonkeyPatch) -> None:
    known = [record(faults=(FAULT,))]
    known.append(replace(known[0], faults=()))  # the same agents, after another `up`
    adopted: list[Any] = []
    monkeypatch.setattr(lane.mesh_file, "load", lambda: known[0])
    monkeypatch.setattr(lane.mesh_file, "stamp", lambda: len(known))
    monkeypatch.setattr(lane.Painter, "mesh", SimpleNamespace(adopt=adopted.append))
    painter = lane.CurrentPainter()
    for _ in range(2):
        with painter.using() as (used, _book), painter.looking() as current:
            assert used is current
        known.pop(0)
    assert adopted == [(FAULT,), ()]


@pytest.mark.parametrize(
    ("kind", "is_backends"),
    [("Raised", True), ("Died", True), (messages.ENGINE_KILLED, False), ("DoesNotFitError", False)],
)
def test_up_blames_no_backend_for_an_engine_that_was_killed(
    kind: str, is_backends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Client:
        title = "mac1"

        async def ask(self, *_: Any) -> messages.Message:
            return messages.Done()

        async def report(self) -> messages.Report:
            return messages.Failed(
                ring_generation=1, job="", kind=kind, text="It ended.", fatal=True
            )

    granted: Any = SimpleNamespace(fence=1, ring_generation=0)
    work: Any = SimpleNamespace(weights=None)
    client: Any = Client()
    errands = {rank: leased_work.Errand(client, granted, work) for rank in range(2)}

    async def forms(*asked: Any) -> Timings:
        if asked[3] == "jaccl":
            await errands[1].join(replace(sample(messages.Join, Random(0)), ring_generation=1))
        return Timings()

    monkeypatch.setattr(leased_work, "_form_measured", forms)
    notes: list[str] = []
    infos = {rank: mac(rank) for rank in range(2)}
    forming = leased_work.form_known_ring(errands, infos, record(), notes.append)
    if is_backends:
        (fault,) = asyncio.run(forming).faults
        assert fault.backend == "jaccl" and len(notes) == 1
    else:
        with pytest.raises(FluxmeshError, match="It ended"):
            asyncio.run(forming)
        assert notes == []


def test_clients_of_a_server_are_told_over_what_rings_go_on() -> None:
    answer = (record(faults=(FAULT,)), {0: "gone", 1: "gone"})
    service: Any = SimpleNamespace(lane=SimpleNamespace(statuses=lambda: answer))
    told = asyncio.run(MeshStatuses(service).hosts_and_links())
    (note,) = told["notes"]
    assert note.startswith("Hosts 0, 1 go on over jaccl-ring until the next `fluxmesh up`, since ")
