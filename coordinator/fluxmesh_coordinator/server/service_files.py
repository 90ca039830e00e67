"""What launchd and systemd read to run the server from a user's login on. Pure.

A LaunchAgent in macOS, for it is the user's own: their models, keys and pictures. launchd.plist(5)
and systemd.service(5) describe every key. `install.py` puts these files where they belong.
"""

from __future__ import annotations

import os
import plistlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from fluxmesh.deadlines import DEADLINES

LABEL = "org.fluxmesh.serve"
UNIT = "fluxmesh-serve.service"
AGAIN = 10  # seconds between two starts
FILES = 10240  # OPEN_MAX of macOS: launchd gives 256
SYSTEM_PATH = "/opt/homebrew/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
PASSED = ("FLUXMESH_HOME", "FLUXMESH_STATE", "HF_HOME", "HF_HUB_CACHE", "FLUX_DEV", "FLUX_SCHNELL",
          "AE")  # fmt: skip


def passed(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that say where things lie."""
    return {name: environment[name] for name in PASSED if environment.get(name)}


def agent(
    *, python: str, arguments: Sequence[str], home: Path, environment: Mapping[str, str]
) -> bytes:
    """The property list of a LaunchAgent, as XML: started at login, and again where it crashes."""
    log = str(home / "Library" / "Logs" / "fluxmesh-serve.log")
    return plistlib.dumps(
        {
            "Label": LABEL,
            "ProgramArguments": [python, "-m", "fluxmesh_coordinator", "serve", *arguments],
            "WorkingDirectory": str(home),
            "EnvironmentVariables": {
                "PATH": f"{os.path.dirname(python)}:{SYSTEM_PATH}",
                **passed(environment),
            },
            "RunAtLoad": True,
            "KeepAlive": {"SuccessfulExit": False},
            "ThrottleInterval": AGAIN,
            "ExitTimeOut": int(DEADLINES.server_ends),
            "ProcessType": "Interactive",  # else macOS holds its processor and disk back
            "SoftResourceLimits": {"NumberOfFiles": FILES},
            "StandardOutPath": log,
            "StandardErrorPath": log,
        }
    )


def unit(
    *, python: str, arguments: Sequence[str], home: Path, environment: Mapping[str, str]
) -> str:
    """A user unit of systemd, started at login, and again where it crashes."""
    command = [python, "-m", "fluxmesh_coordinator", "serve", *arguments]
    variables = "".join(
        f"Environment={_quoted(f'{name}={value}')}\n" for name, value in passed(environment).items()
    )
    return (
        "[Unit]\n"
        "Description=fluxmesh serve\n"
        "After=network-online.target\n\n"
        "[Service]\n"
        f"ExecStart={' '.join(_quoted(word).replace('$', '$$') for word in command)}\n"
        f"WorkingDirectory={_path(str(home))}\n"
        f"{variables}"
        "Restart=on-failure\n"
        f"RestartSec={AGAIN}\n"
        f"TimeoutStopSec={DEADLINES.server_ends:.0f}\n\n"
        "[Install]\n"
        "WantedBy=default.target\n"
    )


def _quoted(word: str) -> str:
    """A word as systemd.syntax(7) has it; a specifier in it is none."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return '"' + escaped.replace("%", "%%") + '"'


def _path(path: str) -> str:
    """A path of a setting that takes one alone, and no quotes."""
    return path.replace("%", "%%")
