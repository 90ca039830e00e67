"""Starts agents: on the hosts of a mesh, by way of `remote.py`, or on this machine for one call.

`bringup.py` brings up a mesh with `start`; `mesh.py` has an agent of this machine started again
with `start_again`. `start_ephemeral` is the mesh of one that `generate` brings up for one call.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import ipaddress
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from fluxmesh.cluster.hostfile import Host, Hostfile
from fluxmesh.cluster.rendezvous import engine_envs
from fluxmesh.errors import FluxmeshError
from fluxmesh.storage import interrupts
from fluxmesh.storage.homes import AgentHome
from fluxmesh.storage.keys import Keys
from fluxmesh.storage.processes import kill_recorded
from fluxmesh_coordinator.agents.addresses import is_address
from fluxmesh_coordinator.agents.agent_here import agent_command, hand_over
from fluxmesh_coordinator.agents.mesh_file import THIS_MACHINE, THIS_NAME, Member, MeshRecord
from fluxmesh_coordinator.agents.remote import ask, ssh_name


def user_name(public_key: str) -> str:
    """What agents call this user in their allowlist: people read it, and no two are the same."""
    who = f"{getpass.getuser()}@{platform.node().partition('.')[0]}"
    short = re.sub(r"[^A-Za-z0-9_.@-]", "-", who).lstrip(".-")[:48] or "user"
    return f"{short}-{hashlib.sha256(public_key.encode()).hexdigest()[:8]}"


def agent_spec(
    hostfile: Hostfile, rank: int, envs: Sequence[tuple[str, str]], roots: Sequence[str] = ()
) -> dict[str, Any]:
    """What the agent of a rank is started with, as `starter` reads it. Raises `FluxmeshError`."""
    host = hostfile.hosts[rank]
    if hostfile.backend == "nccl":  # each agent of a machine has a GPU of its own
        gpu = ("CUDA_VISIBLE_DEVICES", str(hostfile.local_index(rank)))
        envs = [gpu, *engine_envs(hostfile.backend, len(hostfile.hosts)), *envs]
    return {
        **place_of(hostfile, rank),
        "models": host.models,
        "memory": host.memory,
        "envs": [list(pair) for pair in envs],
        "roots": list(roots),
    }


def place_of(hostfile: Hostfile, rank: int) -> dict[str, Any]:
    """Where the agent of a rank shall listen, as `starter` reads it: address, addresses, port.

    Where the hostfile names no port, `ports` are all that it may be, and `port` is the first.
    `address` is "" where the hostfile has a name or ssh an alias: the host itself knows by which
    address ssh came. `addresses` are then those that this machine knows for the name.
    """
    host, control = hostfile.hosts[rank], hostfile.control(rank)
    ports = hostfile.control_ports(rank)
    at: dict[str, Any] = {"port": control.port} | ({"ports": list(ports)} if ports[1:] else {})
    if is_address(control.address):
        address = str(ipaddress.ip_address(control.address))
        return {"address": address, "addresses": [], **at}
    name = control.address
    if not host.is_local and name == host.name:
        name = ssh_name(host) or name
    try:
        entries = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        entries = []  # ssh may reach it all the same, by way of another host
    entries.sort(key=lambda entry: entry[0] != socket.AF_INET)
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in entries))
    return {"address": "", "addresses": addresses, **at}


@dataclass(frozen=True)
class Started:
    """An agent that runs."""

    member: Member
    is_fresh: bool  # whether it was started just now
    kept: tuple[str, ...] = ()  # users whose settings it has, where they differ from ours


def wanted(
    spec: dict[str, Any], keys: Keys, *, rotate: bool, keep_ssh: bool = False
) -> dict[str, Any]:
    """How an agent shall run: what `starter` compares with how it does."""
    authorized = {user_name(keys.public): keys.public}
    return {"spec": spec, "authorized": authorized, "rotate": rotate, "kept": keep_ssh}


def start(
    host: Host,
    spec: dict[str, Any],
    keys: Keys,
    *,
    rotate: bool = False,
    forget: Sequence[str] = (),
    again: str = "",
    asker: str = "",
    keep_ssh: bool = False,
) -> Started:
    """The agent of a host, which listens and lets this user in.

    With `keep_ssh` the connection that starts it stays open as long as it lives.
    `rotate` gives it new keys; the public keys `forget` are let in no more; `again` is
    the boot of an agent that does not answer, and does nothing for one that was ended on purpose;
    `asker` is a name of its own for each `up`, by which it can have ended what it has started.
    Raises `FluxmeshError` naming the host.
    """
    answer = ask(
        host,
        "start",
        keep_ssh=keep_ssh,
        **wanted(spec, keys, rotate=rotate, keep_ssh=keep_ssh),
        forget=list(forget),
        again=again,
        asker=asker,
    )
    member = Member(
        rank=host.rank,
        address=answer["endpoint"],
        key=answer["public_key"],
        boot=answer["boot"],
        state=answer["state"],
        python=answer["python"],
    )
    return Started(member, bool(answer["fresh"]), tuple(answer["kept"]))


def start_again(record: MeshRecord, rank: int, keys: Keys) -> Member:
    """Starts an agent of a mesh again that died or hangs, with the keys that it had.

    Only for hosts that are this machine: others are brought back by `fluxmesh up`.
    """
    hostfile = record.hostfile
    spec = agent_spec(hostfile, rank, record.envs, record.roots)
    lost = record.member(rank)
    again = lost.boot if lost else ""
    return start(hostfile.hosts[rank], spec, keys, again=again or "unknown").member


# A mesh of one for one call


@dataclass
class Ephemeral:
    """An agent that lives as long as this process wants it; a context manager."""

    record: MeshRecord
    keys: Keys  # of the only user that it lets in
    process: subprocess.Popen[bytes]
    forget: Callable[[], None]  # that it is to be ended with this command

    def close(self) -> None:
        """Ends it and removes its folder; twice is harmless. It also ends when we die."""
        _end_ephemeral(self.process, Path(self.record.members[0].state))
        self.forget()

    def kill(self) -> None:
        """Ends it by force, because it does not answer."""
        self.process.kill()
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def _end_ephemeral(process: subprocess.Popen[bytes], state: Path) -> None:
    """From its first moment on; it puts its engine in order, if it has one."""
    with interrupts.uninterrupted():
        if process.poll() is None:
            process.terminate()
        if process.stdin is not None:
            with contextlib.suppress(OSError):  # what it did not read is lost
                process.stdin.close()
        try:
            process.wait(10.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
        kill_recorded(AgentHome(state).engine)  # one that hangs does not see that its agent is gone
        shutil.rmtree(state, ignore_errors=True)


def start_ephemeral(envs: Sequence[tuple[str, str]] = (), keys: Keys | None = None) -> Ephemeral:
    """A mesh of one on this machine, for this call alone; its agent may read every model.

    It ends when its stdin closes, so nothing is left behind however this process ends. `keys` are
    those of an earlier one that died. Raises `FluxmeshError` with what the agent said last.
    """
    keys = keys or Keys.new()
    spec = {"address": "127.0.0.1", "port": 0, "roots": ["/"]}
    with interrupts.uninterrupted(), interrupts.not_for_children():
        try:
            state = Path(tempfile.mkdtemp(prefix="fluxmesh-"))
        except OSError as error:
            raise _no_agent(error) from None
        log = state / "agent.log"
        try:
            with open(log, "ab") as file:
                process = subprocess.Popen(
                    agent_command(state, spec, "--ephemeral"),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=file,
                    start_new_session=True,  # Ctrl-C is the coordinator's to hear, not the agent's
                )
        except OSError as error:
            shutil.rmtree(state, ignore_errors=True)
            raise _no_agent(error) from None
        forget = interrupts.at_end(partial(_end_ephemeral, process, state))
    try:
        ready = hand_over(process, {user_name(keys.public): keys.public}, dict(envs))
        if ready is None:
            said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            why = said[-1].rstrip(".") if said else "it said nothing"
            raise FluxmeshError(f"The agent of this machine did not start: {why}.")
    except BaseException:
        process.kill()
        _end_ephemeral(process, state)
        forget()
        raise
    member = Member(
        rank=0,
        address=ready["endpoint"],
        key=ready["public_key"],
        boot=ready["boot"],
        state=str(state),
        python=sys.executable,
    )
    record = MeshRecord(THIS_NAME, THIS_MACHINE, (member,), tuple(envs), ("/",))
    return Ephemeral(record, keys, process, forget)


def _no_agent(error: OSError) -> FluxmeshError:
    where = "" if error.filename is None else f"{error.filename}: "
    return FluxmeshError(
        f"The agent of this machine can't be started: {where}{error.strerror or error}."
    )
