"""What `fluxmesh up` runs on each host: looks at it, and starts, stops or asks about its agent.

    ssh HOST python -m fluxmesh_coordinator.agents.bootstrap  (this machine: without ssh)

One JSON object comes in on stdin and JSON lines go out on stdout, so that nothing that a shell
could misread, and no key, is ever part of a command line. `remote.py` is the other end. The agent
is started in a session of its own with none of this process's streams, so that it outlives both
ssh and the command line; what it says first (`READY ...`) is read through a pipe and passed on.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import select
import shutil
import socket
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from fluxmesh.deadlines import DEADLINES
from fluxmesh.errors import FluxmeshError, NotFetchedError
from fluxmesh.machine.memory import total_bytes
from fluxmesh.machine.mlx_backend import BackendCheck
from fluxmesh.storage import interrupts
from fluxmesh.storage.homes import AgentHome, models_folder
from fluxmesh.storage.keys import Allowlist
from fluxmesh.storage.log_tail import last_lines
from fluxmesh.storage.processes import started_at
from fluxmesh.version import __version__
from fluxmesh_coordinator.agents import addresses, macos, tcc
from fluxmesh_coordinator.agents.agent_here import SOMEBODY, Agent, Spec

TRIES = 20  # ports that others may take between a look at them and the start of an agent


# What can be asked


def look(request: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """This machine, as a mesh needs it; with `model`, whether that is here.

    With what `start` would be asked, also whether that would end the agent that runs.
    """
    with BackendCheck() as mlx:
        facts = _facts(request)
        facts["mlx_problem"] = mlx.problem()
        return facts


def _facts(request: dict[str, Any]) -> dict[str, Any]:
    try:
        mlx = metadata.version("mlx")
    except metadata.PackageNotFoundError:
        mlx = ""
    facts = {
        "version": __version__,
        "python": sys.executable,
        "python_version": platform.python_version(),
        "mlx_version": mlx,
        "machine": platform.node(),
        "system": f"{platform.system()} {platform.machine()}",
        "memory_bytes": total_bytes(),
        "disk_free_bytes": shutil.disk_usage(Path.home()).free,
        "clock": time.time(),
    }
    if request.get("model"):
        from fluxmesh.weights import hub

        facts["model"] = _model(request["model"], request.get("models"))
        facts["hub_free_bytes"] = hub.free_bytes()
    if request.get("port"):
        request = at_a_port(request)
        running = Agent(request["port"]).running()
        names = ("endpoint", "version", "boot")
        facts["agent"] = running and {name: running[name] for name in names}
        if "spec" in request:
            spec = addresses.settled(at_a_port(request["spec"]), running, is_own)
            facts["ends"] = running is not None and not _fits(running, {**request, "spec": spec})
        address = addresses.settled(request, running, is_own)["address"]
        facts["control"] = {
            "endpoint": f"{address}:{request['port']}",
            "free": can_bind(address, request["port"]),
        }
    facts["ips"] = {ip: is_own(ip) for ip in request.get("ips", ())}
    if platform.system() == "Darwin":
        facts["mac"] = macos.collect(request.get("models"))
    return facts


def at_a_port(place: Spec) -> Spec:
    """`place`, where several ports are possible, at one of them; else as it is.

    That of an agent of this user's which runs at one of them; else the first that nobody has. Who
    starts one there may still come late: `start` looks again then.
    """
    place = dict(place)
    ports: list[int] = place.pop("ports", [])
    if not ports:
        return place
    for port in ports:
        if AgentHome.is_there(port) and Agent(port).running() is not None:
            return {**place, "port": port}
    address = addresses.settled(place, None, is_own)["address"]
    free = next((port for port in ports if can_bind(address, port)), ports[0])
    return {**place, "port": free}


def _runs_at(port: int) -> bool:
    return AgentHome.is_there(port) and (
        Agent(port).running() is not None or not Agent(port).was_stopped
    )


def can_bind(address: str, port: int) -> bool:
    """Whether this host has that address, and the port is free."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        # What connections leave behind for a minute must not count as taken.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((address, port))
        except OSError:
            return False
    if not port:
        return True
    # On macOS that lets us in beside whoever listens at all addresses: nobody may answer, either.
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.settimeout(DEADLINES.port_answers)
        is_answered = sock.connect_ex((address, port)) == 0
        return not is_answered or sock.getsockname() == sock.getpeername()  # our own echo


def is_own(address: str) -> bool:
    """Whether this host has that address."""
    return can_bind(address, 0)


def _model(name: str, folder: str | None) -> dict[str, Any]:
    """{"revision", "content", "bytes"}, or {"problem"} where it is not here or broken.

    "is_fetchable" says whether fetching the model would mend it.
    """
    from fluxmesh.weights import hub
    from fluxmesh.weights.models_folder import entry_in

    own = entry_in(Path(os.path.expanduser(folder)) if folder else models_folder(), name)
    is_own = own.exists() and not (os.path.isabs(name) and os.path.exists(name))
    try:
        checkpoint = hub.resolve(str(own) if is_own else name, download=False)
    except FluxmeshError as error:
        return {"problem": str(error), "is_fetchable": isinstance(error, NotFetchedError)}
    nbytes = sum(part.nbytes for part in checkpoint.components.values())
    return {"revision": checkpoint.revision, "content": checkpoint.content, "bytes": nbytes}


def start(request: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Starts the agent, or lets the user in at the one that runs as asked already."""
    given: Spec = request["spec"]
    for _ in range(TRIES):
        place = at_a_port(given)
        try:
            return _start_at({**request, "spec": place})
        except FluxmeshError:
            address = addresses.settled(place, None, is_own)["address"]
            if "ports" not in given or can_bind(address, place["port"]):
                raise
            # Somebody has taken it since: the next one, then.
    raise FluxmeshError(f"Each of {TRIES} free ports was taken before its agent listened there.")


def _start_at(request: dict[str, Any]) -> dict[str, Any]:
    authorized = request["authorized"]
    agent = Agent(request["spec"]["port"])
    with agent.alone():
        if request.get("again") and agent.was_stopped:
            raise FluxmeshError("Its agent was ended by `fluxmesh down`; `fluxmesh up` starts it.")
        allowed = Allowlist(agent.home.authorized)
        known = allowed.users()
        for key in request.get("forget", ()):
            if key in known:
                allowed.remove(known[key])
        for name, key in authorized.items():
            allowed.add(name, key)
        record = agent.running()
        if record is not None and record["boot"] == request.get("again"):
            agent.kill()  # it runs, and does not answer
            record = None
        spec = addresses.settled(request["spec"], record, is_own)
        fits = record is not None and _fits(record, {**request, "spec": spec})
        asker = request.get("asker", "")
        if not fits:
            ended = agent.recorded()
            agent.stop()
            if request.get("rotate"):
                for name in ("agent.key", "agent.pub"):
                    (agent.state / name).unlink(missing_ok=True)
            try:
                kept = bool(request.get("kept"))
                record = agent.start(spec, authorized, asker=asker, kept=kept)
            except BaseException:
                if request.get("again") and ended is not None:
                    agent.remember(ended)  # so that it may be tried again: nobody wants it ended
                raise
        assert record is not None
        agent.remember({**record, "asked_by": asker})
        answer = {name: record[name] for name in ("endpoint", "public_key", "boot", "pid")}
        answer |= {"state": str(agent.state), "python": sys.executable}
        return {**answer, "fresh": not fits, "kept": record["by"] if record["spec"] != spec else []}


def _fits(record: dict[str, Any], request: dict[str, Any]) -> bool:
    """Whether an agent that runs can stay as it is."""
    fits = bool(record["version"] == __version__ and not request.get("rotate"))
    fits = fits and bool(record["endpoint"])
    # Another user's agent keeps its settings: to change them would end what runs there.
    if set(record["by"]) & set(request["authorized"]):
        fits = fits and record["spec"] == request["spec"]
    if request.get("kept") and record["by"] != [SOMEBODY]:  # launchd's need no connection
        keeper = record.get("kept_by")  # a later one is of no use: macOS asks who started it
        fits = bool(fits and keeper and started_at(keeper["pid"]) == keeper["start"])
    return fits


def dial(request: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Whether this process reaches a port, as the agent of this host may not (`reach.py`)."""
    try:
        socket.create_connection((request["ip"], request["port"]), timeout=5.0).close()
    except OSError:
        return {"reached": False}
    return {"reached": True}


def stop(request: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Ends the agent; with `asker`, only what that one has started and nobody else has asked for
    since, unless it would lose the connection that keeps it.

    "endpoint" is where it listened, "" where none has ended.
    """
    # Where it may be at one of several ports, it is at the one that `at_a_port` finds, too.
    ports: list[int] = request.get("ports") or [request["port"]]
    port = next((each for each in ports if _runs_at(each)), None)
    if port is None:
        return {"stopped": False, "endpoint": ""}
    agent = Agent(port)
    with agent.alone():
        if "asker" in request and not agent.is_only_of(request["asker"]):
            return {"stopped": False, "endpoint": ""}
        record = agent.running()
        endpoint = record["endpoint"] if record else ""
        return {"stopped": agent.stop(), "endpoint": endpoint}


def logs(request: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The end of the agent's log, also of one that is gone."""
    return {"lines": last_lines(Agent(request["port"]).log, request["lines"])}


def pull(request: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Fetches a model from the Hub, with this host's own token where it needs one."""
    from fluxmesh.weights import hub

    reported_at = [0.0]

    def progress(done: int, total: int) -> None:
        if time.monotonic() - reported_at[0] > 0.2 or done == total:
            reported_at[0] = time.monotonic()
            tell({"done_bytes": done, "total_bytes": total})

    checkpoint = hub.pull(request["model"], progress)
    return {"revision": checkpoint.revision}


def keep(pid: int) -> None:
    """Stays while the agent lives that this process has started, and somebody holds its stdin.

    So an ssh connection lasts as long as the agent, which is what macOS wants of a process that it
    lets into the local network for having come over ssh. The agent outlives the connection.
    """
    while True:
        if select.select([0], [], [], DEADLINES.keeper_looks)[0] and not os.read(0, 4096):
            return  # whoever held the connection is gone
        try:
            if os.waitpid(pid, os.WNOHANG)[0]:
                return
        except ChildProcessError:
            return  # it is not ours: another connection is kept for it


ACTIONS = {"look": look, "start": start, "stop": stop, "logs": logs, "pull": pull, "dial": dial}


def main() -> None:
    """Reads one request and answers it; exits 0 also where the answer is an error."""
    interrupts.cancel_from_now()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer

    def tell(line: dict[str, Any]) -> None:
        answers.write(json.dumps(line) + "\n")
        answers.flush()

    request = json.loads(sys.stdin.readline())
    if request["version"] != __version__:
        text = f"It has fluxmesh {__version__} and this machine {request['version']}; install one."
        tell({"error": text, "version": __version__})
        return
    try:
        result = ACTIONS[request["action"]](request, tell)
    except FluxmeshError as error:
        tell({"error": str(error)})
    except OSError as error:
        if error.errno == errno.EPERM and error.filename and platform.system() == "Darwin":
            tell({"error": tcc.denied(str(error.filename))})
            return
        where = f"{error.filename}: " if error.filename else ""
        tell({"error": f"{where}{error.strerror or error}."})
    else:
        try:
            tell({"result": result})
        except OSError:  # who asked is gone, and nobody would know of it
            if result.get("fresh") and not request["again"]:  # that one is on a mesh's record
                port = int(result["endpoint"].rpartition(":")[2])
                with interrupts.uninterrupted():
                    stop({"port": port, "asker": request["asker"]}, tell)
            return
        if request["keep_ssh"]:
            keep(result["pid"])


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        os._exit(interrupts.EXIT_CODE)
