"""What `benchmarks.plans` makes of what it measured: how far off, and who was the fastest."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.plans import off, report, size, verdict


def case(placement: str, measured: float, predicted: float = 1.0, images: int = 1) -> Any:
    return {
        "height": 512, "width": 768, "images": images, "placement": placement, "hosts": [0, 1],
        "unseen": None, "predicted": predicted, "measured": measured, "step_predicted": 0.1,
        "step_measured": 0.2, "figure": "step", "cold": 0.0,
    }  # fmt: skip


def chosen(placement: str, images: int = 1) -> Any:
    return {"height": 512, "width": 768, "images": images, "chosen": placement, "hosts": [0, 1]}


@pytest.mark.parametrize(
    ("name", "judged"),
    [("sequence", "the fastest"), ("tensor", "a tie"), ("data", "NOT the fastest")],
)
def test_a_choice_is_judged_by_what_was_measured(name: str, judged: str) -> None:
    cases = [case("data", 2.0), case("sequence", 1.0), case("tensor", 1.04)]
    cases.append(case("data", 0.1, images=2))  # of another request
    row = verdict(chosen(name), cases)
    assert (row[2], row[5], row[-1]) == (name, "sequence", judged)


def test_a_choice_that_was_not_measured_is_no_tie() -> None:
    assert verdict(chosen("mixed"), [case("data", 2.0)])[-1] == "NOT the fastest"


def test_the_report_counts_what_was_predicted() -> None:
    results = [case("data", 1.1), case("sequence", 2.0), chosen("data")]
    printed = report(results)
    assert "1 of 2 requests took what was predicted, within 15%." in printed
    assert "| 512x768 | 1 | sequence | 2 |  | 1.000 | 2.000 | -50% |" in printed
    assert off(case("data", 2.0, predicted=3.0)) == pytest.approx(0.5)
    assert size("512x768") == (512, 768)
