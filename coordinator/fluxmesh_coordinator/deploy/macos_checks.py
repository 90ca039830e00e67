"""What can be wrong with a Mac, from what `agents/macos.py` found there. Pure; beside `checks.py`.

A value that is None could not be looked at, and gives no finding.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from typing import Any

from fluxmesh.cluster.hostfile import Host
from fluxmesh_coordinator.agents import tcc
from fluxmesh_coordinator.deploy.checks import Finding, Level, Look

RDMA = (26, 2)  # the macOS that has RDMA over thunderbolt, and the M5's kernels
WHEEL = 26  # the macOS whose wheel of MLX holds both
ACCELERATED = 17  # the GPU generation (M5) from which on a GPU has neural accelerators
SYSTEM = 4 << 30  # bytes that macOS itself needs: to wire the rest was seen to panic
LOW = 20  # per cent of a battery
HOT = 2  # of `macos_tools.heat`: macOS slows processor and GPU down by half or more

Judgement = tuple[str, Level, str]


def findings(host: Host, look: Look, backend: str) -> list[Finding]:
    """All about one Mac; none where the host is no Mac. `backend` is the hostfile's."""
    mac = look.get("mac")
    if mac is None:
        return []
    judgements = [
        *_system(mac),
        *_rdma(mac, host, backend),
        *_memory(mac, int(look["memory_bytes"])),
        *_network(mac, look, host, backend),
        *_power(mac),
        *_files(mac, host),
        *_processes(mac),
    ]
    return [Finding(host.rank, check, level, text) for check, level, text in judgements]


def _release(mac: Look) -> tuple[int, ...]:
    return tuple(int(part) for part in (mac["version"] or "0").split("."))


REINSTALL = (
    "reinstall MLX by a newer pip in a Python for this macOS (python -m pip install -U pip; "
    "python -m pip install --force-reinstall mlx)"
)
AUTO = "let `mlx.distributed_config --auto-setup` give each cable addresses of its own"


def _system(mac: Look) -> Iterator[Judgement]:
    if mac["is_translated"]:
        yield (
            "macOS",
            "fail",
            "its Python is Intel's, under Rosetta, where MLX has no GPU; install an arm64 one.",
        )
    version, wheel, gpu = mac["version"], mac["wheel"], mac["gpu"]
    if version is None:
        return
    device = f", {gpu['name']}" if gpu else ""
    yield "macOS", "ok", f"{version}, MLX built for {wheel or '?'}{device}"
    if gpu is None or (gpu["generation"] or 0) < ACCELERATED:
        return
    if _release(mac) < RDMA:
        yield (
            "neural accelerators",
            "warn",
            f"macOS {version} has no kernels for them, so steps take 3 to 4 times as long; update "
            f"to {RDMA[0]}.{RDMA[1]} or newer.",
        )
    elif wheel is not None and wheel < WHEEL:
        yield (
            "neural accelerators",
            "warn",
            f"MLX was installed as built for macOS {wheel}, without their kernels, so steps take 3 "
            f"to 4 times as long; {REINSTALL}.",
        )
    else:
        yield "neural accelerators", "ok", "MLX has their kernels"


def _rdma(mac: Look, host: Host, backend: str) -> Iterator[Judgement]:
    """What a jaccl backend needs; nothing about it where the hostfile wants another."""
    if not backend.startswith("jaccl"):
        return
    other = 'or write "backend": "ring" into the hostfile'
    devices, named = mac["rdma_devices"], sorted(_devices(host))
    missing = [device for device in named if devices is not None and device not in devices]
    if mac["version"] is not None and _release(mac) < RDMA:
        yield (
            backend,
            "fail",
            f"needs macOS {RDMA[0]}.{RDMA[1]}, and this is {mac['version']}; update, {other}.",
        )
    elif mac["gpu"] is not None and not mac["gpu"]["jaccl"]:
        yield (
            backend,
            "fail",
            f"is not in the MLX there, which is built for macOS {mac['wheel'] or '?'}; "
            f"{REINSTALL}, {other}.",
        )
    elif mac["rdma_state"] == "disabled":
        yield (
            backend,
            "fail",
            "RDMA is off; start the Mac in recovery, run `rdma_ctl enable` in its Terminal and "
            f"restart, {other}.",
        )
    elif missing:
        yield (
            backend,
            "fail",
            f"there is no {', '.join(missing)} (there is {', '.join(devices) or 'none'}); mend "
            "`rdma` in the hostfile, as `mlx.distributed_config` writes it.",
        )
    elif devices is not None:
        yield backend, "ok", f"has {', '.join(named) or 'no device to name'}"


def _devices(host: Host) -> set[str]:
    """Those that the hostfile names."""
    return {device for devices in host.rdma for device in devices or ()}


def _memory(mac: Look, total: int) -> Iterator[Judgement]:
    limit = (mac["wired_limit_mb"] or 0) << 20
    if limit > total - SYSTEM:
        yield (
            "GPU memory",
            "warn",
            f"iogpu.wired_limit_mb gives the GPU {limit / 1e9:.0f} of {total / 1e9:.0f} GB, which "
            "can crash macOS; leave it 4 GB: sudo sysctl "
            f"iogpu.wired_limit_mb={max(0, total - SYSTEM) >> 20}",
        )
    elif mac["gpu"] is not None:
        yield (
            "GPU memory",
            "ok",
            f"{mac['gpu']['recommended_bytes'] / 1e9:.1f} of {total / 1e9:.0f} GB; until it "
            "restarts, sudo sysctl iogpu.wired_limit_mb=N allows more on a Mac that nobody sits at",
        )
    if (mac["pressure"] or 1) > 1:
        yield (
            "memory pressure",
            "warn",
            "macOS is short of memory now; end other programs there, or expect it to swap.",
        )


def _network(mac: Look, look: Look, host: Host, backend: str) -> Iterator[Judgement]:
    bridge = mac["bridge"] or {"members": [], "addresses": []}
    for ip in look.get("ips", {}):
        if ipaddress.ip_address(ip).is_link_local:
            yield (
                "ips",
                "warn",
                f"macOS made {ip} up, and sends all of 169.254 over one interface; {AUTO}.",
            )
        elif ip in bridge["addresses"]:
            yield (
                "ips",
                "warn",
                f"{ip} is the Thunderbolt Bridge's, slower than a cable's own and no use to RDMA; "
                f"{AUTO}.",
            )
    ports = sorted({*bridge["members"]} & {*(mac["thunderbolt"] or ())})
    if backend.startswith("jaccl") and _devices(host) & {f"rdma_{port}" for port in ports}:
        yield (
            "Thunderbolt Bridge",
            "warn",
            f"bridge0 holds {', '.join(ports)}, which RDMA needs for itself; {AUTO}.",
        )
    if mac["firewall"] == 2:
        yield (
            "firewall",
            "warn",
            "blocks all incoming connections, so that no other Mac reaches its agent; let them in "
            "by System Settings > Network > Firewall > Options.",
        )
    elif mac["firewall"] == 1:
        yield (
            "firewall",
            "ok",
            "on: where others don't reach its agent, allow its Python on its screen, or by sudo "
            f"/usr/libexec/ApplicationFirewall/socketfilterfw --add {look['python']}",
        )
    if host.is_local and mac["has_remote_login"] is False:
        yield (
            "Remote Login",
            "ok",
            "off: to be a host of another Mac's mesh, or of its own by its name, this Mac needs it "
            "on (System Settings > General > Sharing)",
        )


def _power(mac: Look) -> Iterator[Judgement]:
    if mac["low_power"]:
        yield (
            "power",
            "warn",
            "Low Power Mode slows the GPU; switch it off in System Settings > Battery (or Energy).",
        )
    if (mac["heat"] or 0) >= HOT:
        yield (
            "heat",
            "warn",
            "so hot that macOS slows its GPU down; open its lid, give it air, or let it rest.",
        )
    battery = mac["battery"]
    if battery is not None and battery["in_use"]:
        low = ", little is left" if battery["percent"] < LOW else ""
        yield (
            "power",
            "warn",
            f"it runs on its battery ({battery['percent']}%{low}) and may slow down, or sleep when "
            "nobody uses it; plug it in.",
        )


def _files(mac: Look, host: Host) -> Iterator[Judgement]:
    for what, path in mac["paths"].items():
        folder = tcc.protected_by(path, mac["home"])
        if folder and not host.is_local:
            yield (
                "files",
                "warn",
                f"{what} lies in {folder}, where macOS lets nobody in who comes over ssh; "
                f"{tcc.ACCESS}.",
            )
    if mac["hidden"]:
        yield (
            "files",
            "warn",
            "Python skips .pth files that are hidden, and then finds no fluxmesh; run chflags "
            f"nohidden {' '.join(mac['hidden'])}",
        )
    if not mac["has_tools"]:
        yield (
            "Command Line Tools",
            "warn",
            "missing, so that git, make and /usr/bin/python3 open a dialog instead of running; run "
            "xcode-select --install there.",
        )


def _processes(mac: Look) -> Iterator[Judgement]:
    identities: list[Any] = mac["identities"]
    if None not in identities and len(set(identities)) > 1:
        yield (
            "processes",
            "fail",
            "a process has another name in another language or time zone, so that agents which run "
            "are taken for gone; install a newer fluxmesh.",
        )
    if mac["crashes"]:
        newest, *others = mac["crashes"]
        more = f" and {len(others)} more" if others else ""
        yield (
            "crashes",
            "warn",
            f"a Python crashed in the last day; if it was fluxmesh's, put {newest}{more}, of "
            "~/Library/Logs/DiagnosticReports there, into an issue.",
        )
