"""Whether an address and a port are to be had, on Linux and as BSD answers it; stopping."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from fluxmesh.errors import FluxmeshError
from fluxmesh.storage.homes import write_private
from fluxmesh.storage.processes import started_at
from fluxmesh_coordinator.agents import agent_here
from fluxmesh_coordinator.agents.bootstrap import can_bind


class Bsd(socket.socket):
    """Where SO_REUSEADDR lets one bind beside who listens at all addresses, as on macOS.

    Linux has that under another name, if both sockets ask for it.
    """

    def setsockopt(self, level: int, name: int, value: Any) -> None:  # type: ignore[override]
        beside = (level, name) == (socket.SOL_SOCKET, socket.SO_REUSEADDR)
        super().setsockopt(level, socket.SO_REUSEPORT if beside else name, value)


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> int:
    """A port at which somebody listens at all addresses."""
    monkeypatch.setattr(socket, "socket", Bsd)
    listener = Bsd(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("0.0.0.0", 0))
    listener.listen(1)
    port: int = listener.getsockname()[1]
    yield port
    listener.close()


def test_a_port_is_taken_where_somebody_listens_at_all_addresses(everywhere: int) -> None:
    with socket.socket() as beside:
        beside.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        beside.bind(("127.0.0.1", everywhere))  # it is as on a Mac: that proves nothing
    assert not can_bind("127.0.0.1", everywhere)


def test_a_port_is_taken_where_somebody_listens_at_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert not can_bind("127.0.0.1", port)
    assert can_bind("127.0.0.1", port)


def test_a_port_is_free_right_after_its_last_conversation() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            peer, _ = listener.accept()
            peer.close()  # first: its end of the connection lingers
    assert can_bind("127.0.0.1", port)


def test_an_address_of_another_machine_is_not_to_be_had() -> None:
    assert can_bind("127.0.0.1", 0)
    assert not can_bind("192.0.2.1", 0)
    assert not can_bind("192.0.2.1", 47100)


def test_who_stops_an_agent_is_told_of_an_engine_that_does_not_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLUXMESH_STATE", str(tmp_path))
    monkeypatch.setattr(agent_here, "kill_recorded", lambda path: None)
    agent = agent_here.Agent(47100)
    agent.remember({"pid": 1, "start": "another one"})  # it has ended
    here = {"pid": os.getpid(), "start": started_at(os.getpid())}
    write_private(agent.home.engine, json.dumps(here))
    with pytest.raises(FluxmeshError, match=rf"engine, process {os.getpid()}, does not end"):
        agent.stop()
    agent.remember({"pid": 1, "start": "another one"})
    agent.home.engine.unlink()
    assert not agent.stop()
