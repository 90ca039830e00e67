"""`fluxmesh interactive` on a terminal: Ctrl-C, history across sessions, Tab, pasted text."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

from fluxmesh_coordinator.artifacts.recipe import read_recipe
from tests.integration.conftest import environment
from tests.terminal import CTRL_C, CTRL_D, TAB, UP, TerminalProcess

PROMPT = "fluxmesh> "


@pytest.fixture
def talk(home: Path, tmp_path: Path, checkpoint: Path) -> TerminalProcess:
    (tmp_path / "loras").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "photo of a dog.png")
    return session(home, tmp_path, checkpoint)


def session(home: Path, folder: Path, checkpoint: Path) -> TerminalProcess:
    options = ("--model", str(checkpoint), "--image-size", "32x32", "--steps", "1", "--seed", "7")
    command = (sys.executable, "-m", "fluxmesh_coordinator", "interactive", *options)
    return TerminalProcess(command, cwd=folder, env=environment(home), columns=100)


def press_ctrl_c(talk: TerminalProcess) -> None:
    """Once readline waits for keys: just before, it sees a signal no sooner than the next key."""
    talk.until_it_waits()
    talk.type(CTRL_C)


def test_ctrl_c_drops_the_line_and_twice_at_an_empty_one_ends_it(talk: TerminalProcess) -> None:
    with talk:
        talk.until(PROMPT)
        for _ in range(2):
            talk.type("a half-typed prom")
            talk.until("prom")  # a terminal drops what comes just before Ctrl-C
            press_ctrl_c(talk)
            assert "Ctrl-C again" not in talk.until(PROMPT)
        press_ctrl_c(talk)
        assert "Ctrl-C again, Ctrl-D or /quit ends." in talk.until(PROMPT)
        talk.type("/settings\n")
        assert "/seed" in talk.until(PROMPT)  # and nothing was painted
        press_ctrl_c(talk)  # not the second in a row
        talk.until("Ctrl-C again")
        talk.until(PROMPT)
        press_ctrl_c(talk)
        assert talk.wait() == 0
        assert "Traceback" not in talk.shown and "Saved" not in talk.shown


def test_ctrl_d_ends_it(talk: TerminalProcess) -> None:
    with talk:
        talk.until(PROMPT)
        talk.type(CTRL_D)
        assert talk.wait() == 0


def test_what_was_typed_comes_back_in_the_next_session(
    talk: TerminalProcess, home: Path, tmp_path: Path, checkpoint: Path
) -> None:
    with talk:
        talk.until(PROMPT)
        talk.type("/steps 3\n")
        talk.until(PROMPT)
        talk.type("two dogs on a beach\n")
        talk.until("Saved")
        talk.until(PROMPT)
        talk.type(CTRL_D)
        talk.wait()
    history = home / "mesh" / "history"
    assert history.read_text(encoding="utf-8") == "/steps 3\ntwo dogs on a beach\n"
    assert history.stat().st_mode & 0o777 == 0o600
    with session(home, tmp_path, checkpoint) as again:
        again.until(PROMPT)
        again.type(UP)
        again.until("two dogs on a beach")
        again.type("\n")
        again.until("Saved")
        again.until(PROMPT)
        again.type(UP + UP)
        again.until("/steps 3")
    assert history.read_text(encoding="utf-8") == "/steps 3\ntwo dogs on a beach\n"  # not twice


def test_tab_completes_settings_and_paths(talk: TerminalProcess) -> None:
    with talk:
        talk.until(PROMPT)
        talk.type("/outp" + TAB)
        talk.until("/outpaint")
        press_ctrl_c(talk)
        talk.until(PROMPT)
        talk.type("/adapter lo" + TAB)
        talk.until("loras/")
        press_ctrl_c(talk)
        talk.until(PROMPT)


def test_a_prompt_that_is_pasted_in_lines_is_one(talk: TerminalProcess, tmp_path: Path) -> None:
    long = "a very long prompt, " * 300
    with talk:
        talk.until(PROMPT)
        talk.type(f"a red apple\non a table,\n\n{long}\n")
        talk.until("Saved")
        talk.until(PROMPT)
        talk.type(CTRL_D)
        assert talk.wait() == 0
    prompt = read_recipe(tmp_path / "out.png").prompt
    assert prompt == f"a red apple on a table, {long.strip()}"
    assert not (tmp_path / "out-1.png").exists()
