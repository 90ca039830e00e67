"""What `benchmarks.plans` makes of what it measured: how far off, and who was the fastest."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from benchmarks.limited import shares
from benchmarks.plans import Case, Session, _round, size
from benchmarks.plans_report import off, report, verdict
from benchmarks.quiet import OtherWork
from fluxmesh import events


def case(placement: str, measured: float, predicted: float = 1.0, images: int = 1) -> Any:
    return {
        "height": 512, "width": 768, "images": images, "placement": placement, "hosts": [0, 1],
        "unseen": None, "predicted": predicted, "measured": measured, "step_predicted": 0.1,
        "step_measured": 0.2, "figure": "step", "cold": 0.0, "others": 0.0,
        "rounds": [{"measured": measured}],
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
    assert "| 512x768 | 1 | sequence | 2 |  | 1.000 | 2.000 | -50% | 2.000–2.000 |" in printed
    assert "The default choice was the fastest, or a tie, 1 of 1 times." in printed
    assert "left alone" not in printed
    results[1]["others"] = 0.5
    printed = report(results)
    assert "| 2.000* |" in printed and "Of the 1 that were warm and left alone: 1." in printed
    assert off(case("data", 2.0, predicted=3.0)) == pytest.approx(0.5)
    assert size("512x768") == (512, 768)


def asked(others: list[float], rounds: int = 2, colds: tuple[float, ...] = ()) -> Case:
    """A kind of request after three times `rounds` turns, in which others did so much.

    In the first ones, a ring was to be formed for `colds` seconds.
    """
    option = SimpleNamespace(
        name="data",
        seconds=1.0,
        ranks=(0, 1),
        cold_seconds=0.0,
        load_seconds=0.0,
        phases=[SimpleNamespace(step_seconds=0.1, figure="step")],
    )
    made: list[float] = []

    def paint(common: Any, images: int, placement: Any) -> Any:
        made.append(float(len(made)))
        return {"measured": made[-1], "step": 0.1, "others": others[len(made) - 1]}

    def plan(*_: Any) -> Any:
        option.cold_seconds = next(forming, 0.0)
        return option

    forming = iter(colds)
    session: Any = SimpleNamespace(plan=plan, paint=paint)
    case = Case({"height": 512, "width": 512}, 1, "data", 2.0, option)  # type: ignore[arg-type]
    for number in range(3 * rounds):
        _round(session, case, number, rounds)
    return case


def test_a_request_is_made_again_while_others_disturb_it_and_quiet_ones_count() -> None:
    calm = asked([0.0, 0.01, 0.0])
    assert [attempt["measured"] for attempt in calm.rounds] == [0.0, 1.0]
    helped = asked([0.5, 0.0, 0.4, 0.02, 0.0])
    assert [attempt["measured"] for attempt in helped.rounds] == [0.0, 1.0, 2.0, 3.0]
    assert helped.result["measured"] == 2.0 and helped.result["others"] == pytest.approx(0.01)
    loud = asked([0.5] * 6)
    assert len(loud.rounds) == 6 and loud.result["measured"] == 2.5
    assert loud.result["others"] == 0.5
    formed = asked([0.0] * 4, colds=(2.0, 0.0, 3.0))
    assert [attempt["measured"] for attempt in formed.counted] == [1.0, 3.0]
    assert formed.result["cold"] == 0.0


def test_what_others_keep_busy_is_what_none_of_ours_does() -> None:
    clock, machine, ours = [10.0], [100.0], {1: 5.0, 2: 7.0}

    def used(pid: int) -> float:
        if pid not in ours:
            raise psutil.NoSuchProcess(pid)
        return ours[pid]

    watch = OtherWork([1, 2, 3], lambda: machine[0], used, lambda: clock[0])
    watch.begin()
    clock[0], machine[0] = 14.0, 106.0  # six seconds in four, of which ours took five
    ours |= {1: 8.0, 2: 9.0}
    assert watch.end() == pytest.approx(0.25)
    watch.begin()
    clock[0], machine[0] = 16.0, 107.0
    del ours[2]  # it ended meanwhile
    ours[1] = 12.0
    assert watch.end() == 0.0


def test_this_machine_says_who_keeps_it_busy() -> None:
    watch, began = OtherWork([]), time.monotonic()
    watch.begin()
    time.sleep(0.3)  # counted in hundredths of a second
    busy = watch.end()
    # Its two looks may lie further apart than it thinks, where others use the machine.
    longest = (time.monotonic() - began) / 0.3
    assert 0.0 <= busy <= 1.5 * longest * (psutil.cpu_count() or 1)


@pytest.mark.parametrize(
    ("cores", "hosts", "each"),
    [
        ([0, 1], 2, [(0,), (1,)]),
        ([0, 1], 4, [(0,), (1,), (0,), (1,)]),
        ([0, 2, 5, 7, 9], 2, [(0, 2), (5, 7)]),
        ([3], 1, [(3,)]),
    ],
)
def test_a_host_computes_on_processors_of_its_own_also_when_it_is_alone(
    cores: list[int], hosts: int, each: list[tuple[int, ...]]
) -> None:
    assert shares(cores, hosts) == each


def test_each_request_has_a_prompt_that_nobody_has_read() -> None:
    prompts: list[str] = []

    def generate(request: Any, placement: Any) -> Any:
        prompts.append(request.prompt)
        yield events.Step(image=0, step=1, steps=1, seconds=0.1)
        yield events.Picture(image=0, seed=7, pixels=np.zeros((32, 32, 3), np.uint8))

    members = [SimpleNamespace(address="127.0.0.1:1")]
    mesh: Any = SimpleNamespace(
        generate=generate, status=dict, record=SimpleNamespace(members=members)
    )
    session = Session(mesh, SimpleNamespace(steps=1, limited=None))  # type: ignore[arg-type]
    for _ in range(2):
        painted = session.paint({"model": "m", "height": 32, "width": 32}, 1, "data")
        assert painted["measured"] > 0 and painted["step"] == 0.1 and painted["others"] >= 0
    assert len(set(prompts)) == 2
