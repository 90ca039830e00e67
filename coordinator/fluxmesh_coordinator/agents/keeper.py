"""Keeps an ssh connection open after the command that began it has ended: `up --keep-ssh`.

    python -m fluxmesh_coordinator.agents.keeper ssh ... HOST COMMAND

Stands between `remote.py` and ssh, and looks like ssh to who asks: the request goes in, the answer
and the exit code come out. Once the answer is a result it goes on in the background: it holds
ssh's stdin open, by which the starter on the host knows that somebody still holds the connection,
until ssh ends. That happens when the agent has ended, or when the connection breaks; the agent
outlives the latter, and so it does the end of this process.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile


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
                if os.fork():
                    os._exit(0)
                _detach()
                while process.stdout.read(1):
                    continue
                os._exit(0)
        code = process.wait()
        errors.seek(0)
        shutil.copyfileobj(errors, sys.stderr.buffer)
        sys.exit(code)


def is_result(line: bytes) -> bool:
    """Whether the starter has done what it was asked."""
    try:
        told = json.loads(line)
    except ValueError:
        return False
    return isinstance(told, dict) and "result" in told


def _detach() -> None:
    """Lets go of whoever asked."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.chdir("/")


if __name__ == "__main__":
    main()
