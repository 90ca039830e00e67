"""The agent as a process: state folder, log, keys, signals, and the line that says it listens."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fluxmesh.errors import FluxmeshError
from fluxmesh.storage.homes import AgentHome, models_folder, private_folder, write_private
from fluxmesh.storage.keys import Allowlist, load_keys
from fluxmesh.storage.processes import started_at
from fluxmesh.version import __version__
from fluxmesh_agent.ending import Ending
from fluxmesh_agent.service import Service
from fluxmesh_agent.supervisor import EngineOptions

log = logging.getLogger(__name__)

FULL_LOG = 16 << 20  # bytes, at which the next start puts it aside


@dataclass(frozen=True)
class AgentSettings:
    """What the command line and stdin said."""

    state: Path | None
    address: str
    port: int
    models: Path | None = None
    memory: int | None = None
    roots: tuple[Path, ...] = ()
    authorized: Mapping[str, str] = field(default_factory=dict)  # name to public key
    envs: tuple[tuple[str, str], ...] = ()  # of the engines
    ephemeral: bool = False


def serve(settings: AgentSettings, ending: Ending) -> None:
    """Runs an agent until it is told to end. Raises `FluxmeshError` where it can't start."""
    if settings.state is None:
        home = AgentHome.default(settings.port)
    else:
        home = AgentHome(private_folder(settings.state))
    with _alone(home):
        _log_to(home.log)
        try:
            asyncio.run(_serve(settings, home, ending))
        finally:
            ending.is_under_way()
        if settings.ephemeral:
            shutil.rmtree(home.folder, ignore_errors=True)


async def _serve(settings: AgentSettings, home: AgentHome, ending: Ending) -> None:
    from fluxmesh.wire.transport.listener import CurveListener

    loop, stopping = asyncio.get_running_loop(), asyncio.Event()
    ending.becomes(lambda: _stop(loop, stopping))
    keys = load_keys(home.folder, "agent")
    allowlist = Allowlist(home.authorized)
    for name, key in settings.authorized.items():
        allowlist.add(name, key)
    where = f"[{settings.address}]" if ":" in settings.address else settings.address
    listener = await CurveListener.open(f"{where}:{settings.port}", keys, allowlist)
    options = EngineOptions(
        settings.models or models_folder(),
        settings.roots,
        settings.memory,
        settings.envs,
        keeps_kernels=not settings.ephemeral,
    )
    service = Service(listener, home, options, stopping)
    pid = os.getpid()
    identity = {"endpoint": listener.address, "pid": pid, "boot": service.boot}
    known = {**identity, "start": started_at(pid), "version": __version__}
    write_private(home.agent, json.dumps(known))
    log.info("listens at %s", listener.address)
    if settings.ephemeral:
        threading.Thread(target=_watch_stdin, args=(loop, stopping), daemon=True).start()
    _say({**identity, "public_key": keys.public})
    try:
        await service.run()
    finally:
        home.agent.unlink(missing_ok=True)


def _stop(loop: asyncio.AbstractEventLoop, stopping: asyncio.Event) -> None:
    """From any thread, and from between two lines of the loop's own."""
    with contextlib.suppress(RuntimeError):  # the loop is closed: the agent has ended
        loop.call_soon_threadsafe(stopping.set)


@contextmanager
def _alone(home: AgentHome) -> Iterator[None]:
    """One agent a folder: a second one would end the first one's engine."""
    with open(home.folder / "agent.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FluxmeshError(
                f"An agent runs with {home.folder} already; stop it with `fluxmesh down`, or "
                "choose another folder for its state."
            ) from None
        yield


def _log_to(path: Path) -> None:
    with contextlib.suppress(OSError):  # there is none yet
        if path.stat().st_size > FULL_LOG:
            path.replace(path.with_suffix(".log.1"))
    path.touch(mode=0o600)
    handlers: list[logging.Handler] = [logging.FileHandler(path)]
    if sys.stderr is not None and sys.stderr.isatty():
        handlers.append(logging.StreamHandler())
    form = "%(asctime)s agent %(levelname)s %(message)s"
    logging.basicConfig(format=form, level=logging.INFO, handlers=handlers, force=True)


def _say(ready: Mapping[str, object]) -> None:
    """The one line on stdout; whoever started it may read it, or not."""
    with contextlib.suppress(OSError):
        sys.stdout.write(json.dumps(ready) + "\n")
        sys.stdout.flush()


def _watch_stdin(loop: asyncio.AbstractEventLoop, stopping: asyncio.Event) -> None:
    """Ends the agent when whoever started it has ended.

    Past Python's own buffer: a thread that waits in there holds a lock, for want of which an
    interpreter that ends aborts.
    """
    with contextlib.suppress(OSError):
        while sys.stdin is not None and os.read(sys.stdin.fileno(), 4096):
            pass  # nothing more is expected
    _stop(loop, stopping)
