"""The mesh that all lanes of a server share, while another one comes up beside it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fluxmesh.errors import WeightsError
from fluxmesh.events import Event
from fluxmesh_coordinator.agents.mesh_file import Member, MeshRecord
from fluxmesh_coordinator.commands.generate import Painter
from fluxmesh_coordinator.runtime.lent_hosts import HostBook, LentHosts
from fluxmesh_coordinator.runtime.mesh import Mesh
from fluxmesh_coordinator.server.picture_folder import PictureFolder
from fluxmesh_coordinator.server.queue import lane
from fluxmesh_coordinator.server.queue.lane import CurrentPainter, Lane
from tests.fakes import KEY


def record(hosts: int, name: str = "mesh.json") -> MeshRecord:
    members = tuple(Member(rank, f"{name}:{rank}", KEY, "", "", "") for rank in range(hosts))
    return MeshRecord(name, name, members)


class CountedPainter:
    """A painter whose mesh is an object; it says when it was let go of."""

    up: MeshRecord | None = None
    made: list[CountedPainter]

    def __init__(self, *_arguments: Any, **_options: Any) -> None:
        self.record, self.meshes, self.is_over = CountedPainter.up, 0, False
        CountedPainter.made.append(self)

    @property
    def mesh(self) -> CountedPainter:
        self.meshes += 1
        return self

    def adopt(self, faults: tuple[object, ...]) -> None:
        """Which backends have failed is in the record, whoever wrote it."""

    def __exit__(self, *_error: object) -> None:
        assert not self.is_over
        self.is_over = True


@pytest.fixture
def painters(monkeypatch: pytest.MonkeyPatch) -> CurrentPainter:
    CountedPainter.up, CountedPainter.made = record(2), []
    monkeypatch.setattr(lane, "Painter", CountedPainter)
    monkeypatch.setattr(lane.mesh_file, "load", lambda: CountedPainter.up)
    monkeypatch.setattr(lane.mesh_file, "stamp", lambda: CountedPainter.up)
    return CurrentPainter()


def test_a_mesh_that_another_follows_is_held_until_its_last_job_is_over(
    painters: CurrentPainter,
) -> None:
    with painters.using() as (first, book):
        assert book.ranks == {0, 1}
        with painters.using() as (same, same_book):
            assert same is first and same_book is book
            CountedPainter.up = record(3, "other.json")
            with painters.using() as (second, other_book):
                assert second is not first and other_book.ranks == {0, 1, 2}
        assert not CountedPainter.made[0].is_over  # a job of it runs
    assert CountedPainter.made[0].is_over
    assert not CountedPainter.made[1].is_over  # the next job is its
    painters.drop()
    assert [painter.is_over for painter in CountedPainter.made] == [True, True]


def test_one_that_is_dropped_while_jobs_use_it_ends_with_the_last_of_them(
    painters: CurrentPainter,
) -> None:
    with painters.using() as (first, _):
        painters.drop()
        painters.drop()
        with painters.using() as (second, _):
            assert second is not first
        assert [painter.is_over for painter in CountedPainter.made] == [False, False]
    assert [painter.is_over for painter in CountedPainter.made] == [True, False]


def test_a_mesh_that_fails_after_another_has_come_up_ends_alone(painters: CurrentPainter) -> None:
    with painters.using() as (first, _):
        CountedPainter.up = record(3, "other.json")
        with painters.using() as (second, book):
            painters.fails(first)
            with painters.using() as (same, same_book):
                assert same is second and same_book is book
    painters.fails(second)
    assert painters.get() is not second
    assert [painter.is_over for painter in CountedPainter.made] == [True, True, False]


def test_nobody_waits_for_the_end_of_a_mesh_but_who_noticed_that_another_one_is_up(
    painters: CurrentPainter, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_ending, may_end = threading.Event(), threading.Event()
    end = CountedPainter.__exit__

    def slow(self: CountedPainter, *error: object) -> None:
        is_ending.set()
        assert may_end.wait(60)
        end(self, *error)

    monkeypatch.setattr(CountedPainter, "__exit__", slow)
    first = painters.get()
    CountedPainter.up = record(3, "other.json")
    noticing = threading.Thread(target=painters.book)
    noticing.start()
    assert is_ending.wait(60)
    with ThreadPoolExecutor(1) as threads:
        try:
            assert threads.submit(painters.get).result(50) is not first
        finally:
            may_end.set()
    noticing.join()
    assert CountedPainter.made[0].is_over and not CountedPainter.made[1].is_over


def test_hosts_that_come_free_wake_whoever_listens_then(painters: CurrentPainter) -> None:
    heard: list[str] = []
    book = painters.book()
    painters.changed = lambda: heard.append(threading.current_thread().name)
    book.lend([0]).give_back()
    assert len(heard) == 1
    CountedPainter.up = None
    assert painters.book().ranks == {0}  # this machine alone


def test_who_asks_how_a_mesh_is_keeps_it_from_ending_meanwhile(painters: CurrentPainter) -> None:
    with painters.looking() as nobody:
        assert nobody is None
    painters.book()
    with painters.looking() as first:
        with painters.holding() as same:
            assert same is first
            CountedPainter.up = record(3, "other.json")
            with painters.using() as (second, _):
                assert second is not first
        assert [painter.is_over for painter in CountedPainter.made] == [False, False]
    assert [painter.is_over for painter in CountedPainter.made] == [True, False]
    with painters.looking() as current:
        assert current is second


def test_a_mesh_that_takes_long_to_begin_holds_up_no_job_of_the_one_before(
    painters: CurrentPainter, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_begin, begins = threading.Event(), threading.Event()

    def mesh(painter: CountedPainter) -> CountedPainter:
        if painter.record == CountedPainter.up and painter.record != record(2):
            begins.set()
            assert may_begin.wait(60)
        return painter

    monkeypatch.setattr(CountedPainter, "mesh", property(mesh))
    ended = threading.Event()

    def job_of_the_other() -> None:
        with painters.using():
            pass

    def end() -> None:
        with painters.looking():
            ended.set()

    with painters.using():
        CountedPainter.up = record(3, "other.json")
        other = threading.Thread(target=job_of_the_other)
        other.start()
        assert begins.wait(60)
        threading.Thread(target=end, daemon=True).start()
        try:
            assert ended.wait(50)
            assert painters.book().ranks == {0, 1, 2}
        finally:
            may_begin.set()
            other.join()
    assert CountedPainter.made[0].is_over


def _one_image(is_changed: bool = False) -> SimpleNamespace:
    """What a lane asks of a resolved request."""
    model, request = SimpleNamespace(is_changed=is_changed), SimpleNamespace(n_images=1)
    return SimpleNamespace(model=model, request=request)


def test_a_job_that_is_cancelled_while_its_mesh_begins_is_not_painted(tmp_path: Path) -> None:
    ends: list[bool] = []
    lane_of_it = Lane(PictureFolder(tmp_path))
    job: Any = SimpleNamespace(
        ready=SimpleNamespace(resolved=None, recipe=None),
        spread=None,
        lent=None,
        is_cancelled=False,
        parts=lambda: [(0, _one_image())],
    )

    def start(_resolved: object, _spread: object, lent: LentHosts) -> Iterator[Event]:
        ends.append(lent.is_cancelled)
        yield from ()

    @contextmanager
    def using() -> Iterator[tuple[Any, HostBook]]:
        job.is_cancelled = True  # while it began
        lane_of_it.cancel(job)  # which finds nothing to end
        yield SimpleNamespace(start=start, record=None), HostBook([0])

    painters: Any = SimpleNamespace(using=using)
    lane_of_it.painters = painters
    lane_of_it.paint(job, lambda _kind, _fields: None)
    assert ends == [True]  # `Mesh` cancels it before it asks any host for anything


def test_a_job_whose_model_has_changed_while_it_waited_is_not_painted(tmp_path: Path) -> None:
    """It would be painted with the settings of the files that were there when it was asked for."""
    resolved = _one_image()
    job: Any = SimpleNamespace(
        ready=SimpleNamespace(resolved=None, recipe=None), spread=None, lent=None,
        is_cancelled=False, parts=lambda: [(0, resolved)], model="mine",
    )  # fmt: skip
    begun: list[object] = []

    def start(*how: object) -> Iterator[Event]:
        begun.append(how)
        yield from ()

    @contextmanager
    def using() -> Iterator[tuple[Any, HostBook]]:
        yield SimpleNamespace(start=start, record=None), HostBook([0])

    lane_of_it = Lane(PictureFolder(tmp_path / "pictures"))
    painters: Any = SimpleNamespace(using=using)
    lane_of_it.painters = painters
    lane_of_it.paint(job, lambda _kind, _fields: None)
    assert len(begun) == 1
    resolved.model.is_changed = True
    with pytest.raises(WeightsError, match="The files of mine were changed while this waited"):
        lane_of_it.paint(job, lambda _kind, _fields: None)
    assert len(begun) == 1


def test_threads_that_ask_for_a_mesh_at_once_begin_one(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[object] = []

    def of_user(_record: object) -> object:
        begun.append(object())
        time.sleep(0.1)  # a second thread asks meanwhile
        return begun[-1]

    monkeypatch.setattr(Mesh, "of_user", of_user)
    monkeypatch.setattr(lane.mesh_file, "load", lambda: None)
    painter = Painter(lane.NotesReporter(), keep_warm=True)
    with ThreadPoolExecutor(4) as threads:
        meshes = list(threads.map(lambda _: painter.mesh, range(4)))
    assert len(begun) == 1 and set(map(id, meshes)) == {id(begun[0])}


def test_who_only_looks_things_up_connects_to_no_mesh(painters: CurrentPainter) -> None:
    for _ in range(2):
        painters.get()
        painters.book()
    assert [painter.meshes for painter in CountedPainter.made] == [0]
