"""What `up` and `doctor` make of what a host says of itself."""

from __future__ import annotations

from typing import Any

import pytest

from fluxmesh.cluster.hostfile import Host
from fluxmesh_coordinator.deploy.checks import findings, reference

NOW = 1_000_000.0
GOOD: dict[str, Any] = {
    "version": "0.1.0",
    "python": "/opt/venv/bin/python",
    "python_version": "3.12.4",
    "mlx_version": "0.32.4",
    "system": "Linux x86_64",
    "memory_bytes": 192 * 10**9,
    "disk_free_bytes": 10**12,
    "clock": NOW,
    "model": {"revision": "abc", "content": "1234", "bytes": 34 * 10**9},
    "ips": {"192.168.0.1": True},
    "control": {"endpoint": "192.168.0.1:47100", "free": True},
    "agent": None,
}


def levels(**changed: Any) -> dict[str, str]:
    judged = findings(Host(1, "mac1"), {**GOOD, **changed}, GOOD, NOW)
    assert {finding.rank for finding in judged} == {1}
    return {finding.check: finding.level for finding in judged}


def text(check: str, **changed: Any) -> str:
    judged = findings(Host(1, "mac1"), {**GOOD, **changed}, GOOD, NOW)
    return next(finding.text for finding in judged if finding.check == check)


def test_a_host_like_this_machine_is_well() -> None:
    assert set(levels().values()) == {"ok"}
    assert set(levels()) == {"Python", "MLX", "memory", "disk", "clock", "ips", "control", "model"}


@pytest.mark.parametrize(
    ("check", "level", "changed", "sentence"),
    [
        ("Python", "fail", {"python_version": "3.9.6"}, "3.9.6 is too old"),
        ("MLX", "fail", {"mlx_version": ""}, "pip install mlx"),
        (
            "MLX",
            "fail",
            {"mlx_problem": "ImportError: libmlx.so: cannot open shared object file"},
            '-m pip install "fluxmesh[cpu]", or "fluxmesh[cuda]" where',
        ),
        ("MLX", "warn", {"mlx_version": "0.33.0"}, "0.33.0 there and 0.32.4 here"),
        ("disk", "warn", {"disk_free_bytes": 10**8}, "make room"),
        ("clock", "warn", {"clock": NOW - 90}, "90 s behind"),
        ("clock", "warn", {"clock": NOW + 7}, "7 s ahead"),
        ("ips", "fail", {"ips": {"192.168.0.9": False}}, "192.168.0.9 is no address"),
        ("control", "fail", {"control": {"endpoint": "1.2.3.4:5", "free": False}}, "1.2.3.4:5"),
        ("model", "fail", {"model": {"problem": "It is not here."}}, "It is not here."),
        (
            "model",
            "fail",
            {"model": {"revision": "xyz", "content": "99", "bytes": 1}},
            "other files there than here (revision xyz, here abc)",
        ),
    ],
)
def test_what_is_wrong_is_told_with_its_remedy(
    check: str, level: str, changed: dict[str, Any], sentence: str
) -> None:
    others = {name: other_level for name, other_level in levels(**changed).items() if name != check}
    assert set(others.values()) == {"ok"}
    assert levels(**changed)[check] == level
    assert sentence in text(check, **changed)


def test_a_port_that_its_own_agent_holds_is_not_taken() -> None:
    taken = {"endpoint": "192.168.0.1:47100", "free": False}
    agent = {"endpoint": "192.168.0.1:47100", "version": "0.1.0"}
    assert levels(control=taken, agent=agent)["control"] == "ok"


def test_the_same_files_under_another_revision_are_the_same_model() -> None:
    copied = {"revision": "local-77", "content": "1234", "bytes": 34 * 10**9}
    assert levels(model=copied)["model"] == "ok"


def test_where_this_machine_lacks_the_model_hosts_are_compared_with_the_first_that_has_it() -> None:
    here = {**GOOD, "model": {"problem": "It is not here."}}
    looks = {
        0: here,
        1: GOOD,
        2: {**GOOD, "model": {"revision": "xyz", "content": "99", "bytes": 1}},
    }
    model = reference(here, looks)
    (failure,) = [
        finding
        for rank in (1, 2)
        for finding in findings(Host(rank, f"mac{rank}"), looks[rank], here, NOW, model)
        if finding.level == "fail"
    ]
    assert failure.rank == 2 and "than on host 1 (revision xyz, on host 1 abc)" in failure.text
    assert reference(here, {0: here}).model == {}
