"""What the benchmarks share: cases in processes of their own, timing, tables.

A case is one thing measured (a library, at one precision): a dictionary that goes to a process of
its own as JSON, so that the memory of one is gone before the next begins and a peer that fails
takes nothing with it. The process prints results as they come, with `emit`; the parent reads them
with `results_of`.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MARK = "@result "  # begins a line of a case's output that is a result
Result = dict[str, Any]


class Skipped(Exception):
    """Why a case can't be measured here, as one line."""


def emit(**result: Any) -> None:
    """Prints a result of this case to the parent, at once."""
    print(MARK + json.dumps(result), flush=True)


def run_case(case: Mapping[str, Any], measure: Callable[[Any], None]) -> None:
    """The case's own process: measures, or says in one line why it can't."""
    try:
        measure(case)
    except Skipped as reason:
        emit(skipped=str(reason))
    except ImportError as error:
        emit(skipped=f"{error.name or error} is not installed ({error})")


def results_of(
    module: str, case: Mapping[str, Any], env: Mapping[str, str] = {}
) -> Iterator[Result]:
    """Runs `python -m MODULE --case CASE`; yields what it emits, the case's fields included.

    A process that dies yields a last result with `failed`: the last line of what it said.
    """
    command = [sys.executable, "-m", module, "--case", json.dumps(case)]
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **env},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(MARK):
                    yield {**case, **json.loads(line.removeprefix(MARK))}
        if process.returncode:
            errors.seek(0)
            said = errors.read()
            sys.stderr.write(said)
            last = said.strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
            yield {**case, "failed": last[0]}


class Stopwatch:
    """Seconds between calls of `tick`; the first is counted from the start."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._last = time.perf_counter()

    def tick(self) -> None:
        now = time.perf_counter()
        self.times.append(now - self._last)
        self._last = now


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def say(text: str) -> None:
    print(text, flush=True)


def write_json(path: Path | None, results: Sequence[Result]) -> None:
    """Everything that was measured, with the machine, where `--json` names a file."""
    if path is not None:
        path.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")


def machine() -> dict[str, str]:
    """What the figures were measured on. Imports no mlx: GPUs are asked for by nvidia-smi."""
    about = {"system": f"{platform.system()} {platform.machine()}", "cores": str(os.cpu_count())}
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        about["gpu"] = "; ".join(found.strip().splitlines())
    except (OSError, subprocess.CalledProcessError):
        about["processor"] = platform.processor() or platform.machine()
    return about
