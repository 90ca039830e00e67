"""What the benchmarks share: cases in processes of their own, timing, tables.

A case is one thing measured (a library, at one precision): a dictionary that goes to a process of
its own as JSON, so that the memory of one is gone before the next begins and a peer that fails
takes nothing with it. The process prints results as they come, with `emit`; the parent reads them
with `results_of`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from fluxmesh.errors import FluxmeshError

ROOT = Path(__file__).parents[1]
MARK = "@result "  # begins a line of a case's output that is a result
WINDOW = 3  # steps that are taken together
Result = dict[str, Any]


class Skipped(Exception):
    """Why a case can't be measured here, as one line."""


def emit(**result: Any) -> None:
    """Prints a result of this case to the parent, at once."""
    print(MARK + json.dumps(result), flush=True)


def options_of(
    parser: argparse.ArgumentParser, measure: Callable[[Any], None], small: str = "tiny models"
) -> argparse.Namespace:
    """The command line, with what all benchmarks take. A case's own process measures, and ends."""
    parser.add_argument("--small", action="store_true", help=f"{small}, to try this program")
    parser.add_argument("--json", type=Path, help="write everything measured into this file")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        run_case(options.case, measure)
        sys.exit()
    return options


def run_case(case: Mapping[str, Any], measure: Callable[[Any], None]) -> None:
    """The case's own process: measures, or says in one line why it can't."""
    try:
        measure(case)
    except (Skipped, FluxmeshError) as reason:
        emit(skipped=str(reason))
    except ImportError as error:
        emit(skipped=f"{error.name or error} is not installed ({error})")


def results_of(
    module: str,
    case: Mapping[str, Any],
    envs: Sequence[Mapping[str, str]] = ({},),
    timeout: float = 1800,
    within: Sequence[Sequence[str]] = (),
) -> Generator[Result, None, None]:
    """Runs `python -m MODULE --case CASE` once for each of `envs`; yields what the first emits.

    Several are the ranks of a group. `within` are words that each one's command begins with. What
    the case says of itself is in each result too. Where a process dies, or all together take longer
    than `timeout` seconds, every one is killed and a last result says `failed`: the last line of
    what it said.
    """
    command = [sys.executable, "-m", module, "--case", json.dumps(case)]
    with contextlib.ExitStack() as stack:
        errors = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in envs]
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [*(within[rank] if within else ()), *command],
                    cwd=ROOT,
                    env={**os.environ, **env},
                    stdout=subprocess.DEVNULL if rank else subprocess.PIPE,
                    stderr=errors[rank],
                    text=True,
                )
            )
            for rank, env in enumerate(envs)
        ]
        for process in processes:
            stack.callback(process.kill)
        lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        reader = threading.Thread(target=_read, args=(processes[0], lines))
        reader.start()
        end = time.monotonic() + timeout
        while True:
            is_over = not reader.is_alive()  # asked before the queue is emptied, not after
            while not lines.empty():
                yield {**case, **json.loads(lines.get())}
            codes = [process.poll() for process in processes]
            bad = next((rank for rank, code in enumerate(codes) if code), None)
            if bad is not None or time.monotonic() > end:
                yield {**case, "failed": _last_words(errors, codes, bad)}
                return
            if is_over and None not in codes:
                return
            time.sleep(0.02)


def _read(process: subprocess.Popen[str], lines: queue.SimpleQueue[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(MARK):
            lines.put(line.removeprefix(MARK))


def _last_words(errors: Sequence[IO[str]], codes: Sequence[int | None], bad: int | None) -> str:
    """Why it failed, in a line; all that the processes said goes to stderr."""
    last = [f"exit codes {list(codes)} (None: still running)"]
    for rank, file in enumerate(errors):
        file.seek(0)
        said = file.read()
        sys.stderr.write(said)
        if rank == bad:
            last += said.strip().splitlines()[-1:]
    return last[-1]


class Stopwatch:
    """Seconds between calls of `tick`; the first is counted from the start."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._last = time.perf_counter()

    def tick(self) -> None:
        now = time.perf_counter()
        self.times.append(now - self._last)
        self._last = now


def typical(times: list[float]) -> float:
    """Seconds of a step: the median of the means of a few neighbours.

    Where a part of the next step has begun when one is reported, a step that is reported late makes
    the next look short. Leave out the last one, which always is.
    """
    windows = [times[i : i + WINDOW] for i in range(max(1, len(times) - WINDOW + 1))]
    return statistics.median(statistics.mean(window) for window in windows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def difference(result: Result, other: Result | None) -> str:
    """Of the latents after one step, relative (L2): the same weights must do the same."""
    if other is None or other is result or not result.get("sample"):
        return ""
    pairs = list(zip(result["sample"], other["sample"], strict=True))
    apart = sum((a - b) ** 2 for a, b in pairs) / sum(b**2 for _, b in pairs)
    return f"{apart**0.5:.1e}"


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
        names = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        about["gpu"] = "; ".join(names.strip().splitlines())
    except (OSError, subprocess.CalledProcessError):
        about["processor"] = platform.processor() or platform.machine()
    return about
