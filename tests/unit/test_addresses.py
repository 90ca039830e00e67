"""At which address an agent listens where the hostfile names none."""

from __future__ import annotations

from typing import Any

import pytest

from fluxmesh.errors import FluxmeshError
from fluxmesh_coordinator.agents.addresses import choose, reached_at, settled

OWN = {"192.168.1.5", "10.0.0.5", "169.254.7.7", "fe80::1", "fd00::5"}
SSH = {"SSH_CONNECTION": "192.168.1.2 50000 192.168.1.5 22"}


def chosen(reached: str, *known: str) -> str:
    return choose(reached, known, OWN.__contains__)


def test_ssh_tells_by_which_address_it_came() -> None:
    assert reached_at(SSH) == "192.168.1.5"
    assert reached_at({}) == reached_at({"SSH_CONNECTION": "?"}) == ""


def test_the_address_by_which_ssh_came_is_before_what_a_name_leads_to() -> None:
    assert chosen("192.168.1.5", "10.0.0.5") == "192.168.1.5"


def test_addresses_of_one_cable_alone_come_last_and_those_of_others_never() -> None:
    assert chosen("169.254.7.7", "8.8.8.8", "10.0.0.5") == "10.0.0.5"
    assert chosen("fe80::1%en0", "fd00::5") == "fd00::5"
    assert chosen("169.254.7.7") == "169.254.7.7"
    assert chosen("", "8.8.8.8") == chosen("", "mac1.local") == ""


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_CONNECTION", SSH["SSH_CONNECTION"])


def address(spec: dict[str, Any], running: str = "") -> Any:
    """Where an agent of `spec` listens on that host, where one at `running` may run."""
    record = {"endpoint": running} if running else None
    return settled(spec, record, OWN.__contains__)["address"]


def test_an_agent_that_runs_keeps_its_address_while_its_host_has_it(host: None) -> None:
    spec = {"address": "", "addresses": ["10.0.0.5"], "port": 47100, "memory": None}
    wanted = {"address": "192.168.1.5", "port": 47100, "memory": None}
    assert settled(spec, None, OWN.__contains__) == wanted
    assert address(spec, "10.0.0.5:47100") == "10.0.0.5"
    assert address(spec, "[fd00::5]:47100") == "fd00::5"
    assert address(spec, "10.0.0.9:47100") == "192.168.1.5"


def test_an_address_that_the_hostfile_names_is_that(host: None) -> None:
    spec = {"address": "10.0.0.9", "addresses": [], "port": 47100}
    assert address(spec, "10.0.0.5:47100") == "10.0.0.9"


def test_where_nothing_tells_an_address_the_hostfile_has_to(
    host: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSH_CONNECTION")
    with pytest.raises(FluxmeshError, match='give it as "control" in the hostfile'):
        address({"address": "", "addresses": ["8.8.8.8"], "port": 47100})
