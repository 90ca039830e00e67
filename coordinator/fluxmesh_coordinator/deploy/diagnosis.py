"""What `fluxmesh doctor` asks beside `checks.py`: this user's keys, the mesh's agents and links."""

from __future__ import annotations

from collections.abc import Mapping

from fluxmesh.cluster.snapshot import ModelVariant
from fluxmesh.errors import FluxmeshError
from fluxmesh.storage.homes import Home
from fluxmesh.wire.messages import Status
from fluxmesh_coordinator.agents.mesh_file import MeshRecord
from fluxmesh_coordinator.agents.status import survey, user_keys
from fluxmesh_coordinator.deploy import reach
from fluxmesh_coordinator.deploy.checks import SKEW, Finding
from fluxmesh_coordinator.jobs.model_check import difference


def keys_of_this_user() -> Finding:
    """Whether they are there, and nobody else's to read."""
    try:
        keys = user_keys()
    except FluxmeshError as error:
        return Finding(-1, "keys", "fail", str(error))
    return Finding(-1, "keys", "ok", f"{keys.public} in {Home.default().folder}")


def of_agents(mesh: MeshRecord) -> list[Finding]:
    """Whether each agent answers, how its engine is, and how fast its links are."""
    findings: list[Finding] = []
    overview = survey(mesh)
    for rank, error in overview.errors.items():
        findings.append(Finding(rank, "agent", "fail", str(error)))
    for rank, status in overview.statuses.items():
        text = f"{status.state}, ring generation {status.ring_generation}, {status.kind}"
        reason = status.reason.rstrip(".")
        if status.state == "failed":
            text = f"its engine failed: {reason}; the next job starts another."
            findings.append(Finding(rank, "agent", "warn", text))
        else:
            findings.append(Finding(rank, "agent", "ok", text))
        if status.pressure:
            short = f"{status.pressure}: macOS is short of it; quit other programs there."
            findings.append(Finding(rank, "memory", "warn", short))
        if abs(overview.clock_skews[rank]) > SKEW:
            skew = f"{overview.clock_skews[rank]:+.0f} s; switch on network time there."
            findings.append(Finding(rank, "agent's clock", "warn", skew))
    findings += in_memory(overview.statuses)
    for link in mesh.links:
        rate = f"to host {link.target}: {link.rate / 1e9:.2f} GB/s, {link.latency * 1e6:.0f} us"
        findings.append(Finding(link.source, "link", "ok", rate))
    first = mesh.members[0].rank
    findings += [Finding(first, "backend", "warn", note) for note in mesh.backend_notes]
    findings += reach.findings(mesh)
    ranks = [member.rank for member in mesh.members]
    linked = {(link.source, link.target) for link in mesh.links}
    for a, b in zip(ranks, ranks[1:] + ranks[:1], strict=True):
        if a != b and (a, b) not in linked:
            text = f"none to host {b}: no ring of all hosts; look at cables and `ips`."
            findings.append(Finding(a, "link", "warn", text))
    return findings


def in_memory(statuses: Mapping[int, Status]) -> list[Finding]:
    """Whether hosts that hold a model by one name hold one model: its files may have changed."""
    models: dict[ModelVariant, dict[int, tuple[str, str]]] = {}
    for rank, status in statuses.items():
        if status.holds is not None:
            holders = models.setdefault(status.holds.weights, {})
            holders[rank] = (status.name, status.holds.content)
    problems = [(max(each), difference(weights.model, each)) for weights, each in models.items()]
    return [Finding(rank, "in memory", "fail", text) for rank, text in problems if text]
