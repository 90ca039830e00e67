"""Starts real ranks on loopback, waits for them, and never leaves one behind.

What ranks have computed is the same for all tests of a session, also where pytest-xdist spreads
these over several processes: `once` has it made by the first that needs it.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.paths import ROOT, python_path
from tests.ports import free_ports


def once(folders: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder of the session that `make` has filled, in this process or in another one.

    Others wait meanwhile; where it fails, the next one tries again in a new folder.
    """
    base = folders.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    link = shared / name
    with open(shared / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not link.exists():
            folder = folders.mktemp(name)
            make(folder)
            link.symlink_to(folder)
    return link


def run_ranks(
    size: int, arguments: list[str], folder: Path, timeout: float, program: str = "worker"
) -> list[Path]:
    """Runs `program`, of this folder, on `size` ranks; returns each one's OUT.

    Raises `AssertionError` with what they printed where one fails; all are killed where one hangs
    for `timeout` seconds.
    """
    hostfile = folder / "ring.json"
    hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(size)]))
    outs = [folder / f"rank{rank}" for rank in range(size)]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank, out in enumerate(outs):
            environment = {
                **os.environ,
                "MLX_RANK": str(rank),
                "MLX_HOSTFILE": str(hostfile),
                "PYTHONPATH": python_path(),
                "OMP_NUM_THREADS": "1",
            }
            command = [sys.executable, "-m", f"tests.parallel.{program}", *arguments, str(out)]
            with open(out.with_suffix(".log"), "wb") as log:
                processes.append(
                    subprocess.Popen(
                        command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
                    )
                )
        end = time.monotonic() + timeout
        while any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes) or time.monotonic() > end:
                break  # one failed, or all hang: the others would wait for ever
            time.sleep(0.05)
        codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    logs = [out.with_suffix(".log").read_text() for out in outs]
    said = "\n".join(f"rank {rank}: {log[-3000:]}" for rank, log in enumerate(logs))
    assert codes == [0] * size, f"exit codes {codes} (None: hung)\n{said}"
    return outs


def written(folder: Path, rank: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What a rank has left in a folder: its arrays, and what it did, both by case."""
    out = folder / f"rank{rank}"
    with np.load(out.with_suffix(".npz")) as arrays:
        return dict(arrays), json.loads(out.with_suffix(".json").read_text())
