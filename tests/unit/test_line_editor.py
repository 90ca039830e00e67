"""A line editor on GNU's readline, on a Mac's libedit and on none, as far as they differ."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest

from fluxmesh_coordinator.console import line_editor
from fluxmesh_coordinator.console.line_editor import KEPT, LineEditor, path_choices


class Readline(types.ModuleType):
    """Keeps what it is told."""

    def __init__(self, doc: str) -> None:
        super().__init__("readline", doc)
        self.bound: list[str] = []
        self.entries: list[str] = []
        self.line = ""

    def parse_and_bind(self, text: str) -> None:
        self.bound.append(text)

    def set_completer_delims(self, _letters: str) -> None: ...

    def set_completer(self, choice: Any) -> None:
        self.choice = choice

    def clear_history(self) -> None:
        self.entries.clear()

    def add_history(self, line: str) -> None:
        self.entries.append(line)

    def get_current_history_length(self) -> int:
        return len(self.entries)

    def get_history_item(self, number: int) -> str:
        return self.entries[number - 1]

    def get_line_buffer(self) -> str:
        return self.line

    def get_endidx(self) -> int:
        return len(self.line)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a readline in place, and lines that are typed; nothing is pasted."""

    def put(readline: Readline | None, *lines: str) -> None:
        typed = iter(lines)
        monkeypatch.setattr(line_editor, "_readline", lambda: readline)
        monkeypatch.setattr(line_editor, "_has_input", lambda _seconds: False)
        monkeypatch.setattr("builtins.input", lambda _prompt="": next(typed))

    return put


@pytest.mark.parametrize(
    ("doc", "bound"),
    [
        ("Importing this module enables command line editing using GNU readline.", "tab: complete"),
        ("Importing this module enables command line editing using libedit readline.",
         "bind ^I rl_complete"),
    ],
)  # fmt: skip
def test_each_library_is_bound_in_its_own_way_and_shares_the_history(
    tmp_path: Path, use: Any, doc: str, bound: str
) -> None:
    (tmp_path / "history").write_text("a café\n/steps 3\n", encoding="utf-8")
    (tmp_path / "history").chmod(0o600)
    readline = Readline(doc)
    use(readline, "two dogs", "two dogs", " ", "a cat")
    editor = LineEditor("> ", tmp_path / "history", lambda _line: [])
    assert readline.bound == [bound]
    assert [editor.read() for _ in range(4)] == ["two dogs", "two dogs", "", "a cat"]
    entries = ["a café", "/steps 3", "two dogs", "a cat"]
    assert readline.entries == entries
    assert (tmp_path / "history").read_text(encoding="utf-8").splitlines() == entries


def test_without_a_library_lines_are_read_and_remembered(tmp_path: Path, use: Any) -> None:
    use(None, "two dogs")
    assert LineEditor("> ", tmp_path / "history", lambda _line: []).read() == "two dogs"
    assert (tmp_path / "history").read_text() == "two dogs\n"
    use(None, "two dogs")
    assert LineEditor("> ", None, lambda _line: []).read() == "two dogs"
    use(None, "two dogs")  # a folder that can't be written to
    assert LineEditor("> ", tmp_path / "none" / "x", lambda _line: []).read() == "two dogs"


def test_a_long_history_is_cut_to_its_end(tmp_path: Path, use: Any) -> None:
    path = tmp_path / "history"
    path.write_text("".join(f"prompt {k}\n" for k in range(2 * KEPT + 1)))
    path.chmod(0o600)
    readline = Readline("")
    use(readline)
    LineEditor("> ", path, lambda _line: [])
    assert len(readline.entries) == KEPT and readline.entries[-1] == f"prompt {2 * KEPT}"
    assert path.read_text().splitlines() == readline.entries
    path.chmod(0o644)  # others could have read it: it is not used
    LineEditor("> ", path, lambda _line: [])
    assert readline.entries == []


def test_lines_that_follow_at_once_were_pasted_and_those_typed_ahead_were_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: Any
) -> None:
    use(Readline(""), "a red apple", "  on a table", "two dogs")
    waiting = iter([False, True, False])  # before the line; after it; after the next
    monkeypatch.setattr(line_editor, "_has_input", lambda _seconds: next(waiting))
    assert LineEditor("> ", None, lambda _line: []).read() == "a red apple on a table"
    use(Readline(""), "a red apple", "two dogs")
    waiting = iter([True, False, False])  # both were typed while a picture was painted
    monkeypatch.setattr(line_editor, "_has_input", lambda _seconds: next(waiting))
    editor = LineEditor("> ", None, lambda _line: [])
    assert [editor.read(), editor.read()] == ["a red apple", "two dogs"]


def test_readline_is_given_the_choices_one_by_one(use: Any) -> None:
    readline = Readline("")
    use(readline)
    LineEditor("> ", None, lambda line: [line + "1", line + "2"])
    readline.line = "  /st"
    assert [readline.choice("/st", k) for k in range(3)] == ["/st1", "/st2", None]


def test_paths_are_completed_as_they_are_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "shots").mkdir()
    (tmp_path / "shots" / ".hidden").touch()
    (tmp_path / "shots" / "a.png").touch()
    assert path_choices("sh") == ["shots/"]
    assert path_choices("~/sh") == ["~/shots/"]
    assert path_choices("shots/") == ["shots/a.png"]
    assert path_choices("shots/.") == ["shots/.hidden"]
    assert path_choices("nothing/x") == []
