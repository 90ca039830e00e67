"""Pictures on a terminal: which knows what, what is written, and never into a pipe."""

from __future__ import annotations

import base64
import io
import os
import re
import stat
import time
from pathlib import Path

import pytest
from rich.console import Console

from fluxmesh_coordinator.console import generate_report, terminal_pictures
from fluxmesh_coordinator.console.generate_report import Display, GenerateTerminalReporter
from fluxmesh_coordinator.console.terminal_pictures import drawing, open_in_viewer, protocol_of

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 40


@pytest.mark.parametrize(
    ("environ", "protocol"),
    [
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "iterm"),  # through ssh
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm"),
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "Apple_Terminal"}, None),
        ({"TERM": "screen-256color", "LC_TERMINAL": "iTerm2"}, None),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/tmux,1,0"}, None),
        ({}, None),
    ],
)
def test_a_terminal_is_known_by_its_variables(
    environ: dict[str, str], protocol: str | None
) -> None:
    assert protocol_of(environ) == protocol


def test_iterm_is_given_the_file_itself() -> None:
    text = drawing(PNG, "iterm", "out.png")
    match = re.fullmatch(r"\x1b\]1337;File=name=([^;]+);size=(\d+);inline=1:([^\a]+)\a\n", text)
    assert match
    assert base64.b64decode(match[1]) == b"out.png"
    assert (int(match[2]), base64.b64decode(match[3])) == (len(PNG), PNG)


@pytest.mark.parametrize("length", [3, 3072, 3073, len(PNG)])
def test_kitty_is_given_pieces_of_which_the_last_says_so(length: int) -> None:
    text = drawing(PNG[:length], "kitty")
    pieces = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", text)
    assert text.endswith("\n") and len(pieces) == -(-length // 3072)
    assert pieces[0][0].startswith("a=T,f=100,q=2,")
    assert [keys.rpartition("m=")[2] for keys, _ in pieces] == ["1"] * (len(pieces) - 1) + ["0"]
    assert all(len(data) <= 4096 for _, data in pieces)
    assert base64.b64decode("".join(data for _, data in pieces)) == PNG[:length]


class Screen(io.StringIO):
    """A terminal, as far as those who write to it can see."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("shows", [True, False])
def test_a_picture_is_shown_where_it_is_asked_for_and_never_in_a_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_terminal: bool, shows: bool
) -> None:
    (tmp_path / "out.png").write_bytes(PNG)
    out = Screen() if is_terminal else io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr(os, "environ", {"TERM": "xterm-kitty"})
    console = Console(file=io.StringIO(), force_terminal=True)
    GenerateTerminalReporter(display=Display(shows=shows), console=console).saved(
        tmp_path / "out.png", [1]
    )
    assert ("\x1b_G" in out.getvalue()) == (is_terminal and shows)


def test_a_terminal_that_can_not_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out.png").write_bytes(PNG)
    monkeypatch.setenv("FLUXMESH_HOME", str(tmp_path / "home"))
    for name in ("KITTY_WINDOW_ID", "TERM_PROGRAM", "LC_TERMINAL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    out, screen = Screen(), io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    reporter = GenerateTerminalReporter(display=Display(shows=True), console=Console(file=screen))
    for _ in range(2):
        reporter.saved(tmp_path / "out.png", [1])
    assert "\x1b" not in out.getvalue()
    assert screen.getvalue().count("This terminal shows no pictures; iTerm2, kitty") == 1


@pytest.mark.parametrize(("is_mac", "command"), [(True, "open"), (False, "xdg-open")])
def test_the_viewer_of_the_machine_is_given_the_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_mac: bool, command: str
) -> None:
    monkeypatch.setattr(terminal_pictures, "is_mac", lambda: is_mac)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    viewer = tmp_path / command
    viewer.write_text(f'#!/bin/sh\nprintf %s "$1" > {tmp_path}/part && mv part seen\n')
    viewer.chmod(viewer.stat().st_mode | stat.S_IXUSR)
    assert open_in_viewer(Path("my dog.png")) == ""
    deadline = time.monotonic() + 60
    while not (tmp_path / "seen").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (tmp_path / "seen").read_text() == f"{tmp_path}/my dog.png"
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert open_in_viewer(Path("x.png")) == f"x.png can't be opened: this machine has no {command}."


def test_a_viewer_that_is_missing_fails_no_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []

    def refuse(path: Path) -> str:
        opened.append(path)
        return "It can't."

    monkeypatch.setattr(generate_report, "open_in_viewer", refuse)
    screen = io.StringIO()
    reporter = GenerateTerminalReporter(display=Display(opens=True), console=Console(file=screen))
    reporter.saved(tmp_path / "out.png", [1])
    assert opened == [tmp_path / "out.png"] and screen.getvalue() == "It can't.\n"
