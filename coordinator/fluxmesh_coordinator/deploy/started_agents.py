"""The agents that one `up` starts: written down before the first, ended again if it is cancelled.

Stands between `bringup.py` and `mesh_file.py`. Three layers, for Ctrl-C may come anywhere and a
power cut needs no leave: a starter ends the agent that it could not tell of (`bootstrap.py`); an
`up` that is cancelled has every host end what was started there, and leaves what ran before; and
what an `up` that was killed has left is in `starting.json`, where `down` and the next `up` find it.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from functools import partial

from fluxmesh.cluster.hostfile import Host
from fluxmesh.deadlines import DEADLINES
from fluxmesh.errors import FluxmeshError
from fluxmesh.storage.homes import Home
from fluxmesh_coordinator.agents import mesh_file, remote
from fluxmesh_coordinator.agents.mesh_file import StartRecord

UNDOING = replace(DEADLINES, ask_stop=DEADLINES.undoes)  # whoever pressed Ctrl-C waits

Place = tuple[str, int]  # of an agent: its host's name, and the port


@dataclass
class StartedAgents:
    """Those of one `up`."""

    record: StartRecord
    home: Home
    asker: str = field(default_factory=partial(secrets.token_hex, 8), init=False)  # to the hosts
    _hosts: tuple[Host, ...] = field(default=(), init=False)  # where one may have been started

    def begin(self, hosts: Iterable[Host]) -> None:
        """Writes down that agents are about to start on these hosts. Raises `HomeError`."""
        mesh_file.begin_start(self.record, self.home)
        self._hosts = tuple(hosts)

    def done(self) -> None:
        """They are on the mesh's record from now on; to be cancelled still ends them."""
        mesh_file.end_start(self.home)

    def undo(self) -> tuple[int, dict[int, FluxmeshError]]:
        """Ends those that were started: (how many, the hosts where one may run on).

        Who ran before, and was not started anew, runs on, and stays on record; so does whom another
        `up` has found meanwhile.
        """
        hosts, self._hosts = self._hosts, ()
        hostfile = self.record.hostfile

        def stop(host: Host) -> str:
            answer = remote.ask(
                host,
                "stop",
                deadlines=UNDOING,
                ports=list(hostfile.control_ports(host.rank)),
                asker=self.asker,
            )
            return str(answer["endpoint"]) if answer["stopped"] else ""

        ended, errors = remote.each(hosts, stop)
        gone = {endpoint for endpoint in ended.values() if endpoint}
        mesh = mesh_file.load(self.home)
        if mesh is not None and gone:
            left = [member.rank for member in mesh.members if member.address not in gone]
            if left:
                mesh_file.save(mesh.only(left), self.home)
            else:
                mesh_file.remove(self.home)
        if not errors:
            mesh_file.end_start(self.home)
        return len(gone), errors


def end_left(
    record: StartRecord, keep: Collection[Place] = ()
) -> tuple[int, dict[int, FluxmeshError]]:
    """Ends what an `up` that was killed had started, but at the places `keep`.

    Returns how many agents ended, and the errors of hosts where one may run on, by rank.
    """
    hostfile = record.hostfile

    def stop(host: Host) -> bool:
        every = hostfile.control_ports(host.rank)
        ports = [port for port in every if place(host, port) not in keep]
        if not ports:
            return False
        return bool(remote.ask(host, "stop", deadlines=UNDOING, ports=ports)["stopped"])

    ended, errors = remote.each(hostfile.hosts, stop)
    return sum(ended.values()), errors


def place(host: Host, port: int) -> Place:
    """Where an agent is, in whichever hostfile its host stands."""
    return "" if host.is_local else host.ssh, port
