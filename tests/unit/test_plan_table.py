"""What `fluxmesh plan` prints: predicted beside measured, its age, and which figure decided."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fluxmesh.cluster.snapshot import CollectiveTime
from fluxmesh.planning.plan import plan
from fluxmesh_coordinator.console import plan_table, terminal
from tests.unit.meshes import FLUX, GB, ask
from tests.unit.test_learning import job, mac, ring_of, timed, view_of, warm
from tests.unit.test_text_place import bare, chosen

NOW = 1_000_000.0


def rows(view: object, **keys: object) -> dict[tuple[str, str], list[str]]:
    choice = plan(ask(**keys), view, FLUX)  # type: ignore[arg-type]
    made = [plan_table.row(option, option is choice.winner, NOW) for option in choice.options]
    return {(row[1], row[2]): row for row in made}


def cell(row: list[str], heading: str) -> str:
    return row[plan_table.HEADINGS.index(heading)]


def test_a_row_shows_what_is_predicted_and_what_was_measured_last() -> None:
    later = replace(job(2.0, when=NOW - 120), last_seconds=2.5)
    row = rows(view_of(jobs=[later]))["sequence", "0,1"]
    assert cell(row, "a step") == "2.00 s"
    assert cell(row, "last measured") == "2.50 s, 2 min ago"
    assert row[-1] == ""


def test_what_up_measured_is_measured_too_and_what_nobody_did_is_a_dash() -> None:
    hosts = [mac(rank, measured=(timed(3.0, when=NOW - 30),)) for rank in range(2)]
    table = rows(view_of(*hosts))
    assert cell(table["data", "0"], "last measured") == "3.00 s, 30 s ago"
    assert cell(table["sequence", "0,1"], "last measured") == "-"
    assert table["sequence", "0,1"][-1] == "from plain sockets"
    assumed = [mac(rank, measured=(timed(3.0),)) for rank in range(2)]
    assert cell(rows(view_of(*assumed))["data", "0"], "last measured") == "3.00 s"


def test_who_reads_the_prompt_is_told_with_the_reason_and_each_hosts_memory() -> None:
    """By layers, in turns, beside the denoiser, on another host, and from memory."""
    apart = chosen(bare(0, 40), bare(1, 80))
    assert plan_table.text_line(apart).startswith("Text encoder (bfloat16, 33.3 GB) on host 1, ")
    small = chosen(*(bare(rank, 27) for rank in range(4)))
    assert "host 0, layer by layer, 1." in plan_table.text_line(small)
    assert "as a whole it doesn't fit into 27.0 GB" in plan_table.text_line(small)
    reload = chosen(*(bare(rank, 48) for rank in range(2)))
    assert "the denoiser would have to load again for each prompt" in plan_table.text_line(reload)
    both = chosen(bare(0, 48), bare(1, 48), text_bits=4)
    line = plan_table.text_line(both)
    assert "(4 bits, 9.4 GB)" in line and "beside its part of the denoiser, where it stays" in line
    turns = plan(ask(), view_of(mac(0, memory_bytes=30 * GB, text=None)), FLUX)
    assert "in turns with the denoiser: 9.8 and 26.1 GB" in plan_table.text_line(turns)
    assert "7.98 s loads the denoiser again" in plan_table.text_line(turns)
    known = plan(ask(), view_of(), FLUX)
    assert "remembered on host 0" in plan_table.text_line(known)


def test_the_memory_of_hosts_is_shown_phase_by_phase(capsys: pytest.CaptureFixture[str]) -> None:
    choice = chosen(bare(0, 27), bare(1, 27), bare(2, 27), bare(3, 27))
    plan_table.show(choice, view_of(), NOW)
    lines = capsys.readouterr().out.splitlines()
    heading = next(i for i, line in enumerate(lines) if line.endswith("may use"))
    rows = [line.split() for line in lines[heading + 1 : heading + 5]]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    assert rows[0][1] == "1.2" and rows[1][1] == "-"
    assert all(row[-2:] == ["27.0", "GB"] for row in rows)


def test_what_only_a_first_request_takes_is_a_column_of_its_own() -> None:
    jobs = [job(0.1, kernels_seconds=20.0)]
    assert cell(rows(view_of(jobs=jobs))["sequence", "0,1"], "cold") == "20.00 s"
    assert cell(rows(view_of(warm(0, "data")))["data", "0"], "cold") == ""


@pytest.mark.parametrize(
    ("view", "sentence"),
    [
        (view_of(), "the links as plain sockets found them"),
        (view_of(rings=[ring_of(when=NOW - 7300)]), "collectives of this ring, measured 2 h ago"),
        (
            view_of(jobs=[job(0.1, when=NOW)]),
            "a step at this size on these hosts, measured 0 s ago",
        ),
        (view_of(jobs=[job(0.1, side=512, when=NOW)]), "a step at another size on these hosts"),
    ],
)
def test_the_figure_that_decided_is_named_with_its_age(view: object, sentence: str) -> None:
    choice = plan(ask(), view, FLUX)  # type: ignore[arg-type]
    (line,) = plan_table.decided_by(choice, NOW)
    assert line.startswith("Decided by sequence: ") and line.endswith(".")
    assert sentence in line


def test_each_ring_is_told_by_its_latency_and_rate() -> None:
    view = view_of(rings=[ring_of(when=NOW - 200_000)])
    (line,) = plan_table.rings(plan(ask(), view, FLUX), view, NOW)
    assert line == (
        "Ring of hosts 0,1 over ring, measured 2 d ago: gathers take 0.01 ms and 33.89 GB/s, "
        "sums take 0.01 ms and 33.89 GB/s; 50% of a gather passes beside products."
    )


def test_a_slow_ring_has_a_rate_too() -> None:
    slow = replace(
        ring_of(when=NOW), sums=(CollectiveTime(1_000, 0.010), CollectiveTime(1_001_000, 0.510))
    )
    view = view_of(rings=[slow])
    (line,) = plan_table.rings(plan(ask(), view, FLUX), view, NOW)
    assert " sums take " in line and " 2.00 MB/s; " in line


def test_a_program_is_told_all_of_it() -> None:
    view = view_of(jobs=[job(2.0, when=5.0)], rings=[ring_of(when=7.0)])
    printed = json.loads(json.dumps(plan_table.as_json(plan(ask(), view, FLUX), view, NOW)))
    option = next(entry for entry in printed["options"] if entry["name"] == "sequence")
    phase = option["phases"][0]
    assert (phase["figure"], phase["figure_when"], phase["last_seconds"]) == ("step", 5.0, 2.0)
    assert (printed["now"], printed["rings"][0]["when"]) == (NOW, 7.0)
    assert option["cold_seconds"] == 0.0


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    view = view_of(jobs=[job(2.0, when=NOW - 60, kernels_seconds=20.0)], rings=[ring_of(when=NOW)])
    plan_table.show(plan(ask(n_images=3), view, FLUX), view, NOW)
    printed = capsys.readouterr().out
    for text in (
        "takes about 20 s longer",
        "last measured",
        "2.00 s, 60 s ago",
        "Decided by",
        "Ring of hosts 0,1",
    ):
        assert text in printed
    assert max(map(len, printed.splitlines()[:4])) <= terminal.PLAIN_WIDTH


@pytest.mark.parametrize("width", [80, 100, 120])
def test_a_narrow_terminal_has_whole_cells_in_fewer_columns(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "PLAIN_WIDTH", width)
    view = view_of(jobs=[job(2.0, when=NOW - 60, kernels_seconds=20.0)], rings=[ring_of(when=NOW)])
    plan_table.show(plan(ask(n_images=3), view, FLUX), view, NOW)
    printed = capsys.readouterr().out.splitlines()
    _, headings, *table = printed[: next(k for k, x in enumerate(printed) if "predicted" in x)]
    shown = headings.split("  ")
    assert {text.strip() for text in shown} - {""} <= set(plan_table.HEADINGS)
    assert all(heading in headings for heading in ("placement", "hosts", "time", "a step"))
    assert max(map(len, (headings, *table))) <= width
    text = "\n".join(table)
    assert "sequence" in text and "2.86 s + 1.77 s" in text
    assert ("last measured" in headings) == (width >= 120)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.447, "447 ms"),
        (21.5, "21.50 s"),
        (99.6, "1 min 40 s"),
        (3544.6, "59 min 5 s"),
        (5804.9, "1 h 37 min"),
    ],
)
def test_times_are_in_the_units_that_a_person_uses(seconds: float, text: str) -> None:
    assert plan_table.duration(seconds) == text
