"""The watchdog of `tools/chaos.py`: what it takes for a hang, and what it does then."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import pytest

from tools import chaos
from tools.chaos import ENDLESS, HUNG, JobWatchdog, Patience


class SleepingMesh:
    """A mesh of one process, which would sleep for an hour."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])

    def processes(self) -> list[int]:
        return [self.process.pid]


def test_a_job_that_tells_something_is_alive_however_long_it_takes() -> None:
    patience = Patience(0.0, 0.0)
    for now in range(0, int(ENDLESS), 60):
        assert not patience.is_over(now + 50.0)
        patience.hear(now + 60.0, waits=False)
    assert patience.is_over(ENDLESS + 1)


def test_a_job_that_waits_in_line_does_not_hang_and_one_that_is_silent_does() -> None:
    patience = Patience(0.0, 0.0)
    patience.hear(10.0, waits=True)
    assert not patience.is_over(10.0 + 3 * HUNG)
    patience.hear(10.0 + 3 * HUNG, waits=False)
    assert not patience.is_over(10.0 + 4 * HUNG) and patience.is_over(11.0 + 4 * HUNG)


def test_a_hung_job_s_processes_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chaos, "HUNG", 60.0)
    mesh: Any = SleepingMesh()
    with JobWatchdog(mesh) as dog:
        dog._patience.heard = time.monotonic() - 61.0
        assert mesh.process.wait(60.0) == -9
    assert dog.has_barked


def test_nobody_barks_at_a_job_that_ends() -> None:
    mesh: Any = SleepingMesh()
    try:
        with JobWatchdog(mesh) as dog:
            dog.hear()
        assert not dog.has_barked and mesh.process.poll() is None
    finally:
        mesh.process.kill()
        mesh.process.wait()
