"""`fluxmesh serve --install` and `--uninstall`: a server that begins when its user logs in.

Writes what `service_files.py` says and has launchd or systemd load it. Both are asked by their own
commands; what they answer is told where it goes wrong.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fluxmesh.deadlines import DEADLINES
from fluxmesh.errors import FluxmeshError
from fluxmesh.storage.atomic import write_file
from fluxmesh_coordinator.server import service_files

NOT_LOADED = 3  # launchctl: there is no such process; systemctl has 5 for the same
GONE = {NOT_LOADED, 5, 113}


def install(arguments: Sequence[str]) -> Path:
    """Writes and loads the service; one that is there is replaced. Returns its file.

    Raises `FluxmeshError` with what launchd or systemd said.
    """
    home, is_mac = Path.home(), sys.platform == "darwin"
    values = {
        "python": sys.executable, "arguments": arguments, "home": home, "environment": os.environ,
    }  # fmt: skip
    path = _file(home)
    made = service_files.agent(**values) if is_mac else service_files.unit(**values).encode()  # type: ignore[arg-type]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_mac:
            (home / "Library" / "Logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FluxmeshError(f"{path.parent} can't be made: {error.strerror}.") from error
    if is_mac and path.exists():
        _end_agent()
    write_file(path, made, replace=True)
    if is_mac:
        _ask("launchctl", "bootstrap", _domain(), str(path))
    else:
        _ask("systemctl", "--user", "daemon-reload")
        _ask("systemctl", "--user", "enable", service_files.UNIT)
        _ask("systemctl", "--user", "restart", service_files.UNIT, seconds=_patience())
    return path


def uninstall() -> Path | None:
    """Ends the service and removes its file; None: there was none. Raises as `install`."""
    path = _file(Path.home())
    if not path.exists():
        return None
    if sys.platform == "darwin":
        _end_agent()
    else:
        unit = service_files.UNIT
        _ask("systemctl", "--user", "disable", "--now", unit, may_fail=True, seconds=_patience())
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    if sys.platform != "darwin":
        _ask("systemctl", "--user", "daemon-reload", may_fail=True)
    return path


def _file(home: Path) -> Path:
    if sys.platform == "darwin":
        return home / "Library" / "LaunchAgents" / f"{service_files.LABEL}.plist"
    base = os.environ.get("XDG_CONFIG_HOME") or home / ".config"
    return Path(base) / "systemd" / "user" / service_files.UNIT


def _patience() -> float:
    """Seconds: who ends a server waits for what it still finishes."""
    return DEADLINES.server_ends + DEADLINES.tool


def _domain() -> str:
    return f"gui/{os.getuid()}"


def _end_agent() -> None:
    """Ends the LaunchAgent, and returns when it is gone.

    `bootout` only asks for it; until the server has finished what runs, its label is taken, and
    `bootstrap` answers 5, "Input/output error".
    """
    agent = f"{_domain()}/{service_files.LABEL}"
    _ask("launchctl", "bootout", agent, may_fail=True)
    deadline = time.monotonic() + _patience()
    while _ask("launchctl", "print", agent, may_fail=True) == 0 and time.monotonic() < deadline:
        time.sleep(DEADLINES.tick)


def _ask(*command: str, may_fail: bool = False, seconds: float = DEADLINES.tools) -> int:
    """What it ends with. `may_fail`: what is to be ended may have ended by itself."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except FileNotFoundError:
        raise FluxmeshError(
            f"{command[0]} is not on this machine, so nothing would start the server; run "
            "`fluxmesh serve` by hand."
        ) from None
    except subprocess.TimeoutExpired:
        raise FluxmeshError(f"{' '.join(command)} did not answer; try again.") from None
    if done.returncode and not (may_fail and done.returncode in GONE):
        said = " ".join((done.stderr or done.stdout).split()).rstrip(".") or "it said nothing"
        raise FluxmeshError(f"{' '.join(command)} failed ({done.returncode}): {said}.")
    return done.returncode
