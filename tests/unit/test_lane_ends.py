"""A job's end in which something breaks: who waits is told, and the next job is painted."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fluxmesh.events import Planned
from fluxmesh_coordinator.runtime.lent_hosts import HostBook
from fluxmesh_coordinator.server.paint_request import PaintRequest
from fluxmesh_coordinator.server.picture_folder import PictureFolder
from fluxmesh_coordinator.server.queue import journal as journals
from fluxmesh_coordinator.server.queue.journal import Journal
from fluxmesh_coordinator.server.queue.lane import Lane
from tests.serving import Serving, record

ASKED = PaintRequest(prompt="a dog", width=16, height=16, steps=1)


def full(*_anything: Any, **_more: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def broken(*_anything: Any, **_more: Any) -> Any:
    raise RuntimeError("a mistake of ours")


def of_journal(serving: Serving) -> tuple[Any, str]:
    return serving.service.journal, "ended"


def of_durations(serving: Serving) -> tuple[Any, str]:
    return serving.service._durations, "learn"


def of_places(serving: Serving) -> tuple[Any, str]:
    return serving.service, "_tell_places"


@pytest.mark.parametrize("breaks", [of_journal, of_durations, of_places])
@pytest.mark.parametrize("how", [full, broken])
def test_a_job_s_end_that_breaks_ends_the_lane_for_nobody(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    breaks: Callable[[Serving], tuple[Any, str]],
    how: Callable[..., Any],
) -> None:
    serving = Serving(tmp_path)

    async def life() -> None:
        service = serving.service
        await service.open()
        serving.lane.may_go.clear()
        first = await service.submit(ASKED, "anna")
        second = await service.submit(ASKED, "anna")
        while first.stage != "running":
            await asyncio.sleep(0.005)
        with monkeypatch.context() as patch:
            patch.setattr(*breaks(serving), how)
            serving.lane.may_go.set()
            assert (await first.events.over()).kind in ("done", "error")
            assert (await second.events.over()).kind in ("done", "error")
        third = await service.submit(ASKED, "anna")
        assert (await third.events.over()).kind == "done" and third.names
        await service.drain()
        await service.close()

    asyncio.run(asyncio.wait_for(life(), 60))


def test_a_picture_that_is_complete_is_done_though_the_journal_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving = Serving(tmp_path)

    async def life() -> None:
        await serving.service.open()
        monkeypatch.setattr(serving.service.journal, "ended", broken)
        job = await serving.service.submit(ASKED, "anna")
        assert (await job.events.over()).kind == "done" and job.stage == "done"
        await serving.service.close()

    asyncio.run(asyncio.wait_for(life(), 60))


def test_a_line_of_the_journal_that_was_cut_off_spoils_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, left = os.write, [9]

    def cut(file: int, data: bytes) -> int:
        """A disk that is full, and then is not."""
        return write(file, data[: left.pop()] if left else data)

    journal = Journal(tmp_path / "journal")
    with monkeypatch.context() as patch:
        patch.setattr(journals.os, "write", cut)
        journal.accepted(record("first-job"))
        journal.accepted(record("second-job"))
    journal.close()
    assert [each.id for each in Journal(tmp_path / "journal").lost] == ["second-job"]


def test_a_journal_that_is_too_large_is_begun_anew_with_what_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journals, "LARGEST", 1500)
    journal = Journal(tmp_path / "journal")
    journal.accepted(record("open-job"))
    for number in range(40):
        journal.accepted(record(f"job-{number}"))
        journal.ended(f"job-{number}")
    lines = [json.loads(line) for line in (tmp_path / "journal").read_text().splitlines()]
    assert lines[0][1]["id"] == "open-job" and len(lines) < 20
    journal.close()
    assert [each.id for each in Journal(tmp_path / "journal").lost] == ["open-job"]


def test_a_job_in_parts_has_the_time_of_all_that_it_has_left(tmp_path: Path) -> None:
    """Of images 0 to 5 the second is there already: first the one before it is painted."""

    def of_images(count: int) -> Any:
        model, request = SimpleNamespace(is_changed=False), SimpleNamespace(n_images=count)
        return SimpleNamespace(model=model, request=request)

    def events_of(part: Any, *_how: Any) -> Iterator[Planned]:
        seconds = 2.0 * part.request.n_images
        yield Planned(placement="data", hosts=(0,), seconds=seconds, reason="")

    lane = Lane(PictureFolder(tmp_path))
    painter = SimpleNamespace(start=events_of, record=None)
    painters: Any = SimpleNamespace(using=lambda: nullcontext((painter, HostBook([0]))))
    lane.painters = painters
    job: Any = SimpleNamespace(
        ready=SimpleNamespace(recipe=None), spread=None, lent=None, is_cancelled=False,
        parts=lambda: [(0, of_images(1)), (2, of_images(4))],
    )  # fmt: skip
    seconds: list[float] = []
    lane.paint(job, lambda _kind, fields: seconds.append(fields["seconds"]))
    lane.thread.shutdown()
    assert seconds == [10.0, 8.0]
