"""A command in a terminal of its own, struck at a moment: Ctrl-C, SIGTERM, or the terminal closes.

Everything of one user (home, state, temporary files, the Hub's cache) lies in one folder, and every
process of that user has it in its environment: so what is left can be found.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.integration.conftest import environment
from tests.slowness import slowdown

LIMIT = 180.0  # seconds that a command may take at all
ENDS = 6.0  # seconds in which what was struck has ended, and all that it had begun

NOISE = re.compile(
    r"Traceback|Exception ignored|asyncio|Task was destroyed|never retrieved|never awaited"
    r"|RuntimeWarning|ResourceWarning|Fatal Python|resource_tracker|KeyboardInterrupt|Error in sys"
)
# A traceback in our code, but for the program's first lines, before which it can't hear.
OURS = re.compile(
    r"Cancelled|Error:|/fluxmesh(_agent|_coordinator)?/(?!\.venv)(?!__main__\.py\", line [1-6],)"
)
HIDDEN, SHOWN = "\x1b[?25l", "\x1b[?25h"  # the cursor
# What is done to a command, one after another with so many seconds between them.
BLOWS: dict[str, tuple[str, ...]] = {
    "Ctrl-C": ("\x03",),
    "Ctrl-C twice": ("\x03", "\x03"),
    "Ctrl-C thrice": ("\x03", "\x03", "\x03"),
    "SIGTERM": ("term",),
    "SIGHUP": ("hup",),
}
BETWEEN = 0.04


@dataclass
class InterruptedCommand:
    """A command that has ended, or had to be killed."""

    code: int
    output: str
    seconds: float  # from the blow to its end
    problems: list[str] = field(default_factory=list)


@dataclass
class TerminalUser:
    """Somebody with a terminal and folders of their own."""

    folder: Path
    more: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("tmp", "work", "state", "home"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    @property
    def work(self) -> Path:
        """Where commands run and write."""
        return self.folder / "work"

    @property
    def env(self) -> dict[str, str]:
        own = {
            "FLUXMESH_STATE": str(self.folder / "state"),
            "TMPDIR": str(self.folder / "tmp"),
            "TERM": "xterm",
            "COLUMNS": "120",
        }
        return environment(self.folder / "home") | own | dict(self.more)

    def command(self, *arguments: object) -> list[str]:
        return [sys.executable, "-m", "fluxmesh_coordinator", *map(str, arguments)]

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """A command that nobody strikes."""
        return subprocess.run(
            self.command(*arguments),
            env=self.env,
            cwd=self.work,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )

    def processes(self) -> dict[int, str]:
        """What runs of this user, by process: its command line."""
        running: dict[int, str] = {}
        for process in psutil.process_iter():
            try:
                is_ours = process.environ().get("FLUXMESH_STATE") == self.env["FLUXMESH_STATE"]
                if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                    running[process.pid] = " ".join(process.cmdline()[:6])
            except psutil.Error:  # another user's, or gone by now
                continue
        return running

    def strike(
        self,
        arguments: Sequence[object],
        blow: str,
        *,
        seconds: float,
        after: str = "",
        again: bool = False,
    ) -> InterruptedCommand:
        """Runs a command, and strikes it so many seconds after its start, or after it says `after`.

        A command that ends before that is not struck; one that stays is struck once more, `again`.
        """
        terminal = PseudoTerminal(self.command(*arguments), self.env, self.work)
        try:
            if after:
                terminal.read_until(after)
            terminal.read(seconds)
            begun = time.monotonic()
            for each in BLOWS[blow]:
                terminal.strike(each)
                terminal.read(BETWEEN)
            if again:
                terminal.read(1.0)
                if terminal.process.poll() is None:
                    terminal.strike("\x03")
            code = terminal.end(LIMIT / 2)
            return self._judged(
                InterruptedCommand(code, terminal.output, time.monotonic() - begun), blow
            )
        finally:
            terminal.close()

    def _judged(self, struck: InterruptedCommand, blow: str) -> InterruptedCommand:
        # Before Python listens at all, the system's own answer ends it: 130 to a shell, too.
        # So does Python's own start, some 20 ms, but with a traceback that names nothing of ours.
        early = {1, -signal.SIGINT, -signal.SIGTERM, -signal.SIGHUP}
        if struck.code in early and not OURS.search(struck.output):
            struck.code = -signal.SIGINT
            return struck
        if struck.code not in (0, 130):
            struck.problems.append(f"exit code {struck.code}: {struck.output[-400:]}")
        for line in struck.output.splitlines():
            if NOISE.search(line):
                struck.problems.append(f"it says {line.strip()!r}")
        hides, shows = struck.output.rfind(HIDDEN), struck.output.rfind(SHOWN)
        if blow != "SIGHUP" and hides > shows:
            struck.problems.append("the cursor stays hidden")
        return struck

    def left_running(self, meant: Sequence[int] = ()) -> list[str]:
        """What runs on although it should have ended with the command."""
        deadline = time.monotonic() + ENDS * slowdown()
        while left := {pid: line for pid, line in self.processes().items() if pid not in meant}:
            if time.monotonic() > deadline:
                return [f"left running: {line}" for line in left.values()]
            time.sleep(0.05)
        return []

    def left_files(self) -> list[str]:
        """Files that only a command that is under way may have."""
        # MLX keeps what it has compiled for a CPU in a folder of its own there.
        left = [path for path in (self.folder / "tmp").iterdir() if path.name != "mlx"]
        left += [path for path in self.work.rglob("*") if path.name.endswith(".tmp")]
        left += list((self.folder / "home").rglob("starting.json"))
        return [f"left behind: {path.relative_to(self.folder)}" for path in left]


class PseudoTerminal:
    """A process whose terminal is ours."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], folder: Path) -> None:
        self._master, slave = pty.openpty()
        self.output = ""

        def take_terminal() -> None:
            for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            command,
            env=dict(env),
            cwd=folder,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=take_terminal,
        )
        os.close(slave)

    def read(self, seconds: float) -> None:
        """Takes what is said for so long, or until the process has ended."""
        self._read_while(seconds, lambda: True)

    def read_until(self, text: str) -> None:
        """Until it has said that, or has ended."""
        self._read_while(LIMIT, lambda: text not in self.output)

    def strike(self, blow: str) -> None:
        if blow == "term":
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGTERM)
        elif blow == "hup":
            self._close()
        elif self._master >= 0:
            os.write(self._master, blow.encode())

    def end(self, seconds: float) -> int:
        """The exit code; a process that does not end is killed, and that is an exit code too."""
        self._read_while(seconds, lambda: True)
        try:
            return self.process.wait(max(0.5, seconds if self._master < 0 else 0.5))
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._close()

    def _read_while(self, seconds: float, goes_on: Any) -> None:
        deadline = time.monotonic() + seconds
        while goes_on() and (left := deadline - time.monotonic()) > 0:
            if self._master < 0:
                return
            if select.select([self._master], [], [], min(left, 0.05))[0]:
                try:
                    piece = os.read(self._master, 65536)
                except OSError:  # nobody has the other end any more
                    return
                if not piece:
                    return
                self.output += piece.decode(errors="replace")
            elif self.process.poll() is not None:
                return

    def _close(self) -> None:
        if self._master >= 0:
            os.close(self._master)
            self._master = -1
