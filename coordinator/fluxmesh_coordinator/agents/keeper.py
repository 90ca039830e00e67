"""Keeps an ssh connection open after the command that began it has ended: `up --keep-ssh`.

    python -m fluxmesh_coordinator.agents.keeper ssh ... HOST COMMAND

Stands between `remote.py` and ssh, and looks like ssh to who asks: the request goes in, the answer
and the exit code come out. Once the answer is a result it leaves a `cat` behind and ends: that
holds ssh's stdin open, by which the starter on the host knows that somebody still holds the
connection, and reads ssh's output until ssh ends. That happens when the agent has ended, or when
the connection breaks; the agent outlives the latter, and so it does the end of `cat`.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from typing import IO


def main() -> None:
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            sys.argv[1:],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,  # a file: ssh may write there when nobody reads any more
            start_new_session=True,
        )
        assert process.stdin and process.stdout
        with contextlib.suppress(BrokenPipeError):  # it has ended; its exit code tells why
            process.stdin.write(sys.stdin.buffer.readline())
            process.stdin.flush()
        for line in process.stdout:
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
            if is_result(line):
                hold(process.stdin, process.stdout)
                return
        code = process.wait()
        errors.seek(0)
        shutil.copyfileobj(errors, sys.stderr.buffer)
        sys.exit(code)


def is_result(line: bytes) -> bool:
    """Whether the starter has done what it was asked."""
    try:
        message = json.loads(line)
    except ValueError:
        return False
    return isinstance(message, dict) and "result" in message


def hold(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Leaves a process behind that keeps ssh's stdin open until its stdout ends.

    It shares nothing with whoever asked: neither streams, nor a terminal's Ctrl-C, nor a folder.
    """
    subprocess.Popen(
        ["cat"],
        stdin=answers,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[requests.fileno()],
        start_new_session=True,
        cwd="/",
    )


if __name__ == "__main__":
    main()
