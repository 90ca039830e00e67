"""What `up` says of a model that some hosts lack, before it asks for a copy."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from fluxmesh.cluster.snapshot import LinkInfo
from fluxmesh_coordinator.console.up_report import TerminalWatcher
from fluxmesh_coordinator.deploy.model_offer import PushOffer, push_offer

HAS: dict[str, Any] = {"model": {"content": "abc", "bytes": 34_000_000_000, "revision": "r"}}
OTHER: dict[str, Any] = {"model": {"content": "def", "bytes": 5, "revision": "s"}}
LACKS: dict[str, Any] = {"model": {"problem": "It is not here."}}


def link(source: int, target: int, rate: float) -> LinkInfo:
    return LinkInfo(source=source, target=target, rate=rate)


def test_hosts_that_lack_it_or_have_other_files_get_what_this_machine_has() -> None:
    offer = push_offer("schnell", HAS, {0: HAS, 1: LACKS, 2: OTHER}, ())
    assert offer == PushOffer("schnell", "here", (1, 2), 34_000_000_000, None)


def test_a_host_that_has_it_serves_where_this_machine_has_not() -> None:
    offer = push_offer("schnell", LACKS, {0: LACKS, 1: HAS}, ())
    assert offer is not None and (offer.where, offer.ranks) == ("on host 1", (0,))


@pytest.mark.parametrize(
    ("here", "there"), [(HAS, HAS), (LACKS, LACKS), ({}, {})], ids=["all", "none", "no model"]
)
def test_nothing_is_offered_where_nobody_lacks_it_or_nobody_has_it(
    here: dict[str, Any], there: dict[str, Any]
) -> None:
    assert push_offer("schnell", here, {0: there}, ()) is None


def test_the_time_is_that_of_the_slowest_link_of_the_chain() -> None:
    links = [link(0, 1, 1e9), link(2, 1, 2e9), link(0, 2, 0.5e9)]
    offer = push_offer("schnell", HAS, {0: HAS, 1: LACKS, 2: LACKS}, links)
    assert offer is not None and offer.seconds == 68.0
    unknown = push_offer("schnell", HAS, {0: HAS, 1: LACKS, 3: LACKS}, links)
    assert unknown is not None and unknown.seconds is None


class Terminal(io.StringIO):
    """Somebody who reads and answers."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("answer", "pull", "push", "may"),
    [
        ("\n", False, False, True),
        ("n\n", False, False, False),
        ("", True, False, False),
        ("", False, True, True),
        (None, False, False, False),
    ],
    ids=["enter", "no", "--pull", "--push", "no terminal"],
)
def test_the_question_names_size_and_time_and_is_asked_of_people_alone(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answer: str | None,
    pull: bool,
    push: bool,
    may: bool,
) -> None:
    monkeypatch.setattr("sys.stdin", Terminal(answer) if answer is not None else io.StringIO())
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=answer is not None, width=200, highlight=False)
    watcher = TerminalWatcher(pull, console, push=push)
    offer = PushOffer("schnell", "on host 0", (1, 2), 33_700_000_000, 31.0)
    assert watcher.may_push(offer) is may
    said = screen.getvalue() + capsys.readouterr().err
    assert "schnell (33.7 GB) is on host 0 and not on host 1, host 2." in said
    assert ("in about 31 s?" in said) == bool(answer)
