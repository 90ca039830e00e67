"""Whether macOS lets each agent dial its neighbours at the addresses that a ring would use.

Asked of the agents themselves, since macOS allows a connection or not by how a process was started.
Where an agent says that it can't, the starter on the same Mac tries the same connection from ssh,
which macOS lets through: if that succeeds, it is the permission and not the cable that is missing.
On other systems agents never say so, and there is nothing to find.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from contextlib import AsyncExitStack

from fluxmesh.deadlines import DEADLINES
from fluxmesh.errors import FluxmeshError, LocalNetworkError
from fluxmesh.wire import messages
from fluxmesh.wire.tasks import together
from fluxmesh.wire.transport import local_network
from fluxmesh.wire.transport.base import Dialer
from fluxmesh_coordinator.agents import remote
from fluxmesh_coordinator.agents.client import AgentClient
from fluxmesh_coordinator.agents.mesh_file import MeshRecord
from fluxmesh_coordinator.agents.status import run, user_keys
from fluxmesh_coordinator.deploy.checks import Finding

Denied = tuple[int, int, str, int]  # source and target by rank, the target's address and port


def findings(mesh: MeshRecord) -> list[Finding]:
    """One for each agent that macOS keeps out of the local network, or may."""
    return judged(mesh, run(user_keys(), lambda dialer: denied(mesh, dialer)))


def judged(mesh: MeshRecord, connections: Sequence[Denied]) -> list[Finding]:
    """What is told of connections that agents could not make, once ssh has tried them too."""
    findings: dict[int, Finding] = {}
    for source, target, ip, port in connections:
        host = mesh.hostfile.hosts[source]
        try:
            reached = remote.ask(host, "dial", ip=ip, port=port)["reached"]
        except FluxmeshError:
            reached = False
        if reached:
            text = (
                f"macOS keeps its agent out of the local network: over ssh this Mac reaches host "
                f"{target} at {ip}, and its agent does not; {local_network.REMEDY}."
            )
            findings[source] = Finding(source, "local network", "fail", text)
        else:
            text = f"its agent does not reach host {target} at {ip}. {local_network.SENTENCE}."
            findings.setdefault(source, Finding(source, "local network", "warn", text))
    return list(findings.values())


async def denied(mesh: MeshRecord, dialer: Dialer) -> list[Denied]:
    """The connections between neighbours that macOS may have forbidden."""
    names = {host.rank: host.name for host in mesh.hosts}
    async with AsyncExitStack() as stack:
        clients: dict[int, AgentClient] = {}
        for member in mesh.members:
            client = AgentClient(dialer, member, names[member.rank])
            try:
                clients[member.rank] = await stack.enter_async_context(client)
            except FluxmeshError:
                continue  # another finding tells of it

        async def dial(source: int, target: int, ip: str) -> Denied | None:
            token = secrets.token_bytes(32)
            try:
                listen = messages.ListenForLink(ip, token)
                (port,) = (await clients[target].ask(listen, messages.Ports, DEADLINES.cable)).ports
            except FluxmeshError:
                return None
            try:
                probe = messages.ProbeLink(ip=ip, port=port, token=token, nbytes=1)
                await clients[source].ask(probe, messages.LinkRate, DEADLINES.cable)
            except LocalNetworkError:
                return source, target, ip, port
            except FluxmeshError:
                return None
            return None

        ranks = list(clients)
        pairs = {*zip(ranks, ranks[1:] + ranks[:1], strict=True)}
        pairs |= {(target, source) for source, target in pairs}
        hosts = mesh.hostfile.hosts
        ended = await together(
            dial(source, target, ip)
            for source, target in sorted(pairs)
            if source != target
            for ip in hosts[target].ips
        )
    return [connection for connection in ended if connection is not None]
