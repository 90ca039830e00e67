"""`mesh.json`: what one command leaves for the next, and what a damaged file becomes."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fluxmesh.cluster.backends import BackendFault
from fluxmesh.cluster.shares import Shares
from fluxmesh.cluster.snapshot import (
    CollectiveTime,
    JobTiming,
    LinkInfo,
    ModelVariant,
    RingTiming,
    StepTiming,
    Timings,
)
from fluxmesh.deadlines import DEADLINES
from fluxmesh.errors import FluxmeshError
from fluxmesh.request import AdapterRef
from fluxmesh.storage.homes import Home
from fluxmesh.wire.transport.inproc import Network
from fluxmesh_coordinator.agents import launch, mesh_file
from fluxmesh_coordinator.agents.mesh_file import Member, MeshRecord
from fluxmesh_coordinator.runtime.agent_pool import AgentPool, News, Restart
from fluxmesh_coordinator.runtime.mesh import Mesh

KEY = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"
HOSTS = json.dumps([{"ssh": f"mac{i}", "ips": [f"192.168.0.{i + 1}"]} for i in range(3)])
MESH = MeshRecord(
    name="/mesh.json",
    text=HOSTS,
    members=tuple(
        Member(rank, f"192.168.0.{rank + 1}:47100", KEY, f"b{rank}", "/state", "/python")
        for rank in (0, 2)
    ),
    envs=(("OMP_NUM_THREADS", "1"),),
    roots=("/models",),
    links=(
        LinkInfo(source=0, target=2, rate=1e9, latency=1e-4),
        LinkInfo(source=2, target=0, rate=2e9),
    ),
    weights=ModelVariant("dev", "float32", 4, (AdapterRef("dog", 0.5),), True),
    timings=Timings(
        (
            RingTiming(
                backend="nccl",
                ranks=(0, 2),
                gathers=(CollectiveTime(4096, 1e-5),),
                sums=(CollectiveTime(8192, 2e-5),),
                hidden=0.5,
            ),
        ),
        (
            JobTiming(
                backend="",
                ranks=(2,),
                measured=StepTiming(
                    model="dev",
                    height=512,
                    width=1024,
                    dtype="float32",
                    bits=4,
                    step_seconds=0.5,
                    decode_seconds=None,
                    first_seconds=2.0,
                    when=1e9,
                    hosts=2,
                    shares=Shares(heads=(16, 8), columns=(8192, 4096)),
                ),
                last_seconds=0.4,
                gap_seconds=0.1,
            ),
        ),
    ),
)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    tmp_path.chmod(0o700)
    return Home(tmp_path)


def test_a_mesh_is_read_as_it_was_written(home: Home) -> None:
    assert mesh_file.load(home) is None
    mesh_file.save(MESH, home)
    assert mesh_file.load(home) == MESH
    assert home.mesh.stat().st_mode & 0o777 == 0o600


def test_a_file_from_before_anything_was_timed_is_read(home: Home) -> None:
    mesh_file.save(MESH, home)
    data = json.loads(home.mesh.read_text())
    del data["timings"]
    home.mesh.write_text(json.dumps(data))
    assert mesh_file.load(home) == replace(MESH, timings=Timings())


def test_only_hosts_with_an_agent_count(home: Home) -> None:
    assert [host.name for host in MESH.hosts] == ["mac0", "mac2"]
    assert MESH.member(1) is None
    assert [each.rank for each in MESH.only([2]).members] == [2]


def test_a_mesh_is_forgotten_once(home: Home) -> None:
    mesh_file.save(MESH, home)
    mesh_file.remove(home)
    mesh_file.remove(home)
    assert mesh_file.load(home) is None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data | {"version": 2},
        lambda data: data | {"members": []},
        lambda data: data | {"members": [data["members"][0] | {"key": "short"}]},
        lambda data: data | {"links": [{"source": 0, "target": 1, "rate": -1.0}]},
        lambda data: data | {"surprise": 1},
        lambda data: data | {"timings": {"rings": [{"backend": "ring"}]}},
        lambda data: data | {"timings": {"jobs": [{"last_seconds": -1.0}]}},
        lambda data: data | {"timings": []},
        lambda data: {key: value for key, value in data.items() if key != "text"},
        lambda data: [],
    ],
)
def test_a_damaged_file_is_told_with_the_remedy(home: Home, spoil) -> None:  # type: ignore[no-untyped-def]
    mesh_file.save(MESH, home)
    home.mesh.write_text(json.dumps(spoil(json.loads(home.mesh.read_text()))))
    with pytest.raises(FluxmeshError, match="run `fluxmesh up`"):
        mesh_file.load(home)


def test_a_file_that_is_cut_off_is_told_too(home: Home) -> None:
    mesh_file.save(MESH, home)
    home.mesh.write_text(home.mesh.read_text()[:100])
    with pytest.raises(FluxmeshError, match="run `fluxmesh up`"):
        mesh_file.load(home)


@pytest.mark.parametrize("of_members", [False, True])
@pytest.mark.parametrize("ends", [False, True])
def test_what_a_job_writes_down_brings_no_mesh_back_that_ended_or_changed_meanwhile(
    home: Home, monkeypatch: pytest.MonkeyPatch, ends: bool, of_members: bool
) -> None:
    """As a server does while its user types `fluxmesh down`, or `up --rotate-keys`."""
    mesh_file.save(MESH, home)
    renewed = replace(MESH, members=tuple(replace(each, boot="renewed") for each in MESH.members))
    has_read, may_go_on = threading.Event(), threading.Event()
    load = mesh_file.load

    def slow_load(home: Home | None = None) -> MeshRecord | None:
        record = load(home)
        has_read.set()
        assert may_go_on.wait(60)
        return record

    def write_down() -> None:
        if of_members:
            mesh_file.remember_members(MESH, home)
        else:
            mesh_file.learn(MESH.text, [Timings()], home)

    def user() -> None:
        if ends:
            mesh_file.remove(home)
        else:
            mesh_file.save(renewed, home)

    monkeypatch.setattr(mesh_file, "load", slow_load)
    job, command = threading.Thread(target=write_down), threading.Thread(target=user)
    job.start()
    assert has_read.wait(60)
    command.start()
    command.join(0.5)  # it would be done by now, if nobody stood in its way
    may_go_on.set()
    job.join()
    command.join()
    assert load(home) == (None if ends else renewed)


@contextlib.contextmanager
def another_process_writes(home: Home) -> Iterator[None]:
    """As long as the block lasts: one that is stopped, say."""
    with open(home.folder / "mesh.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def test_a_record_that_another_process_keeps_to_itself_is_not_waited_for_for_ever(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh_file.save(MESH, home)
    with another_process_writes(home):
        with monkeypatch.context() as short:
            short.setattr(mesh_file, "DEADLINES", replace(DEADLINES, record=(0.01, 0.2)))
            with pytest.raises(mesh_file.RecordInUseError, match=r"holds .*mesh\.lock, .*; end it"):
                mesh_file.learn(MESH.text, [Timings()], home)
        assert mesh_file.load(home) == MESH  # who reads waits for nobody
        writer = threading.Thread(target=mesh_file.remove, args=(home,))
        writer.start()
        writer.join(0.3)
        assert mesh_file.load(home) == MESH
    writer.join()
    assert mesh_file.load(home) is None


def test_what_cannot_be_written_down_yet_is_written_later_in_its_order() -> None:
    written: list[list[str]] = []
    is_in_use = [True]

    def keep(news: Sequence[News]) -> None:
        if is_in_use.pop() if is_in_use else False:
            raise mesh_file.RecordInUseError("Another process has it.")
        written.append([each.reason for each in news if isinstance(each, BackendFault)])

    async def body() -> None:
        soon = replace(DEADLINES, rewrite=0.01)
        pool = AgentPool(MESH, Network().dialer(), None, keep, soon)
        pool.remember(BackendFault(backend="jaccl", ranks=(0, 1), reason="first"))
        while is_in_use:
            await asyncio.sleep(0.01)
        pool.remember(BackendFault(backend="jaccl-ring", ranks=(0, 1), reason="second"))
        while not written:
            await asyncio.sleep(0.01)
        await pool.__aexit__()

    asyncio.run(body())
    assert [reason for each in written for reason in each] == ["first", "second"]


def test_agents_that_are_started_again_at_once_are_all_on_record(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each takes seconds, and knew nothing of the others when it began."""
    both_start, records = threading.Barrier(2), list[MeshRecord]()

    def start_again(record: MeshRecord, rank: int, keys: object) -> Member:
        member = record.member(rank)
        assert member is not None
        both_start.wait(60)
        return replace(member, boot=f"new {rank}")

    monkeypatch.setattr(launch, "start_again", start_again)
    keys: Any = None
    mesh = Connecting._of(MESH, keys, records.append)
    threads = [threading.Thread(target=mesh.restart, args=(rank,)) for rank in (0, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [member.boot for member in records[-1].members] == ["new 0", "new 2"]


class Connecting(Mesh):
    """A mesh that calls nobody."""

    def __init__(self, _record: MeshRecord, _dialer: object, **given: Any) -> None:
        self.restart: Restart = given["restart"]
