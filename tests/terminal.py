"""A command on a terminal of its own, as a person has it: keys go in, what is shown comes out."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import psutil

STILL = 8  # looks in which a process that waits was never seen to work
CTRL_C, CTRL_D, TAB, UP = "\x03", "\x04", "\t", "\x1b[A"


class TerminalProcess:
    """A context manager, which ends the command."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str],
        term: str = "xterm-256color",
        columns: int = 80,
        rows: int = 24,
    ) -> None:
        self._keyboard, screen = pty.openpty()
        fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.shown = ""

        def take() -> None:  # Ctrl-C reaches those whose terminal it is
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            list(command),
            cwd=cwd,
            env={**env, "TERM": term},
            stdin=screen,
            stdout=screen,
            stderr=screen,
            start_new_session=True,
            preexec_fn=take,
        )
        os.close(screen)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._keyboard)

    def type(self, keys: str) -> None:
        os.write(self._keyboard, keys.encode())

    def until(self, text: str, seconds: float = 60.0) -> str:
        """What is shown up to `text`, from where the last look ended."""
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            left = deadline - time.monotonic()
            assert left > 0, f"{text!r} is not shown: {self.shown!r}"
            if not self._look(left):
                raise AssertionError(f"it ended without {text!r}: {self.shown!r}")
        before, _, self.shown = self.shown.partition(text)
        return before + text

    def until_it_waits(self, seconds: float = 60.0) -> None:
        """Until it has stood still for a while: then it waits for keys."""
        process, still = psutil.Process(self.process.pid), 0
        deadline = time.monotonic() + seconds
        while still < STILL and time.monotonic() < deadline:
            still = still + 1 if process.status() == psutil.STATUS_SLEEPING else 0
            time.sleep(0.05)

    def wait(self, seconds: float = 60.0) -> int:
        """Its exit code, once it has ended; what it showed last is in `shown`."""
        deadline = time.monotonic() + seconds
        while self._look(0.1) and time.monotonic() < deadline:
            continue
        return self.process.wait(max(0.1, deadline - time.monotonic()))

    def _look(self, seconds: float) -> bool:
        """Reads what is shown within so long; False at the end."""
        ready, _, _ = select.select([self._keyboard], [], [], seconds)
        if not ready:
            return True
        try:
            data = os.read(self._keyboard, 1 << 16)
        except OSError:  # Linux's word for the end of a terminal
            return False
        self.shown += data.decode(errors="replace")
        return bool(data)
