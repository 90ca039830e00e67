"""A hint is given once a day, to people, whatever stands in the way of remembering it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from fluxmesh_coordinator.console.daily_hints import DAY, is_due
from fluxmesh_coordinator.console.generate_report import (
    GenerateJsonReporter,
    GenerateTerminalReporter,
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLUXMESH_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_hint_is_due_once_a_day_and_each_by_itself(home: Path) -> None:
    assert is_due("tiny", 1000.0)
    assert not is_due("tiny", 1000.0 + DAY - 1)
    assert is_due("other", 1000.0 + DAY - 1)
    assert is_due("tiny", 1000.0 + DAY)
    assert is_due("tiny", 500.0)  # the clock was set back


@pytest.mark.parametrize("text", ["", "[1]", '{"tiny": "yesterday"}', "{"])
def test_a_damaged_file_hides_no_hint(home: Path, text: str) -> None:
    assert is_due("tiny", 1000.0)
    (home / "hints.json").write_text(text)
    (home / "hints.json").chmod(0o600)
    assert is_due("tiny", 1001.0)


def test_a_folder_that_can_not_be_made_hides_no_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLUXMESH_HOME", str(tmp_path / "file" / "home"))
    assert is_due("tiny") and is_due("tiny")


def test_people_hear_it_once_and_programs_never(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    GenerateJsonReporter().hint("tiny", "There is FLUX.")
    assert capsys.readouterr().out == ""
    screen = io.StringIO()
    for _ in range(2):
        GenerateTerminalReporter(console=Console(file=screen)).hint("tiny", "There is FLUX.")
    assert screen.getvalue() == "There is FLUX.\n"
