"""What people see on a terminal and programs don't: colours, and a screen that is watched."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.integration.conftest import environment
from tests.terminal import CTRL_C, TerminalProcess

RED = "\x1b[31m"
OWN_SCREEN, BACK = "\x1b[?1049h", "\x1b[?1049l"


def on_a_terminal(
    home: Path, *words: str, no_color: str = "", term: str = "xterm-256color"
) -> TerminalProcess:
    command = (sys.executable, "-m", "fluxmesh_coordinator", *words)
    env = environment(home) | {"NO_COLOR": no_color}
    return TerminalProcess(command, cwd=home, env=env, term=term)


@pytest.mark.parametrize("words", [("generat",), ("generate", "--stps"), ("models", "show", "x")])
def test_the_word_error_is_red_unless_the_user_wants_no_colours(
    home: Path, words: tuple[str, ...]
) -> None:
    with on_a_terminal(home, *words) as shown:
        assert shown.wait() != 0
        assert f"{RED}\x1b[1mError:\x1b[0m " in shown.shown
    for plain in ({"no_color": "1"}, {"term": "dumb"}):
        with on_a_terminal(home, *words, **plain) as shown:
            shown.wait()
            assert "Error: " in shown.shown and "\x1b" not in shown.shown


def test_a_mesh_is_watched_on_a_screen_of_its_own_until_ctrl_c(home: Path) -> None:
    with on_a_terminal(home, "status", "--watch") as shown:
        shown.until(OWN_SCREEN)
        for _ in range(2):  # drawn over, never wiped: nothing flickers
            assert "\x1b[2J" not in shown.until("No mesh is up")
        shown.type(CTRL_C)
        assert shown.wait() == 130
        _, back, kept = shown.shown.partition(BACK)
        assert back and "No mesh is up" in kept
        assert "Cancelled" not in kept and "Traceback" not in kept


def test_a_preview_is_shown_while_it_is_painted_and_gone_when_the_picture_is_there(
    home: Path,
) -> None:
    words = ("generate", "a red apple", "--model", "tiny", "--image-size", "32x32", "--steps", "2")
    with on_a_terminal(home, *words, "--preview", term="xterm-kitty") as shown:
        assert shown.wait() == 0
        drawn, erased = "\x1b_Ga=T,f=100,q=2,i=8420", "\x1b_Ga=d,d=I,i=8420"
        assert shown.shown.count(drawn) == 2
        assert shown.shown.rindex(drawn) < shown.shown.rindex(erased) < shown.shown.index("Saved")
