"""Looks at a Mac for `starter.look`, with the tools that come with macOS.

What comes out is JSON, judged by `deploy/macos_checks.py` on the coordinator. A tool that is not
there, fails or hangs leaves its value out, as all do that had no turn within `DEADLINES.tools`.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import fluxmesh
from fluxmesh.deadlines import DEADLINES
from fluxmesh_coordinator.agents import macos_tools as tools

DAY = 86400.0  # seconds

# MLX loads in a process of its own, which is over before an engine needs the memory.
PROBE = """\
import json, mlx.core as mx
from mlx.core import distributed
print(json.dumps({**mx.device_info(), "jaccl": distributed.is_available("jaccl")}))"""
START = "from fluxmesh.storage.processes import started_at; print(started_at({pid}))"
PLACES = ({"LC_ALL": "C", "TZ": "UTC0"}, {"LC_ALL": "de_DE.UTF-8", "TZ": "Asia/Tokyo"})

Run = Callable[..., str | None]  # run(command, *arguments, seconds=, env=)
T = TypeVar("T")


def run(
    *command: str, seconds: float = DEADLINES.tool, env: Mapping[str, str] | None = None
) -> str | None:
    """What a command prints; None where it is not there, fails, or takes longer."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env={**os.environ, "LC_ALL": "C", **(env or {})},
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def collect(models: str | None, run: Run = run) -> dict[str, Any]:
    """All that a program can look at; `models` is the folder that the hostfile names."""
    end = time.monotonic() + DEADLINES.tools

    def ask(*command: str, seconds: float = DEADLINES.tool, **more: Any) -> str | None:
        left = end - time.monotonic()
        return run(*command, seconds=min(seconds, left), **more) if left > 0 else None

    def parsed(parse: Callable[[str], T], *command: str, **more: Any) -> T | None:
        text = ask(*command, **more)
        return None if text is None else parse(text)

    def sysctl(name: str) -> int | None:
        return parsed(tools.number, "/usr/sbin/sysctl", "-n", name)

    firewall = "/usr/libexec/ApplicationFirewall/socketfilterfw"
    return {
        "version": parsed(tools.version, "/usr/bin/sw_vers", "-productVersion"),
        "wheel": wheel(),
        "is_translated": sysctl("sysctl.proc_translated") == 1,
        "rdma_devices": parsed(tools.rdma_devices, "/usr/bin/ibv_devices"),
        "rdma_state": parsed(tools.rdma_state, "/usr/bin/rdma_ctl", "status"),
        "firewall": parsed(tools.firewall, firewall, "--getglobalstate"),
        "low_power": parsed(tools.low_power, "/usr/bin/pmset", "-g"),
        "battery": parsed(tools.battery, "/usr/bin/pmset", "-g", "batt"),
        "bridge": parsed(tools.bridge, "/sbin/ifconfig", "bridge0"),
        "thunderbolt": parsed(
            tools.thunderbolt_ports, "/usr/sbin/networksetup", "-listallhardwareports"
        ),
        "wired_limit_mb": sysctl("iogpu.wired_limit_mb"),
        "pressure": sysctl("kern.memorystatus_vm_pressure_level"),
        "heat": parsed(tools.heat, "/usr/bin/notifyutil", "-g", tools.HEAT),
        "has_tools": ask("/usr/bin/xcode-select", "-p") is not None,
        "has_remote_login": ask("/usr/bin/nc", "-z", "-G", "1", "127.0.0.1", "22") is not None,
        "crashes": crashes(Path.home() / "Library" / "Logs" / "DiagnosticReports", time.time()),
        "home": str(Path.home()),
        "paths": paths(models),
        "hidden": hidden_files(Path(sysconfig.get_path("purelib"))),
        # Last, for they may take long.
        "gpu": parsed(tools.gpu, sys.executable, "-c", PROBE, seconds=DEADLINES.mlx_loads),
        "identities": identities(ask),
    }


def wheel() -> int | None:
    """The macOS that the installed MLX was built for; its Metal half is a distribution apart."""
    for name in ("mlx-metal", "mlx"):
        try:
            text = metadata.distribution(name).read_text("WHEEL")
        except metadata.PackageNotFoundError:
            continue
        return tools.wheel_target(text or "")
    return None


def paths(models: str | None) -> dict[str, str]:
    """What an agent has to read, and where it lies."""
    cache = os.environ.get("HF_HOME", "~/.cache/huggingface")
    folders = {
        "fluxmesh": str(Path(fluxmesh.__file__).parent),
        "Python": sys.prefix,
        "the Hub's cache": os.path.expanduser(cache),
    }
    if models:
        folders["models"] = os.path.expanduser(models)
    return {what: os.path.realpath(path) for what, path in folders.items()}


def hidden_files(folder: Path) -> list[str]:
    """The `.pth` files that Python skips there, since they have the flag of hidden files."""
    return sorted(str(path) for path in folder.glob("*.pth") if flags(path) & stat.UF_HIDDEN)


def crashes(folder: Path, now: float) -> list[str]:
    """Names of the reports in `folder` on a Python that crashed in the last day, newest first.

    `now` is in seconds since 1970.
    """
    reports: list[tuple[float, str]] = []
    for path in folder.glob("[Pp]ython*.ips"):
        with suppress(OSError):  # macOS tidies up there
            reports.append((path.stat().st_mtime, path.name))
    return [name for when, name in sorted(reports, reverse=True) if when > now - DAY]


def flags(path: Path) -> int:
    """BSD's flags of a file, which other systems don't have."""
    return getattr(os.lstat(path), "st_flags", 0)


def identities(run: Run) -> list[str | None]:
    """What names this process, as programs of two languages and time zones take it."""
    code = START.format(pid=os.getpid())
    return [
        run(sys.executable, "-c", code, seconds=DEADLINES.mlx_loads, env=place) for place in PLACES
    ]
