"""What `status` shows: who works where, how far it is, what an engine holds, at any width."""

from __future__ import annotations

import dataclasses
import io
import random
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from fluxmesh.cluster.snapshot import (
    Holding,
    JobTiming,
    KeptModel,
    ModelVariant,
    StepTiming,
    Timings,
)
from fluxmesh.wire.messages import JobProgress, LeaseHolder, Reading, Status
from fluxmesh_coordinator.console import tables
from fluxmesh_coordinator.console.tables import duration, holds, short_device
from tests.messages import sample
from tools import status_picture

WHOLE = Holding(weights=ModelVariant("dev"), nbytes=24 * 10**9)
SHARD = Holding(weights=ModelVariant("dev", "bfloat16", 4), nbytes=2 * 10**9, shards=4, shard=1)
FOLDER = Holding(weights=ModelVariant("/models/dev-4bit/"), nbytes=10**9)


def status(**fields: object) -> Status:
    sampled: Status = sample(Status, random.Random(1))
    return dataclasses.replace(sampled, **{"holds": None, "loading": None, "kept": (), **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "nothing"),
        ({"holds": WHOLE}, "dev bfloat16"),
        ({"holds": SHARD}, "dev 4-bit, shard 2 of 4"),
        ({"holds": FOLDER}, "dev-4bit bfloat16"),
        ({"holds": WHOLE, "kept": (KeptModel(holds=SHARD), KeptModel(holds=FOLDER))},
         "dev bfloat16, also dev-4bit bfloat16, also dev 4-bit, shard 2 of 4"),
        ({"loading": Reading("transformer", 3_210_000_000, 23_800_000_000)},
         "transformer, 3.2 of 23.8 GB"),
        ({"holds": WHOLE, "loading": Reading("text encoders", 10**9, 9_500_000_000)},
         "text encoders, 1.0 of 9.5 GB"),
    ],
)  # fmt: skip
def test_a_host_tells_what_it_holds_now(fields: dict[str, object], text: str) -> None:
    assert holds(status(**fields)) == text


@pytest.mark.parametrize(
    ("progress", "text"),
    [
        (JobProgress(unit="image", done=2, total=4, step=3, steps=8), "2/4, step 3/8"),
        (JobProgress(unit="image", done=2, total=4), "2/4"),
        (JobProgress(unit="update", done=42, total=150), "update 42/150"),
        (JobProgress(), ""),
    ],
)
def test_a_job_tells_how_far_it_is(progress: JobProgress, text: str) -> None:
    lease = LeaseHolder(user="anna@studio", title="", progress=progress)
    assert tables.done(status(lease=lease)) == text
    assert tables.done(status(lease=None)) == ""


def test_times_are_read_at_a_glance() -> None:
    assert [duration(s) for s in (0, 9.4, 75, 3599.6, 3723)] == [
        *("0:00", "0:09", "1:15", "1:00:00", "1:02:03")
    ]


@pytest.mark.parametrize(
    ("kind", "short"),
    [
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "Xeon Platinum 8481C"),
        ("Intel(R) Core(TM) i9-9980HK CPU @ 2.40GHz", "Core i9-9980HK"),
        ("AMD EPYC 7B13 64-Core Processor", "EPYC 7B13"),
        ("Apple M2 Ultra", "M2 Ultra"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB HBM3"),
        ("unknown", "unknown"),
    ],
)
def test_a_devices_name_is_short(kind: str, short: str) -> None:
    assert short_device(kind) == short


def test_a_steps_time_is_that_of_what_is_held() -> None:
    """Not of another model, precision or size of ring, however late these were timed."""

    def timing(seconds: float, when: float, **fields: object) -> StepTiming:
        known = {"model": "dev", "height": 64, "width": 64, "dtype": "bfloat16", "bits": 4}
        return StepTiming(step_seconds=seconds, when=when, **{**known, **fields})  # type: ignore[arg-type]

    ring = timing(0.5, 9.0, placement="tensor", hosts=2)
    job = JobTiming(backend="ring", ranks=(0, 1), measured=ring, last_seconds=0.5)
    seen = status_picture.survey()
    seen = dataclasses.replace(
        seen, record=dataclasses.replace(seen.record, timings=Timings(jobs=(job,)))
    )
    timings = (
        *(timing(1.0, 1.0), timing(2.0, 3.0), timing(3.0, 2.0)),
        *(timing(4.0, 8.0, model="tiny"), timing(5.0, 8.0, bits=None)),
    )
    alone = dataclasses.replace(seen.statuses[0], measured=timings)
    sharded = dataclasses.replace(
        alone, holds=Holding(weights=status_picture.DEV, nbytes=1, shards=2)
    )
    for each, text in ((alone, "2.00 s 64x64"), (sharded, "500 ms 64x64 on 2")):
        moment = dataclasses.replace(seen, statuses={**seen.statuses, 0: each})
        host = moment.record.hosts[0]
        assert tables.step(moment, host, each, with_size=True) == text
    nothing = dataclasses.replace(alone, holds=None)
    assert tables.step(seen, seen.record.hosts[0], nothing, with_size=True) == ""


def shown(width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(tables.drawn(status_picture.survey(), width))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_no_row_is_folded_and_no_cell_is_cut(width: int) -> None:
    lines = shown(width)
    assert all(cell_len(line) <= width for line in lines)
    assert [line.split()[0] for line in lines[:5]] == ["host", "0", "1", "2", "3"]
    assert not any("…" in line for line in lines)


def test_narrow_terminals_leave_out_what_the_help_says() -> None:
    headings = {width: shown(width)[0].split() for width in (40, 80, 120, 160)}
    everything = ["host", "device", "state", "for", "job", "done", "left", "free", "holds"]
    everything += ["step", "link"]
    assert headings[160] == everything
    assert headings[120] == everything[:-1]
    assert headings[80] == ["host", "state", "for", "done", "left", "free", "holds", "step"]
    assert headings[40] == ["host", "state", "done"]
    assert "anna@studio" in shown(120)[1] and "anna " in shown(80)[1]


def test_who_waits_and_who_is_gone_stand_below() -> None:
    waits, gone = shown(120)[5:]
    assert waits == "cleo@cleo-mini waits for host 1: 1st in line, about 0:33 (1 image, 1024x1024)."
    assert gone.startswith("host 3 (attic): its agent is silent")


def test_an_idle_mesh_has_no_columns_of_jobs() -> None:
    seen = status_picture.survey()
    idle = {rank: dataclasses.replace(each, lease=None) for rank, each in seen.statuses.items()}
    seen = dataclasses.replace(seen, statuses=idle, errors={})
    headings = [c.heading for c in tables.fitted(tables.columns(seen), 200, tables.LEAVE_OUT)]
    assert headings == ["host", "device", "state", "free", "holds", "step", "link"]


def test_colours_are_left_out_where_the_user_wants_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def codes() -> str:
        screen = io.StringIO()
        Console(file=screen, width=80, force_terminal=True, color_system="standard").print(
            tables.drawn(status_picture.survey(), 80)
        )
        return screen.getvalue()

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[36mbusy" in codes() and "\x1b[1;31mgone" in codes()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "36m" not in codes() and "31m" not in codes()


@pytest.mark.parametrize("width", status_picture.WIDTHS)
def test_the_pictures_of_status_are_what_it_draws(width: int) -> None:
    def words(svg: str) -> list[str]:  # what draws them differs between versions of rich
        return re.findall(r">([^<>]*)</text>", svg)

    kept = status_picture.path(width).read_text(encoding="utf-8")
    assert words(kept) == words(status_picture.picture(width)), "python -m tools.status_picture"
    assert "url(" not in kept.replace("url(#", "")  # no font from elsewhere
