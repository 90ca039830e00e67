"""Where the record of a job that failed is kept: `~/.config/fluxmesh/failed-jobs/ID.msgpack`.

Above `jobs/replay.py`, which makes its bytes; `tools/replay.py` reads it. Only its owner may look
into it, and the oldest go.
"""

from __future__ import annotations

import logging
from pathlib import Path

from fluxmesh.errors import CancelledError
from fluxmesh.storage.homes import Home, private_folder, write_private
from fluxmesh_coordinator.jobs.input_log import InputLog
from fluxmesh_coordinator.jobs.session import JobSession

log = logging.getLogger(__name__)

KEPT = 10  # records


class FailedJobs:
    """A folder of records."""

    def __init__(self, folder: Path | None = None) -> None:
        """None is the user's own, which is made when there is something to keep."""
        self._folder = folder

    def keep(self, session: JobSession, inputs: InputLog, error: Exception) -> None:
        """Writes down what led to `error`, and notes on it where: `fluxmesh -v` tells.

        Not of a job that was cancelled, nor of one that had not begun. What can't be written is a
        line in the log: the error is what its user must read.
        """
        if isinstance(error, CancelledError) or not inputs.noted:
            return
        from fluxmesh_coordinator.jobs.replay import to_bytes  # loads what describes all jobs

        try:
            folder = private_folder(self._folder or Home.default().folder / "failed-jobs")
            path = folder / f"{session.id}.msgpack"
            write_private(path, to_bytes(session, inputs, f"{type(error).__name__}: {error}"))
            _tidy(folder)
        except Exception as problem:
            log.warning("the record of job %s is not kept: %s", session.id, problem)
        else:
            error.add_note(f"What its hosts said is in {path}")


def _tidy(folder: Path) -> None:
    records = sorted(folder.glob("*.msgpack"), key=lambda path: path.stat().st_mtime_ns)
    for path in records[:-KEPT]:
        path.unlink(missing_ok=True)
