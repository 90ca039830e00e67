"""Lines that a user types at a terminal: edited, completed by Tab, and remembered across sessions.

Python's readline stands on GNU's library or, on a Mac, on libedit, which differ in how Tab is bound
and in the form of their history files. So the history is a file of our own: a line an entry, added
as it is typed, that both are given one by one. A Python built without either reads lines all the
same.
"""

from __future__ import annotations

import importlib
import os
import select
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from fluxmesh.errors import FluxmeshError
from fluxmesh.storage import interrupts
from fluxmesh.storage.homes import read_private, write_private

KEPT = 1000  # entries of the history
PASTE = 0.05  # seconds in which the next line of a paste follows the one before

Complete = Callable[[str], Sequence[str]]  # the line so far -> what its last word may become


class LineEditor:
    """Reads one line after another; `read` is what a conversation calls."""

    def __init__(self, prompt: str, history: Path | None, complete: Complete) -> None:
        """`history` None, or a file that can't be used: nothing is remembered."""
        self.prompt, self._history, self._complete = prompt, history, complete
        self._readline = _readline()
        self._choices: list[str] = []
        if self._readline is not None:
            self._set_up(self._readline)

    def read(self) -> str:
        """The next line; one that was pasted in several lines is one, with spaces between.

        Ctrl-C drops what was typed. Raises `KeyboardInterrupt` where that was nothing, `EOFError`
        at Ctrl-D.
        """
        # What was typed while nobody read is lines of its own, each as it was ended.
        is_ahead = _has_input(0.0)
        lines = [self._line()]
        while not is_ahead and _has_input(PASTE):
            with suppress(EOFError):
                lines.append(input())
        text = " ".join(
            part.strip() for line in lines for part in line.splitlines() if part.strip()
        )
        self._remember(text)
        return text

    # Within

    def _line(self) -> str:
        """One line, and Ctrl-C begins it anew."""
        while True:
            try:
                return input(self.prompt)
            except KeyboardInterrupt:
                if self._readline is None or not self._readline.get_line_buffer():
                    raise
                interrupts.handled()
                sys.stdout.write("\n")

    def _set_up(self, readline: ModuleType) -> None:
        is_libedit = "libedit" in (readline.__doc__ or "")
        readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
        readline.set_completer_delims(" \t\n")  # a path is one word, and so is /model
        readline.set_completer(self._choice)
        readline.clear_history()
        # An entry that is typed is added by `_remember`, in the form that is kept.
        with suppress(AttributeError):
            readline.set_auto_history(False)
        for line in self._load():
            readline.add_history(line)

    def _load(self) -> list[str]:
        """The history; cut to its last entries where it has grown to twice as many."""
        if self._history is None:
            return []
        try:
            lines = read_private(self._history).splitlines()
            if len(lines) > 2 * KEPT:
                write_private(self._history, "".join(f"{line}\n" for line in lines[-KEPT:]))
        except (FluxmeshError, OSError):  # none yet, or none that can be used
            return []
        return lines[-KEPT:]

    def _remember(self, line: str) -> None:
        if not line.strip():
            return
        if self._readline is not None:
            count = self._readline.get_current_history_length()
            if count and self._readline.get_history_item(count) == line:
                return
            self._readline.add_history(line)
        if self._history is not None:
            with suppress(OSError, UnicodeEncodeError):
                mode = os.O_WRONLY | os.O_APPEND | os.O_CREAT
                with open(os.open(self._history, mode, 0o600), "w", encoding="utf-8") as file:
                    file.write(f"{line}\n")

    def _choice(self, _word: str, number: int) -> str | None:
        """What readline asks for: the choices one by one, then None."""
        assert self._readline is not None
        if number == 0:
            line = self._readline.get_line_buffer()[: self._readline.get_endidx()]
            self._choices = list(self._complete(line.lstrip()))
        return self._choices[number] if number < len(self._choices) else None


def path_choices(begun: str) -> list[str]:
    """Files and folders whose path begins so, as they are typed; folders end with a slash."""
    head, tail = os.path.split(begun)
    folder = os.path.expanduser(head) or "."
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    return [
        os.path.join(head, name) + ("/" if os.path.isdir(os.path.join(folder, name)) else "")
        for name in names
        if name.startswith(tail) and (tail or not name.startswith("."))
    ]


def _readline() -> ModuleType | None:
    try:
        return importlib.import_module("readline")
    except ImportError:
        return None


def _has_input(seconds: float) -> bool:
    """Whether something was typed that nobody has read yet, or is within so long."""
    ready, _, _ = select.select([sys.stdin], [], [], seconds)
    return bool(ready)
