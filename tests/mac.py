"""A Mac where there is none: what `platform` says, and tools that print what macOS's own do."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fluxmesh.machine import awake, identity, tools

# Of macOS 15.1 on an M2 with 16 GB, after it had worked for some days.
VM_STAT = """\
Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               41208.
Pages active:                            310466.
Pages inactive:                          305227.
Pages speculative:                         4105.
Pages throttled:                              0.
Pages wired down:                        147904.
Pages purgeable:                          11630.
"Translation faults":                1029384756.
Pages copy-on-write:                   38475610.
Pages zero filled:                    564738291.
Pages reactivated:                     10293847.
Pages purged:                           2938475.
File-backed pages:                       187344.
Anonymous pages:                         432454.
Pages stored in compressor:              512034.
Pages occupied by compressor:            201877.
Decompressions:                        19283746.
Compressions:                          28374655.
Pageins:                                9182736.
Pageouts:                                 37465.
Swapins:                                 102938.
Swapouts:                                192837.
"""
IOREG = """\
+-o J314cAP  <class IOPlatformExpertDevice, id 0x100000251, registered, matched, active, busy 0>
    {
      "compatible" = <"J314cAP","MacBookPro18,3","AppleARM">
      "IOPlatformSerialNumber" = "C02XXXXXXXXX"
      "IOPlatformUUID" = "5B0F3A1E-7C2D-5E4F-9A6B-0C1D2E3F4A5B"
      "manufacturer" = <"Apple Inc.">
    }
"""
GERMAN = "Speicherstatistik: (Seitengröße 16384 Byte)\nFreie Seiten:     41.208.\n"


class Mac:
    """Its tools lie in a folder, and speak German to whoever does not ask for C and UTC."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tool("vm_stat", VM_STAT)
        self.tool("ioreg", IOREG)
        self.tool("sysctl", "1\n")

    def tool(self, name: str, prints: str) -> None:
        (self.folder / f"{name}.txt").write_text(prints)
        (self.folder / f"{name}.de").write_text(GERMAN)
        self.script(name, '[ "$LC_ALL $TZ" = "C UTC0" ] && exec cat "$0.txt"\ncat "$0.de"')

    def caffeinate(self) -> None:
        """One that waits for the process that it is named, as macOS's does."""
        self.script(
            "caffeinate",
            'echo "$$ $@" >>"$0.log"; while kill -0 "$3" 2>/dev/null; do sleep 0.02; done',
        )

    def caffeinated(self) -> list[str]:
        """How `caffeinate` was called, each time, by the order of its starts."""
        return [words for _, words in self._started()]

    def is_awake(self) -> bool:
        """Whether one of them runs now."""
        return any(runs(pid) for pid, _ in self._started())

    def _started(self) -> list[tuple[int, str]]:
        log = self.folder / "caffeinate.log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [(int(pid), words) for pid, _, words in (line.partition(" ") for line in lines)]

    def script(self, name: str, lines: str) -> Path:
        path = self.folder / name
        path.write_text(f"#!/bin/sh\n{lines}\n")
        path.chmod(0o755)
        return path


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def until(is_so: Callable[[], bool], seconds: float = 60.0) -> None:
    """Waits for what must come."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.02)


def mac(folder: Path, patch: pytest.MonkeyPatch) -> Mac:
    """This machine as a Mac, for as long as `patch` holds."""
    folder.mkdir()
    made = Mac(folder)
    run = subprocess.run

    def of_the_mac(command: tuple[str, ...], **more: Any) -> Any:
        where = {"vm_stat": "/usr/bin", "ioreg": "/usr/sbin", "sysctl": "/usr/sbin"}
        name = Path(command[0]).name
        if name not in where:
            return run(command, **more)
        assert command[0] == f"{where[name]}/{name}", "where macOS has it"
        return run((str(folder / name), *command[1:]), **more)

    patch.setattr(platform, "system", lambda: "Darwin")
    patch.setattr(tools.subprocess, "run", of_the_mac)
    patch.setattr(awake, "CAFFEINATE", str(folder / "caffeinate"))
    patch.setattr(awake.Wakefulness, "_has_warned", False)
    identity.machine_id.cache_clear()
    return made
