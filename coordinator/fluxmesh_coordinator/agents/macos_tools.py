"""What macOS's own tools say, as values: text in, value out. Pure.

Each function takes the output of one command, run with LC_ALL=C by `macos.py`, and gives None (or
nothing of a kind) where the text is not what it expects: a tool that changes is a finding less,
never an error.
"""

from __future__ import annotations

import json
import re
from typing import Any

HEAT = "com.apple.system.thermalpressurelevel"  # what macOS notifies programs of


def version(text: str) -> str | None:
    """`sw_vers -productVersion`: "26.2"."""
    match = re.fullmatch(r"\d+(\.\d+)*", text.strip())
    return match[0] if match else None


def wheel_target(text: str) -> int | None:
    """The macOS that a wheel was built for, from its WHEEL file: 14, 15, 26."""
    match = re.search(r"^Tag: \S+-macosx_(\d+)_\d+_\w+\s*$", text, re.MULTILINE)
    return int(match[1]) if match else None


def gpu(text: str) -> dict[str, Any] | None:
    """The JSON line of `macos.PROBE`: {"generation", "name", "recommended_bytes", "jaccl"}."""
    try:
        device = json.loads(text.strip().splitlines()[-1])
        generation = re.match(r"applegpu_g(\d+)", device["architecture"])
        return {
            "generation": int(generation[1]) if generation else None,
            "name": str(device["device_name"]),
            "recommended_bytes": int(device["max_recommended_working_set_size"]),
            "jaccl": bool(device["jaccl"]),
        }
    except (ValueError, KeyError, TypeError, IndexError):
        return None


def rdma_devices(text: str) -> list[str]:
    """`ibv_devices`: the names of its table, below two lines of heading."""
    return re.findall(r"^\s*(rdma_\w+)\s", text, re.MULTILINE)


def rdma_state(text: str) -> str | None:
    """`rdma_ctl status`: "enabled" or "disabled"."""
    match = re.search(r"\b(enabled|disabled)\b", text.lower())
    return match[1] if match else None


def firewall(text: str) -> int | None:
    """`socketfilterfw --getglobalstate`: 0 off, 1 on, 2 all incoming connections are blocked."""
    match = re.search(r"State = (\d)", text)
    return int(match[1]) if match else None


def low_power(text: str) -> bool | None:
    """`pmset -g`: whether the mode that saves energy holds now; older ones say `powermode`."""
    match = re.search(r"^\s*lowpowermode\s+(\d)", text, re.MULTILINE)
    match = match or re.search(r"^\s*powermode\s+(\d)", text, re.MULTILINE)
    return match[1] == "1" if match else None


def heat(text: str) -> int | None:
    """`notifyutil -g HEAT`: 0 nominal, 1 moderate, 2 heavy, 3 trapping, 4 sleeping.

    The values are those of <libkern/OSThermalNotification.h>.
    """
    match = re.fullmatch(rf"{re.escape(HEAT)}\s+(\d)", text.strip())
    return int(match[1]) if match else None


def battery(text: str) -> dict[str, Any] | None:
    """`pmset -g batt`: {"in_use", "percent"}; None for a Mac that has none."""
    percent = re.search(r"InternalBattery\S*.*?(\d+)%", text)
    if not percent:
        return None
    return {"in_use": "'Battery Power'" in text, "percent": int(percent[1])}


def bridge(text: str) -> dict[str, list[str]]:
    """`ifconfig bridge0`: its {"members", "addresses"}."""
    return {
        "members": re.findall(r"^\s*member: (\w+)", text, re.MULTILINE),
        "addresses": re.findall(r"^\s*inet (\d+(?:\.\d+){3})", text, re.MULTILINE),
    }


def thunderbolt_ports(text: str) -> list[str]:
    """`networksetup -listallhardwareports`: the interfaces of single thunderbolt ports.

    The bridge of them, "Thunderbolt Bridge", is none; its interface is no `en`.
    """
    pairs = re.findall(r"Hardware Port: (.+)\nDevice: (\w+)", text)
    return [name for port, name in pairs if port.startswith("Thunderbolt") and name[:2] == "en"]


def number(text: str) -> int | None:
    """`sysctl -n`, of a number."""
    return int(text) if text.strip().isdigit() else None
