"""Ports that tests give to processes which are started later."""

from __future__ import annotations

import multiprocessing
import socket
import tempfile
from pathlib import Path

import pytest

from tests import ports
from tests.ports import PORTS, free_ports


def test_processes_that_ask_at_once_are_given_ports_of_their_own() -> None:
    with multiprocessing.get_context("spawn").Pool(2) as processes:
        given = [port for ports in processes.map(free_ports, [5] * 4, 1) for port in ports]
    assert len(set(given)) == 20 and set(given) <= set(PORTS)


def test_a_port_that_somebody_has_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (port,) = free_ports(1)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # counting begins anew
    monkeypatch.setattr(ports, "PORTS", range(port, port + 60))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        assert port not in [*free_ports(20), *free_ports(20), *free_ports(20)]
    assert port in [*free_ports(20), *free_ports(20), *free_ports(20)]
