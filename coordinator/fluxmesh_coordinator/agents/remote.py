"""Asks hosts: over ssh, or directly on this machine. No other module calls ssh.

A host is asked one thing at a time, by a JSON line on the stdin of a `starter` that runs there;
several hosts are asked side by side (`each`). `launch.py` starts agents by this.

The command of OpenSSH and no library: only it reads ~/.ssh/config, with its jumps, agents, hardware
keys and certificates, knows the hosts that its user knows, and is on every Mac.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import IO, Any, TypeVar

from fluxmesh.cluster.hostfile import Host
from fluxmesh.deadlines import DEADLINES, Deadlines
from fluxmesh.errors import FluxmeshError, HostUnreachableError
from fluxmesh.storage import interrupts
from fluxmesh.version import __version__
from fluxmesh_coordinator.agents import find_python, tcc

SSH_FAILED = 255  # ssh's own exit code for what went wrong before the command ran
NOT_FOUND = (126, 127)  # a shell's
MANY = 32  # hosts that are asked at once
MODULE = "fluxmesh_coordinator.agents.bootstrap"
KEEPER = "fluxmesh_coordinator.agents.keeper"

# A connection that is kept may be silent while a Mac sleeps: it is held for ten minutes, and is
# no other command's to share or to end.
KEPT = ("ServerAliveInterval=30", "ServerAliveCountMax=20", "ControlMaster=no", "ControlPath=none")

_asking: set[subprocess.Popen[bytes]] = set()  # that have not answered yet

T = TypeVar("T")
Tell = Callable[[dict[str, Any]], None]


def ask(
    host: Host,
    action: str,
    tell: Tell | None = None,
    *,
    keep_ssh: bool = False,
    deadlines: Deadlines = DEADLINES,
    **fields: Any,
) -> dict[str, Any]:
    """What the starter on `host` answers; `tell` hears of its progress.

    With `keep_ssh` the connection stays open for as long as the agent that was started lives, also
    after this process. Raises `HostUnreachableError` where ssh does not reach it, `FluxmeshError`
    where it can't do what is asked; both name the host.
    """
    request = {"action": action, "version": __version__, "keep_ssh": keep_ssh, **fields}
    seconds: float = getattr(deadlines, f"ask_{action}")
    process: subprocess.Popen[bytes] | None = None
    try:
        with interrupts.uninterrupted(), interrupts.not_for_children():
            process = subprocess.Popen(
                _command(host, keep_ssh),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                # Ctrl-C and a closing window are ours to hear: it may be in the middle of a start.
                start_new_session=True,
            )
            _asking.add(process)
        return _conversation(host, process, request, tell, seconds)
    finally:
        if process is not None:
            with interrupts.uninterrupted():
                _end(process)
                _asking.discard(process)


def _conversation(
    host: Host,
    process: subprocess.Popen[bytes],
    request: dict[str, Any],
    tell: Tell | None,
    seconds: float,
) -> dict[str, Any]:
    """The answer of a starter that runs. Raises as `ask`."""
    assert process.stdin and process.stdout and process.stderr
    late = threading.Timer(seconds, process.kill)
    late.daemon = True
    late.start()
    heard: list[bytes] = []
    listener = threading.Thread(target=_hear, args=(process.stderr, heard), daemon=True)
    listener.start()
    answer: dict[str, Any] = {}
    try:
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.close()
        except BrokenPipeError:
            pass  # it ended before it read anything: its exit code tells why
        for line in process.stdout:
            message = _parsed(line)
            if "result" in message or "error" in message:
                answer = message
            elif message and tell is not None:
                tell(message)
        process.wait()
        listener.join(1.0)
    finally:
        late.cancel()
        _end(process)
        if not listener.is_alive():  # else a connection that ssh shares still holds the pipe
            process.stderr.close()
    if "result" in answer:
        result: dict[str, Any] = answer["result"]
        return result
    if "error" in answer:
        raise FluxmeshError(f"{title(host)}: {answer['error']}")
    errors = b"".join(heard).decode("utf-8", errors="replace").splitlines()
    raise _failure(host, process.returncode, [line.strip() for line in errors if line.strip()])


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a starter that has not answered: one that starts an agent ends that first.

    Over ssh it is the connection that ends; the starter notices when it answers.
    """
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(DEADLINES.starter_ends)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what it did not read is lost
                pipe.close()


def _hear(errors: IO[bytes], heard: list[bytes]) -> None:
    """What is said on stderr, piece by piece.

    Past Python's own buffer: a thread that waits in there when the interpreter ends aborts it.
    """
    while piece := os.read(errors.fileno(), 4096):
        heard.append(piece)


def each(
    hosts: Iterable[Host], do: Callable[[Host], T]
) -> tuple[dict[int, T], dict[int, FluxmeshError]]:
    """`do` for all hosts side by side: (results, errors), each by rank."""
    results: dict[int, T] = {}
    errors: dict[int, FluxmeshError] = {}
    tasks: dict[int, Future[T]] = {}
    with ThreadPoolExecutor(MANY, thread_name_prefix="host") as pool:
        try:
            for host in hosts:
                tasks[host.rank] = pool.submit(do, host)
            for rank, task in tasks.items():
                try:
                    results[rank] = task.result()
                except FluxmeshError as error:
                    errors[rank] = error
        except BaseException:
            _break_off(tasks.values())
            raise
    return results, errors


def _break_off(tasks: Iterable[Future[Any]]) -> None:
    """Ends what asks, and waits: of threads, none can be ended but by what they wait for."""
    with interrupts.uninterrupted():
        left = {task for task in tasks if not task.cancel()}
        begun = time.monotonic()
        while left:
            left = wait(left, 0.05).not_done
            for process in tuple(_asking):
                if time.monotonic() - begun < DEADLINES.starter_ends:
                    process.terminate()
                else:
                    process.kill()


def title(host: Host) -> str:
    """How sentences name a host."""
    return f"host {host.rank} ({host.name})"


def ssh_name(host: Host) -> str | None:
    """What ~/.ssh/config means by a host's name."""
    done = subprocess.run(
        [*_ssh(), "-G", "--", host.ssh],
        capture_output=True,
        check=False,
        encoding="utf-8",
        errors="replace",
    )
    for line in done.stdout.splitlines():
        key, _, value = line.partition(" ")
        if key == "hostname" and value:
            return value
    return None


def _command(host: Host, keep_ssh: bool) -> list[str]:
    if host.is_local:
        return [host.python or sys.executable, "-m", MODULE]
    if host.python:
        there = f"exec {shlex.quote(host.python)} -m {MODULE}"
    else:
        there = f"exec sh -c {shlex.quote(find_python.script(sys.executable, MODULE))}"
    if keep_ssh:
        keeper = [sys.executable, "-m", KEEPER]
        return [*keeper, *_ssh(KEPT), "-T", "--", host.ssh, there]
    return [*_ssh(), "-T", "--", host.ssh, there]


def _ssh(more: Sequence[str] = ("ServerAliveInterval=5",)) -> list[str]:
    """ssh, or what FLUXMESH_SSH says, that asks no questions and notices a host that is gone."""
    command = os.environ.get("FLUXMESH_SSH")
    options = (
        "BatchMode=yes",
        "ConnectTimeout=10",
        "ClearAllForwardings=yes",
        *more,
    )
    return [*(shlex.split(command) if command else ["ssh"]), *(f"-o{option}" for option in options)]


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except ValueError:  # a login script that prints
        return {}
    return message if isinstance(message, dict) else {}


def _failure(host: Host, code: int, errors: Sequence[str]) -> FluxmeshError:
    """Why a starter gave no answer."""
    last = errors[-1].rstrip(".") if errors else f"exit code {code}"
    if not host.is_local and code == SSH_FAILED:
        remedy = (
            f"make `ssh {host.ssh}` work without a password (ssh-copy-id {host.ssh}), and try again"
        )
        if "refused" in last and platform.system() == "Darwin":
            remedy = "switch on Remote Login there (System Settings > General > Sharing)"
            if host.name.partition(".")[0] == platform.node().partition(".")[0]:
                remedy += ', or name this Mac "127.0.0.1" in the hostfile, which needs no ssh'
        return HostUnreachableError(f"{title(host)}: ssh says {last!r}; {remedy}.")
    if code < 0:
        return HostUnreachableError(f"{title(host)}: it does not answer; see whether it hangs.")
    for line in errors:
        if code in NOT_FOUND and "Operation not permitted" in line:
            where = host.python or line.partition(":")[0]
            return FluxmeshError(f"{title(host)}: {tcc.denied(where)}")
    if code in NOT_FOUND and host.python:
        return FluxmeshError(
            f"{title(host)}, python: there is no {host.python}; mend the hostfile."
        )
    if code in NOT_FOUND or any("No module named" in line for line in errors):
        return FluxmeshError(
            f"{title(host)}: no Python there has fluxmesh {__version__}; install it, or name the "
            'interpreter that has it as "python" in the hostfile.'
        )
    return FluxmeshError(f"{title(host)}: fluxmesh fails there: {last}.")
