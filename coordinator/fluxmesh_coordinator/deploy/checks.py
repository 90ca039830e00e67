"""What can be wrong with a host before a mesh is up, from what `starter.look` found there. Pure.

`up` refuses a host with a finding of the level "fail"; `doctor` prints them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fluxmesh.cluster.hostfile import Host
from fluxmesh.machine.mlx_backend import remedy

Level = Literal["ok", "warn", "fail"]
PYTHON = (3, 11)
SKEW = 5.0  # seconds between clocks, above which logs of several hosts can't be compared
DISK = 2 << 30  # bytes below which a host can't keep adapters and logs for long

Look = Mapping[str, Any]  # what `starter.look` answers


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    rank: int
    check: str
    level: Level
    text: str  # what was found; with "warn" and "fail" also what to do


@dataclass(frozen=True)
class Reference:
    """The model that every host must have."""

    where: str  # it lies
    model: Look  # of its look; empty where no machine has it


def reference(here: Look, looks: Mapping[int, Look]) -> Reference:
    """This machine's model, else that of the first host that has it. `looks` are by rank."""
    for where, look in {"here": here, **{f"on host {k}": looks[k] for k in looks}}.items():
        if "content" in look.get("model", {}):
            return Reference(where, look["model"])
    return Reference("here", {})


def findings(
    host: Host, look: Look, here: Look, now: float, model: Reference | None = None
) -> list[Finding]:
    """All about one host. `here` is the same look at this machine, `now` when it was answered.

    `now` is in seconds since 1970, on this machine's clock; `model` is what the host's is compared
    with, this machine's if None.
    """
    judgements = [
        _python(look),
        _mlx(look, here),
        ("memory", "ok", f"{look['memory_bytes'] / 1e9:.0f} GB"),
        _disk(look),
        _clock(look, now),
        *_addresses(look),
    ]
    if "model" in look:
        judgements.append(_model(look["model"], model or reference(here, {})))
    return [Finding(host.rank, check, level, text) for check, level, text in judgements]


def _python(look: Look) -> tuple[str, Level, str]:
    version = str(look["python_version"])
    old = tuple(int(part) for part in version.split(".")[:2]) < PYTHON
    if old:
        return "Python", "fail", f"{version} is too old; install Python 3.11 or newer there."
    return "Python", "ok", f"{version} at {look['python']}, fluxmesh {look['version']}"


def _mlx(look: Look, here: Look) -> tuple[str, Level, str]:
    version, ours = str(look["mlx_version"]), str(here["mlx_version"])
    if not version:
        return "MLX", "fail", f"missing; run {look['python']} -m pip install mlx there."
    problem = str(look.get("mlx_problem", ""))
    if problem:
        return "MLX", "fail", (
            f"{version} does not load ({problem}); "
            f"{remedy(str(look['python']), str(look['system']))}."
        )  # fmt: skip
    if version != ours:
        return "MLX", "warn", (
            f"{version} there and {ours} here: pictures may differ in their last bits; "
            "install one version on all hosts."
        )  # fmt: skip
    return "MLX", "ok", version


def _disk(look: Look) -> tuple[str, Level, str]:
    free = int(look["disk_free_bytes"])
    if free < DISK:
        more = " (Finder counts space that macOS would clear, too)" if "mac" in look else ""
        text = f"{free / 1e9:.1f} GB left{more}; make room, adapters are kept there."
        return "disk", "warn", text
    return "disk", "ok", f"{free / 1e9:.0f} GB left"


def _clock(look: Look, now: float) -> tuple[str, Level, str]:
    skew = float(look["clock"]) - now
    if abs(skew) > SKEW:
        way = "ahead" if skew > 0 else "behind"
        return "clock", "warn", f"{abs(skew):.0f} s {way}; switch on network time there."
    return "clock", "ok", f"within {SKEW:.0f} s of this machine's"


def _addresses(look: Look) -> list[tuple[str, Level, str]]:
    """The addresses and the port that the hostfile names, as the host itself sees them."""
    judgements: list[tuple[str, Level, str]] = []
    for ip, own in look.get("ips", {}).items():
        if own:
            judgements.append(("ips", "ok", ip))
        else:
            text = f"{ip} is no address of this host; mend the hostfile."
            judgements.append(("ips", "fail", text))
    port = look.get("control")
    if port is not None and not port["free"] and not look.get("agent"):
        text = f"{port['endpoint']} is taken or no address of it; choose another in the hostfile."
        judgements.append(("control", "fail", text))
    elif port is not None:
        state = "its agent runs" if look.get("agent") else "free"
        judgements.append(("control", "ok", f"{port['endpoint']}, {state}"))
    return judgements


def _model(model: Look, other: Reference) -> tuple[str, Level, str]:
    if "problem" in model:
        return "model", "fail", str(model["problem"])
    if other.model and other.model["content"] != model["content"]:
        theirs, ours = (str(each["revision"])[:14] for each in (model, other.model))
        return "model", "fail", (
            f"other files there than {other.where} (revision {theirs}, {other.where} {ours}): "
            "pictures would differ; pull it on both, or copy one to the other."
        )  # fmt: skip
    return "model", "ok", f"{str(model['revision'])[:14]}, {model['bytes'] / 1e9:.1f} GB"
