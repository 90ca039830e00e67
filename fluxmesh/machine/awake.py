"""A Mac that works for us does not fall asleep: nothing else tells macOS that it is busy.

macOS sleeps when its user and its display do, whatever its GPU computes. Who computes, or waits
for those that do, holds macOS's own `caffeinate` meanwhile: agents while they are leased,
coordinators while they have a job, and commands that read or write whole models. A lid that is
closed without a display and power at the Mac sends it to sleep all the same.
"""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from fluxmesh.machine.tools import is_mac

log = logging.getLogger(__name__)

CAFFEINATE = "/usr/bin/caffeinate"


class Wakefulness:
    """Whether this process keeps its machine awake; it does nothing on others than Macs."""

    _has_warned = False  # once a process, that it can't be done

    def __init__(self) -> None:
        self._is_held = False
        self._caffeinate: subprocess.Popen[bytes] | None = None

    def hold(self) -> None:
        """From now on; twice is harmless. A Mac that can't be kept awake fails nothing."""
        if self._is_held:
            return
        self._is_held = True
        if not is_mac():
            return
        try:
            self._caffeinate = subprocess.Popen(
                # It ends when we do, however that comes about.
                [CAFFEINATE, "-i", "-w", str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is not for it: what it waits for may take longer
            )
        except OSError as error:
            if not Wakefulness._has_warned:
                Wakefulness._has_warned = True
                log.warning(
                    "%s can't be started (%s): this Mac may fall asleep while it works",
                    CAFFEINATE,
                    error.strerror or error,
                )

    def let_go(self) -> None:
        """The machine may sleep again; twice is harmless."""
        self._is_held = False
        caffeinate, self._caffeinate = self._caffeinate, None
        if caffeinate is not None:
            caffeinate.kill()
            caffeinate.wait()


@contextmanager
def kept_awake() -> Iterator[None]:
    """While the block runs."""
    wakefulness = Wakefulness()
    wakefulness.hold()
    try:
        yield
    finally:
        wakefulness.let_go()
