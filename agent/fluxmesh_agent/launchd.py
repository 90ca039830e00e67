"""What macOS's launchd reads to run this host's agent from the start of the machine on.

A LaunchDaemon with a UserName, not a LaunchAgent: it runs without anybody logged in, and macOS lets
daemons into the local network without asking (Apple's TN3179). `fluxmesh-agent launchd` prints it,
docs/macos.md says where it goes; launchd.plist(5) describes every key. Pure.
"""

from __future__ import annotations

import os
import plistlib
from collections.abc import Mapping, Sequence
from pathlib import Path

LABEL = "org.fluxmesh.agent-{port}"
FILES = 10240  # OPEN_MAX of macOS: launchd gives 256
AGAIN = 10  # seconds between two starts, where the address is not there yet after a reboot
SYSTEM_PATH = "/opt/homebrew/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
PASSED = ("FLUXMESH_STATE", "HF_HOME", "HF_HUB_CACHE")  # variables that say where things lie


def daemon(
    *,
    python: str,
    arguments: Sequence[str],
    port: int,
    user: str,
    home: Path,
    environment: Mapping[str, str],
) -> bytes:
    """The property list, as XML: `python -m fluxmesh_agent run ARGUMENTS`, for ever, as `user`.

    It is started again where it crashes, and not where it was ended with `fluxmesh down`, which
    lasts until the next restart of the machine.
    """
    passed = {name: environment[name] for name in PASSED if environment.get(name)}
    log = str(home / "Library" / "Logs" / f"fluxmesh-agent-{port}.log")
    return plistlib.dumps(
        {
            "Label": LABEL.format(port=port),
            "ProgramArguments": [python, "-m", "fluxmesh_agent", "run", *arguments],
            "UserName": user,
            "WorkingDirectory": "/",
            "EnvironmentVariables": {
                "HOME": str(home),
                "PATH": f"{os.path.dirname(python)}:{SYSTEM_PATH}",
                **passed,
            },
            "RunAtLoad": True,
            "KeepAlive": {"SuccessfulExit": False},
            "ThrottleInterval": AGAIN,
            "ProcessType": "Interactive",  # else macOS holds its processor and disk back
            "SoftResourceLimits": {"NumberOfFiles": FILES},
            "StandardOutPath": log,
            "StandardErrorPath": log,
        }
    )
