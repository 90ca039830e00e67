"""A Mac that sleeps in the middle of a job: everything on it stands still, and goes on.

Coordinator, agent and engine are stopped for longer than any of them bears of the others' silence,
and the agent is slow to wake. After that the job ends with the right pictures, from the weights
that were in memory.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.faults import commands, strike
from tests.faults.mesh import up
from tests.faults.strike import STEPS, request_of

ASLEEP = 6.5  # seconds
SLOW = 9.0  # seconds more that the agent and its engine need: the coordinator tries again meanwhile


@pytest.mark.sample(1)
def test_a_job_goes_on_after_its_mac_slept_with_the_weights_that_are_there(
    model: str, tmp_path: Path
) -> None:
    request = request_of(model, n_images=1)
    right = strike.alone(request)
    with up(tmp_path / "mesh", 1, model, delays="step=0.6") as mesh:
        engine = mesh.pid("engine", 0)
        with commands.generate(mesh, tmp_path / "out", "data", request) as command:
            command.until("middle")
            asleep = [command.process.pid, mesh.pid("agent", 0), engine]
            for pid in asleep:
                os.kill(pid, signal.SIGSTOP)
            time.sleep(ASLEEP)
            for pid in asleep:
                os.kill(pid, signal.SIGCONT)
                time.sleep(SLOW if pid == command.process.pid else 0.0)
            lines = list(command.lines())
        assert lines[-1]["event"] == "done", lines
        steps = [line["step"] for line in lines if line["event"] == "step"]
        assert steps == list(range(STEPS // 2 + 1, STEPS + 1)), "no acknowledged step runs twice"
        assert mesh.pid("engine", 0) == engine
        (path,) = command.pictures()
        with Image.open(path) as picture:
            assert np.array_equal(np.array(picture), right[0])
