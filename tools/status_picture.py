"""What `fluxmesh status` shows of an invented mesh, as the pictures of docs/.

    python -m tools.status_picture

Four Macs: two paint for one user while another waits, one trains, one has been lost.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI

from fluxmesh.cluster.snapshot import Holding, LinkInfo, ModelVariant, StepTiming
from fluxmesh.errors import FluxmeshError, HostUnreachableError
from fluxmesh.wire.messages import EngineCounters, JobProgress, LeaseHolder, Status, WaitingJob
from fluxmesh_coordinator.agents.mesh_file import Member, MeshRecord
from fluxmesh_coordinator.agents.status import Survey
from fluxmesh_coordinator.console import tables
from tools.house import ROOT

WIDTHS = (80, 120)
GB = 10**9
DEV = ModelVariant("dev", "bfloat16", 4)


def survey() -> Survey:
    """The invented mesh."""
    names = ("studio", "mini", "laptop", "attic")
    hosts = [{"ssh": name, "ips": [f"10.0.0.{rank + 1}"]} for rank, name in enumerate(names)]
    members = tuple(Member(rank, "", "", "", "", "") for rank in range(len(names)))
    pairs = [(rank, (rank + 1) % len(names)) for rank in range(len(names))]
    links = tuple(LinkInfo(source=a, target=b, rate=4.4 * GB) for a, b in pairs)
    record = MeshRecord("macs.json", json.dumps(hosts), members, links=links)
    statuses = {
        0: _status("Apple M2 Ultra", 139.2, 192, 2.86, lease=_painting(step=3)),
        1: _status("Apple M4 Pro", 21.7, 64, 5.02, lease=_painting(step=2), line=_LINE),
        2: _status("Apple M3 Max", 70.4, 128, 4.11, lease=_TRAINING),
    }
    error = HostUnreachableError("host 3 (attic): its agent is silent; see whether the host hangs.")
    errors: dict[int, FluxmeshError] = {3: error}
    return Survey(record, statuses, errors, dict.fromkeys(statuses, 0.0))


_TRAINING = LeaseHolder(
    user="ben@ben-air",
    title="training, 150 updates",
    progress=JobProgress(unit="update", done=42, total=150, seconds=2405),
)
_LINE = (WaitingJob(user="cleo@cleo-mini", title="1 image, 1024x1024", seconds=33),)


def _painting(step: int) -> LeaseHolder:
    progress = JobProgress(unit="image", done=2, total=4, step=step, steps=8, seconds=33)
    return LeaseHolder(user="anna@studio", title="4 images, 1024x1024", progress=progress)


def _status(
    kind: str,
    free: float,
    memory: float,
    seconds: float,
    lease: LeaseHolder | None = None,
    line: tuple[WaitingJob, ...] = (),
) -> Status:
    measured = StepTiming(
        model=DEV.model,
        height=1024,
        width=1024,
        dtype=DEV.dtype,
        bits=DEV.bits,
        step_seconds=seconds,
    )
    return Status(
        state="busy" if lease else "ready",
        ring_generation=0,
        pid=1,
        engine_pid=2,
        name="",
        kind=kind,
        device=kind,
        mlx_version="",
        python_version="",
        memory_bytes=int(memory * 0.75 * GB),
        free_bytes=int(free * GB),
        load_rate=1e9,
        flops_per_second=1e12,
        clock=0.0,
        holds=Holding(weights=DEV, nbytes=12 * GB),
        measured=(measured,),
        counters=EngineCounters(),
        holder="",
        job="",
        waiting=len(line),
        lease=lease,
        line=line,
    )


def picture(width: int) -> str:
    """The SVG at so many characters a line; fonts are the reader's own."""
    console = Console(
        file=io.StringIO(), record=True, width=width, force_terminal=True, color_system="truecolor"
    )
    console.print(tables.drawn(survey(), width))
    svg = console.export_svg(
        title="fluxmesh status", theme=MONOKAI, unique_id=f"status{width}", font_aspect_ratio=0.61
    )
    return re.sub(r"\s*@font-face \{.*?\}\n", "\n", svg, flags=re.DOTALL)


def path(width: int) -> Path:
    return ROOT / "docs" / f"status-{width}.svg"


if __name__ == "__main__":
    for each in WIDTHS:
        path(each).write_text(picture(each), encoding="utf-8")
