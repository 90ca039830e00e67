"""What `fluxmesh plan` prints: predicted beside measured, its age, and which figure decided."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fluxmesh.planning.plan import plan
from fluxmesh_coordinator.console import plan_table, terminal
from tests.unit.meshes import FLUX, ask
from tests.unit.test_learning import job, mac, ring_of, timed, view_of, warm

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
