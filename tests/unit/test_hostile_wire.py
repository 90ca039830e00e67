"""Attacks on the wire: a real socket before the real application, a few of every kind.

`tools/hostile_requests.py` sends thousands of them to a server of its own.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator
from random import Random

import pytest
import uvicorn

from fluxmesh_coordinator.server.guard.access import Access
from fluxmesh_coordinator.server.run import uvicorn_config
from tests.hostile_bodies import KINDS
from tests.hostile_wire import WireAttack, head, send
from tests.serving import Serving

A_KIND = 12  # attacks


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """Where the application listens, as `fluxmesh serve` has it listen."""
    serving = Serving(tmp_path_factory.mktemp("attacked"))
    config = uvicorn_config(serving.app(Access.of(None)), ())
    config.lifespan = "on"  # by which its line lives
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield listener.getsockname()[:2]
        server.should_exit = True
        thread.join(60)
    assert serving.lane.painted == []  # nothing of it was taken for a request
    assert serving.service.rows() == []


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_attack_is_refused_or_cut_off(
    address: tuple[str, int], kind: object, caplog: pytest.LogCaptureFixture
) -> None:
    dice = Random(getattr(kind, "__name__", ""))
    with caplog.at_level(logging.WARNING):
        for _ in range(A_KIND):
            attack: WireAttack = kind(dice)  # type: ignore[operator]
            statuses = send(address, attack)
            if not attack.is_harmless:
                assert all(400 <= status < 500 for status in statuses), (attack, statuses)
            assert not any(status >= 500 for status in statuses), (attack, statuses)
    assert send(
        address, WireAttack("good", (head("/healthz", "Connection: close", method="GET"),))
    ) == [200]
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []
