"""A Mac where there is none: what `platform` says, and tools that print what macOS's own do."""

from __future__ import annotations

import platform
import subprocess
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

    def script(self, name: str, lines: str) -> Path:
        path = self.folder / name
        path.write_text(f"#!/bin/sh\n{lines}\n")
        path.chmod(0o755)
        return path


def mac(folder: Path, patch: pytest.MonkeyPatch) -> Mac:
    """This machine as a Mac, for as long as `patch` holds."""
    folder.mkdir()
    made = Mac(folder)
    run = subprocess.run

    def of_the_mac(command: tuple[str, ...], **more: Any) -> Any:
        where = {"vm_stat": "/usr/bin", "ioreg": "/usr/sbin", "sysctl": "/usr/sbin"}
        name = Path(command[0]).name
        assert command[0] == f"{where[name]}/{name}", "where macOS has it"
        return run((str(folder / name), *command[1:]), **more)

    patch.setattr(platform, "system", lambda: "Darwin")
    patch.setattr(tools.subprocess, "run", of_the_mac)
    patch.setattr(awake, "CAFFEINATE", str(folder / "caffeinate"))
    patch.setattr(awake.Wakefulness, "_has_told", False)
    identity.machine_id.cache_clear()
    return made
