"""What the server adds to a request: nothing is done twice, nobody waits for what need not be."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio.to_thread
import pytest

from fluxmesh.cluster.snapshot import TextTiming, Timings
from fluxmesh_coordinator.agents import mesh_file
from fluxmesh_coordinator.agents.mesh_file import Member, MeshRecord
from fluxmesh_coordinator.server.queue.lane import CurrentPainter
from fluxmesh_coordinator.server.run import listening
from tests.fakes import KEY
from tests.serving import Serving


def test_an_answer_does_not_wait_until_its_head_is_acknowledged() -> None:
    async def has_no_delay() -> bool:
        accepted: asyncio.Queue[asyncio.BaseTransport] = asyncio.Queue()

        class TransportNoting(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                accepted.put_nowait(transport)

        with listening("127.0.0.1", 0) as listener:
            server = await asyncio.get_running_loop().create_server(TransportNoting, sock=listener)
            async with server:
                _, writer = await asyncio.open_connection(*listener.getsockname())
                transport = await accepted.get()
                connection = transport.get_extra_info("socket")
                answer = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                writer.close()
                transport.close()
        return bool(answer)

    assert asyncio.run(has_no_delay())


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by what is done beside the event loop."""
    begun: list[str] = []
    in_executor, in_pool = asyncio.BaseEventLoop.run_in_executor, anyio.to_thread.run_sync

    def name_of(work: Any) -> str:
        inner = getattr(work, "func", work)
        if inner.__name__ == "run":  # of a context, as `asyncio.to_thread` has it
            inner = work.args[0]
        return str(inner.__name__)

    def beside(loop: Any, executor: Any, work: Any, *arguments: Any) -> Any:
        begun.append(name_of(work))
        return in_executor(loop, executor, work, *arguments)

    async def in_worker(work: Any, *arguments: Any, **more: Any) -> Any:
        begun.append(name_of(work))
        return await in_pool(work, *arguments, **more)

    monkeypatch.setattr(asyncio.BaseEventLoop, "run_in_executor", beside)
    monkeypatch.setattr(anyio.to_thread, "run_sync", in_worker)
    return begun


def test_a_small_request_wakes_four_threads(tmp_path: Path, threads: list[str]) -> None:
    """They look up model and files, choose hosts, paint, and read the picture: no more."""
    serving = Serving(tmp_path)
    with serving.client() as client:
        threads.clear()
        answer = client.post("/v1/images/generations", json={"prompt": "a dog"})
        assert answer.status_code == 200
        assert threads[: threads.index("reply") + 1] == ["_resolve", "_look", "paint", "reply"]


def test_the_mesh_that_is_up_is_read_once_until_it_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLUXMESH_HOME", str(tmp_path))
    tmp_path.chmod(0o700)
    reads: list[Path] = []
    read = mesh_file.read_private

    def counted(path: Path) -> str:
        reads.append(path)
        return read(path)

    monkeypatch.setattr(mesh_file, "read_private", counted)
    painters = CurrentPainter()
    alone = painters.get()
    assert painters.get() is alone and len(reads) == 2  # the painter looks itself, too

    members = (Member(0, "127.0.0.1:1", KEY, "", "", ""),)
    record = MeshRecord("mesh.json", '[{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}]', members)
    mesh_file.save(record)
    painter = painters.get()
    assert painter is not alone and painter.record == record
    reads.clear()
    for _ in range(3):  # a request asks three times: what it is, where it goes, and to be painted
        with painters.holding() as same:
            assert same is painter
        assert painters.book().ranks == {0}
    assert reads == []

    news = Timings(
        texts=(TextTiming(rank=0, model="tiny", dtype="bfloat16", bits=None, seconds=1.0),)
    )
    mesh_file.learn(record.text, [news])
    reads.clear()
    assert painters.get() is painter and painters.get() is painter and len(reads) == 1

    mesh_file.save(replace(record, members=(*members, Member(1, "127.0.0.1:2", KEY, "", "", ""))))
    assert painters.book().ranks == {0, 1}
    mesh_file.remove()
    assert painters.get().record is None
