"""A link is measured by those who know its token, and by nobody else."""

from __future__ import annotations

import asyncio
import socket
import time
from dataclasses import replace

import pytest

from fluxmesh.deadlines import DEADLINES
from fluxmesh.errors import FluxmeshError, UsageError
from fluxmesh.wire.messages import LinkRate
from fluxmesh.wire.transport import ports
from fluxmesh_agent import links


def test_a_probe_that_knows_the_token_measures_the_link() -> None:
    async def scene() -> LinkRate:
        port = links.listen("127.0.0.1", b"token")
        return await links.probe("127.0.0.1", port, b"token", 8 << 20)

    def is_loopback(rate: LinkRate) -> bool:
        return 1e7 < rate.rate < 1e12 and 0 < rate.latency < 0.1

    assert any(is_loopback(asyncio.run(scene())) for _ in range(20))  # a busy machine may be slow


def test_a_stranger_is_refused_and_the_port_stays_for_the_one_who_is_awaited() -> None:
    async def scene() -> LinkRate:
        port = links.listen("127.0.0.1", b"token")
        with pytest.raises(FluxmeshError, match="can't be measured"):
            await links.probe("127.0.0.1", port, b"other", 1000)
        return await links.probe("127.0.0.1", port, b"token", 1000)

    assert asyncio.run(scene()).rate > 0


def test_where_nobody_listens_there_is_no_rate() -> None:
    (port,) = links.free_ports("127.0.0.1", 1)
    with pytest.raises(FluxmeshError, match="can't be measured"):
        asyncio.run(links.probe("127.0.0.1", port, b"token", 1000))


def test_where_packets_are_lost_without_a_word_the_probe_ends_soon() -> None:
    """As between two hosts of a thunderbolt ring that no cable joins."""
    soon = replace(DEADLINES, link_connect=0.3)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        address = server.getsockname()
        with socket.create_connection(address):  # the line is full: nobody else is answered
            start = time.monotonic()
            with pytest.raises(FluxmeshError, match="can't be measured"):
                asyncio.run(links.probe(*address, b"token", 1000, soon))
            assert time.monotonic() - start < 30  # the system tries for minutes


def test_a_probe_has_a_limit() -> None:
    with pytest.raises(UsageError, match="A probe sends"):
        asyncio.run(links.probe("127.0.0.1", 1, b"token", links.LIMIT + 1))


def test_free_ports_are_different_and_can_be_bound() -> None:
    given = links.free_ports("127.0.0.1", 8)
    assert len(set(given)) == 8 and set(given) <= set(ports.PORTS)
    for port in given:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", port))


@pytest.mark.parametrize("ip", ["192.0.2.1", "0.0.0.0", "::", "localhost", ""])
def test_an_address_that_is_not_one_of_this_host_is_refused(ip: str) -> None:
    with pytest.raises(UsageError, match="not an address of this host"):
        links.free_ports(ip, 1)
    with pytest.raises(UsageError, match="not an address of this host"):
        links.listen(ip, b"token")


def test_ports_that_others_have_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        used, other = taken.getsockname()[1], links.free_ports("127.0.0.1", 1)[0]
        monkeypatch.setattr(ports.random, "sample", lambda ports, count: [used, other])
        assert links.free_ports("127.0.0.1", 1) == (other,)
        monkeypatch.setattr(ports.random, "sample", lambda ports, count: [used])
        assert links.free_ports("127.0.0.1", 1)[0] not in (used, 0)
