"""Starts agents, and what else `starter.py` does on a host: over ssh, or directly on this machine.

The commands of a mesh stand on this; no other module calls ssh. A host is asked one thing at a
time, by a JSON line on the stdin of a `starter` that runs there; several hosts are asked side by
side (`each`). `start_ephemeral` is the mesh of one that `generate` brings up for one call.
"""

from __future__ import annotations

import getpass
import hashlib
import ipaddress
import json
import os
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, TypeVar

from fluxmesh import __version__
from fluxmesh.errors import FluxmeshError, HostUnreachableError
from fluxmesh.homes import read_private
from fluxmesh.hostfile import Host, Hostfile
from fluxmesh.keys import Keys
from fluxmesh.processes import kill_process
from fluxmesh_coordinator.record import THIS_MACHINE, THIS_NAME, Member, MeshRecord
from fluxmesh_coordinator.starter import agent_command, hand_over

SECONDS = {"look": 60.0, "start": 120.0, "stop": 60.0, "logs": 30.0, "pull": 86400.0}
SSH_FAILED = 255  # ssh's own exit code for what went wrong before the command ran
NOT_FOUND = (126, 127)  # a shell's
MANY = 32  # hosts that are asked at once
MODULE = "fluxmesh_coordinator.starter"

# Finds a Python that has fluxmesh: this machine's own path, then that of the user's login shell.
FIND = """\
found=$("${{SHELL:-/bin/sh}}" -lc 'command -v fluxmesh' </dev/null 2>/dev/null | tail -n 1)
for python in {own} "${{found%/*}}/python" python3; do
"$python" -c 'import {module}' </dev/null 2>/dev/null && exec "$python" -m {module}
done
exit 127"""

T = TypeVar("T")
Tell = Callable[[dict[str, Any]], None]


def user_name(public_key: str) -> str:
    """What agents call this user in their allowlist: people read it, and no two are the same."""
    who = f"{getpass.getuser()}@{platform.node().partition('.')[0]}"
    short = re.sub(r"[^A-Za-z0-9_.@-]", "-", who).lstrip(".-")[:48] or "user"
    return f"{short}-{hashlib.sha256(public_key.encode()).hexdigest()[:8]}"


# Asking a host


def ask(host: Host, action: str, tell: Tell | None = None, **fields: Any) -> dict[str, Any]:
    """What the starter on `host` answers; `tell` hears of its progress.

    Raises `HostUnreachableError` where ssh does not reach it, `FluxmeshError` where it can't do
    what is asked; both name the host.
    """
    command = _command(host)
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin and process.stdout and process.stderr
    late = threading.Timer(SECONDS[action], process.kill)
    late.daemon = True
    late.start()
    heard: list[bytes] = []
    listener = threading.Thread(target=lambda: heard.extend(process.stderr or ()), daemon=True)
    listener.start()
    answer: dict[str, Any] = {}
    try:
        request = {"action": action, "version": __version__, **fields}
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.close()
        except BrokenPipeError:
            pass  # it ended before it read anything: its exit code tells why
        for line in process.stdout:
            told = _parsed(line)
            if "result" in told or "error" in told:
                answer = told
            elif told and tell is not None:
                tell(told)
        process.wait()
        listener.join(1.0)
    finally:
        late.cancel()
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stdout.close()
        if not listener.is_alive():  # else a connection that ssh shares still holds the pipe
            process.stderr.close()
    if "result" in answer:
        result: dict[str, Any] = answer["result"]
        return result
    if "error" in answer:
        raise FluxmeshError(f"{title(host)}: {answer['error']}")
    errors = b"".join(heard).decode("utf-8", errors="replace").splitlines()
    raise _failure(host, process.returncode, [line.strip() for line in errors if line.strip()])


def each(
    hosts: Iterable[Host], do: Callable[[Host], T]
) -> tuple[dict[int, T], dict[int, FluxmeshError]]:
    """`do` for all hosts side by side: (results, errors), each by rank."""
    results: dict[int, T] = {}
    errors: dict[int, FluxmeshError] = {}
    with ThreadPoolExecutor(MANY, thread_name_prefix="host") as pool:
        tasks = {host.rank: pool.submit(do, host) for host in hosts}
        for rank, task in tasks.items():
            try:
                results[rank] = task.result()
            except FluxmeshError as error:
                errors[rank] = error
    return results, errors


def title(host: Host) -> str:
    """How sentences name a host."""
    return f"host {host.rank} ({host.name})"


def _command(host: Host) -> list[str]:
    if host.is_local:
        return [host.python or sys.executable, "-m", MODULE]
    if host.python:
        there = f"exec {shlex.quote(host.python)} -m {MODULE}"
    else:
        there = (
            f"exec sh -c {shlex.quote(FIND.format(own=shlex.quote(sys.executable), module=MODULE))}"
        )
    return [*_ssh(), "-T", "--", host.ssh, there]


def _ssh() -> list[str]:
    """ssh, or what FLUXMESH_SSH says, that asks no questions and notices a host that is gone."""
    told = os.environ.get("FLUXMESH_SSH")
    options = (
        "BatchMode=yes",
        "ConnectTimeout=10",
        "ServerAliveInterval=5",
        "ClearAllForwardings=yes",
    )
    return [*(shlex.split(told) if told else ["ssh"]), *(f"-o{option}" for option in options)]


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        told = json.loads(line)
    except ValueError:  # a login script that prints
        return {}
    return told if isinstance(told, dict) else {}


def _failure(host: Host, code: int, errors: Sequence[str]) -> FluxmeshError:
    """Why a starter gave no answer."""
    last = errors[-1].rstrip(".") if errors else f"exit code {code}"
    if not host.is_local and code == SSH_FAILED:
        return HostUnreachableError(
            f"{title(host)}: ssh says {last!r}; make `ssh {host.ssh}` work without a password "
            f"(ssh-copy-id {host.ssh}), and try again."
        )
    if code < 0:
        return HostUnreachableError(f"{title(host)}: it does not answer; see whether it hangs.")
    if code in NOT_FOUND and host.python:
        return FluxmeshError(
            f"{title(host)}, python: there is no {host.python}; mend the hostfile."
        )
    if code in NOT_FOUND or any("No module named" in line for line in errors):
        return FluxmeshError(
            f"{title(host)}: no Python there has fluxmesh {__version__}; install it, and name "
            'the interpreter as "python" in the hostfile.'
        )
    return FluxmeshError(f"{title(host)}: fluxmesh fails there: {last}.")


# Starting


def agent_spec(
    hostfile: Hostfile, rank: int, envs: Sequence[tuple[str, str]], roots: Sequence[str] = ()
) -> dict[str, Any]:
    """What the agent of a rank is started with, as `starter` reads it. Raises `FluxmeshError`."""
    host, control = hostfile.hosts[rank], hostfile.control(rank)
    return {
        "address": address_of(host, control.address),
        "port": control.port,
        "models": host.models,
        "memory": host.memory,
        "envs": [list(pair) for pair in envs],
        "roots": list(roots),
    }


def address_of(host: Host, name: str) -> str:
    """The IP address at which an agent listens, where the hostfile has a name or ssh an alias."""
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        pass  # a name
    if not host.is_local and name == host.name:
        name = _ssh_name(host) or name
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise HostUnreachableError(
            f"{title(host)}: nothing knows the address of {name} ({error.strerror or error}); "
            'give it as "control" in the hostfile.'
        ) from None
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    return str(found[0][4][0])


def _ssh_name(host: Host) -> str | None:
    """What ~/.ssh/config means by a host's name."""
    done = subprocess.run(
        [*_ssh(), "-G", "--", host.ssh], capture_output=True, text=True, check=False
    )
    for line in done.stdout.splitlines():
        key, _, value = line.partition(" ")
        if key == "hostname" and value:
            return value
    return None


@dataclass(frozen=True)
class Started:
    """An agent that runs."""

    member: Member
    is_fresh: bool  # whether it was started just now
    kept: tuple[str, ...] = ()  # users whose settings it has, where they differ from ours


def start(
    host: Host,
    spec: dict[str, Any],
    keys: Keys,
    *,
    rotate: bool = False,
    forget: Sequence[str] = (),
    again: str = "",
) -> Started:
    """The agent of a host, which listens and lets this user in.

    `rotate` gives it new keys; the public keys `forget` are let in no more; `again` is
    the boot of an agent that does not answer, and does nothing for one that was ended on purpose.
    Raises `FluxmeshError` naming the host.
    """
    told = ask(
        host,
        "start",
        spec=spec,
        authorized={user_name(keys.public): keys.public},
        rotate=rotate,
        forget=list(forget),
        again=again,
    )
    member = Member(
        rank=host.rank,
        address=told["endpoint"],
        key=told["public_key"],
        boot=told["boot"],
        state=told["state"],
        python=told["python"],
    )
    return Started(member, bool(told["fresh"]), tuple(told["kept"]))


def start_again(record: MeshRecord, rank: int, keys: Keys) -> MeshRecord:
    """The mesh after an agent that died or hangs was started again, with the keys that it had.

    Only for hosts that are this machine: others are brought back by `fluxmesh up`.
    """
    hostfile = record.hostfile
    spec = agent_spec(hostfile, rank, record.envs, record.roots)
    lost = record.member(rank)
    again = lost.boot if lost else ""
    member = start(hostfile.hosts[rank], spec, keys, again=again or "unknown").member
    members = tuple(member if old.rank == rank else old for old in record.members)
    return replace(record, members=members)


# A mesh of one for one call


@dataclass
class Ephemeral:
    """An agent that lives as long as this process wants it; a context manager."""

    record: MeshRecord
    keys: Keys  # of the only user that it lets in
    process: subprocess.Popen[bytes]

    def close(self) -> None:
        """Ends it and removes its folder; twice is harmless. It also ends when we die."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(10.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        state = Path(self.record.members[0].state)
        try:  # an engine that hangs does not see that its agent was killed
            known = json.loads(read_private(state / "engine.json"))
            kill_process(int(known["pid"]), str(known["start"]))
        except (FileNotFoundError, ValueError):
            pass  # it has none
        shutil.rmtree(state, ignore_errors=True)

    def kill(self) -> None:
        """Ends it by force, because it does not answer."""
        self.process.kill()
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def start_ephemeral(envs: Sequence[tuple[str, str]] = (), keys: Keys | None = None) -> Ephemeral:
    """A mesh of one on this machine, for this call alone; its agent may read every model.

    It ends when its stdin closes, so nothing is left behind however this process ends. `keys` are
    those of an earlier one that died. Raises `FluxmeshError` with what the agent said last.
    """
    keys = keys or Keys.new()
    state = Path(tempfile.mkdtemp(prefix="fluxmesh-"))
    log = state / "agent.log"
    spec = {"address": "127.0.0.1", "port": 0, "roots": ["/"]}
    with open(log, "ab") as file:
        process = subprocess.Popen(
            agent_command(state, spec, "--ephemeral"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            start_new_session=True,  # Ctrl-C is the coordinator's to hear, not the agent's
        )
    ready = hand_over(process, {user_name(keys.public): keys.public}, dict(envs))
    if ready is None:
        process.kill()
        process.wait()
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        shutil.rmtree(state, ignore_errors=True)
        why = said[-1].rstrip(".") if said else "it said nothing"
        raise FluxmeshError(f"The agent of this machine did not start: {why}.")
    member = Member(
        rank=0,
        address=ready["endpoint"],
        key=ready["public_key"],
        boot=ready["boot"],
        state=str(state),
        python=sys.executable,
    )
    record = MeshRecord(THIS_NAME, THIS_MACHINE, (member,), tuple(envs), ("/",))
    return Ephemeral(record, keys, process)
