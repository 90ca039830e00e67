"""Pictures in the terminals that can show them, and in the viewer of the machine.

Two protocols are written of: iTerm2's (a file in base64 behind OSC 1337, also WezTerm's) and
kitty's (PNG in pieces behind APC G, also Ghostty's). Both take the PNG as it is, so that nothing is
decoded here, and no library is needed. Which one a terminal knows is read from the environment: to
ask it would take an answer from the keyboard's stream.

https://iterm2.com/documentation-images.html
https://sw.kovidgoyal.net/kitty/graphics-protocol/
"""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from rich.console import Console

from fluxmesh.machine.tools import is_mac

Protocol = Literal["iterm", "kitty"]
ROWS = 12  # lines that a preview takes
NUMBER = 8420  # of it, for kitty, which keeps pictures by number
PIECE = 4096  # characters of base64 at most in one of kitty's messages
KNOWN = "iTerm2, kitty, WezTerm and Ghostty"


def protocol_of(environ: Mapping[str, str]) -> Protocol | None:
    """How the terminal of these variables shows pictures; None: not at all, or not surely.

    tmux and screen stand between, and pass neither on unless they are told to.
    """
    term, program = environ.get("TERM", ""), environ.get("TERM_PROGRAM", "")
    if "TMUX" in environ or term.startswith(("screen", "tmux")):
        return None
    if environ.get("KITTY_WINDOW_ID") or term in ("xterm-kitty", "xterm-ghostty"):
        return "kitty"
    if program.lower() == "ghostty":
        return "kitty"
    # LC_TERMINAL travels through ssh, TERM_PROGRAM does not.
    if program in ("iTerm.app", "WezTerm") or environ.get("LC_TERMINAL") == "iTerm2":
        return "iterm"
    return None


def drawing(png: bytes, protocol: Protocol, name: str = "") -> str:
    """What to write for a terminal to show a PNG, on lines of its own."""
    if protocol == "iterm":
        data = base64.b64encode(png).decode()
        label = base64.b64encode(os.fsencode(name)).decode()
        return f"\x1b]1337;File=name={label};size={len(png)};inline=1:{data}\a\n"
    # a=T: take and show; f=100: PNG; q=2: no answer into our input.
    return f"{_kitty(png, 'a=T,f=100,q=2,')}\n"


class TerminalPreview:
    """A picture that changes in its place on a terminal, for as long as nothing stands below it.

    Whoever writes beside it erases it first.
    """

    def __init__(self, console: Console, environ: Mapping[str, str]) -> None:
        self.console = console
        self.protocol = protocol_of(environ) if console.is_terminal else None
        self.is_shown = False

    @property
    def can_show(self) -> bool:
        """Whether there is a terminal that shows pictures."""
        return self.protocol is not None

    def show(self, png: bytes) -> None:
        """Draws it, over the one that was drawn before. The cursor stands in the line below."""
        if self.protocol is None:
            return
        # The lines are made first: where the screen scrolls for want of them, it does so now, and
        # the place that is kept (ESC 7) stays the right one.
        room = "" if self.is_shown else "\n" * ROWS
        self._write(f"{room}\x1b[{ROWS}A\x1b7{_still(png, self.protocol)}\x1b8\x1b[{ROWS}B\r")
        self.is_shown = True

    def erase(self) -> None:
        """Takes it off the screen; what comes next is written where it stood."""
        if not self.is_shown:
            return
        # a=d, d=I: kitty lets go of a picture by its number; iTerm2 of one whose cells are cleared.
        gone = f"\x1b_Ga=d,d=I,i={NUMBER},q=2\x1b\\" if self.protocol == "kitty" else ""
        self._write(f"{gone}\x1b[{ROWS}A\r\x1b[J")
        self.is_shown = False

    def _write(self, text: str) -> None:
        self.console.file.write(text)
        self.console.file.flush()


def _still(png: bytes, protocol: Protocol) -> str:
    """What to write for a PNG of `ROWS` lines that leaves the cursor's line alone."""
    if protocol == "kitty":  # C=1: the cursor stays; the same number again replaces what it names
        return _kitty(png, f"a=T,f=100,q=2,i={NUMBER},p=1,r={ROWS},C=1,")
    data = base64.b64encode(png).decode()
    how = f"size={len(png)};inline=1;height={ROWS};preserveAspectRatio=1;doNotMoveCursor=1"
    return f"\x1b]1337;File={how}:{data}\a"


def _kitty(png: bytes, keys: str) -> str:
    """A PNG in pieces, of which the first has `keys`."""
    data = base64.b64encode(png).decode()
    pieces = [data[start : start + PIECE] for start in range(0, len(data), PIECE)]
    last = len(pieces) - 1
    return "".join(
        f"\x1b_G{keys if k == 0 else ''}m={int(k < last)};{piece}\x1b\\"  # m=1: more follows
        for k, piece in enumerate(pieces)
    )


def open_in_viewer(path: Path) -> str:
    """Has the machine's own viewer show a file. Why it can't, in a sentence, or ""."""
    command = "open" if is_mac() else "xdg-open"
    program = shutil.which(command)
    if program is None:
        return f"{path} can't be opened: this machine has no {command}."
    try:
        subprocess.Popen(
            [program, str(path.absolute())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C here closes no viewer
        )
    except OSError as error:
        return f"{path} can't be opened: {error.strerror or error}."
    return ""
