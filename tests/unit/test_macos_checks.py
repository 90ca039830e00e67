"""What is told of a Mac: each problem in one sentence, with its remedy."""

from __future__ import annotations

from typing import Any

import pytest

from fluxmesh.cluster.hostfile import Host
from fluxmesh_coordinator.deploy.checks import findings as checked
from fluxmesh_coordinator.deploy.macos_checks import findings
from tests.unit.test_checks import GOOD, NOW

GB = 1 << 30
HOME = "/Users/me"
MAC: dict[str, Any] = {
    "version": "26.2",
    "wheel": 26,
    "gpu": {
        "generation": 16,
        "name": "Apple M4 Pro",
        "recommended_bytes": 36 * GB,
        "jaccl": True,
    },
    "is_translated": False,
    "rdma_devices": ["rdma_en2", "rdma_en3"],
    "rdma_state": "enabled",
    "firewall": 0,
    "low_power": False,
    "battery": None,
    "bridge": {"members": [], "addresses": []},
    "thunderbolt": ["en2", "en3"],
    "wired_limit_mb": 0,
    "pressure": 1,
    "heat": 1,
    "crashes": [],
    "has_tools": True,
    "has_remote_login": True,
    "home": "/Users/me",
    "paths": {"fluxmesh": "/Users/me/fluxmesh", "Python": "/Users/me/fluxmesh/.venv"},
    "hidden": [],
    "identities": ["a", "a"],
}
M5 = {**MAC["gpu"], "generation": 17, "name": "Apple M5"}
HOST = Host(1, "mac1", rdma=(("rdma_en2",), None))


def problems(
    *, backend: str = "ring", host: Host = HOST, ips: tuple[str, ...] = (), **changed: Any
) -> dict[str, tuple[str, str]]:
    """{check: (level, text)} but for what is well."""
    look = {**GOOD, "memory_bytes": 48 * GB, "ips": dict.fromkeys(ips, True)}
    judged = findings(host, {**look, "mac": {**MAC, **changed}}, backend)
    assert {finding.rank for finding in judged} <= {host.rank}
    for finding in judged:
        assert "\n" not in finding.text and "  " not in finding.text
    return {
        finding.check: (finding.level, finding.text) for finding in judged if finding.level != "ok"
    }


def test_a_mac_that_is_well_and_one_of_which_nothing_is_known_have_nothing_to_tell() -> None:
    assert problems() == problems(backend="jaccl") == problems(gpu=M5) == {}
    kept = ("home", "paths", "hidden", "identities", "is_translated", "has_tools", "crashes")
    unknown = dict.fromkeys(key for key in MAC if key not in kept)
    assert problems(**unknown) == problems(backend="jaccl", **unknown) == {}


def test_another_system_has_none_of_these_checks() -> None:
    assert findings(HOST, GOOD, "jaccl") == []


@pytest.mark.parametrize(
    ("check", "level", "text", "changed"),
    [
        ("macOS", "fail", "install an arm64 one", {"is_translated": True}),
        ("neural accelerators", "warn", "update to 26.2", {"gpu": M5, "version": "26.1"}),
        ("neural accelerators", "warn", "update to 26.2", {"gpu": M5, "version": "15.7.1"}),
        ("neural accelerators", "warn", "--force-reinstall mlx", {"gpu": M5, "wheel": 14}),
        ("GPU memory", "warn", "iogpu.wired_limit_mb=45056", {"wired_limit_mb": 48 * 1024}),
        ("memory pressure", "warn", "end other programs", {"pressure": 2}),
        ("firewall", "warn", "Firewall > Options", {"firewall": 2}),
        ("power", "warn", "switch it off", {"low_power": True}),
        ("heat", "warn", "give it air", {"heat": 2}),
        ("crashes", "warn", "put a.ips, of ~/Library", {"crashes": ["a.ips"]}),
        ("crashes", "warn", "put b.ips and 2 more, of", {"crashes": ["b.ips", "c", "d"]}),
        ("power", "warn", "plug it in", {"battery": {"in_use": True, "percent": 70}}),
        ("power", "warn", "(7%, little is left)", {"battery": {"in_use": True, "percent": 7}}),
        ("files", "warn", "run chflags nohidden /a.pth /b.pth", {"hidden": ["/a.pth", "/b.pth"]}),
        ("files", "warn", "fluxmesh lies in ~/Desktop", {"paths": {"fluxmesh": f"{HOME}/Desktop"}}),
        ("files", "warn", "models lies in /Volumes/Big", {"paths": {"models": "/Volumes/Big/m"}}),
        ("Command Line Tools", "warn", "xcode-select --install", {"has_tools": False}),
        ("processes", "fail", "install a newer fluxmesh", {"identities": ["Thu", "Do"]}),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_alone_and_with_its_remedy(
    check: str, level: str, text: str, changed: dict[str, Any]
) -> None:
    wrong = problems(**changed)
    assert wrong.keys() == {check}
    assert wrong[check][0] == level and text in wrong[check][1]


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("needs macOS 26.2, and this is 15.6", {"version": "15.6", "wheel": 15}),
        ("built for macOS 15", {"wheel": 15, "gpu": {**MAC["gpu"], "jaccl": False}}),
        ("rdma_ctl enable", {"rdma_state": "disabled"}),
        ("there is no rdma_en2 (there is rdma_en3)", {"rdma_devices": ["rdma_en3"]}),
        ("there is no rdma_en2 (there is none)", {"rdma_devices": []}),
    ],
)
def test_jaccl_is_refused_before_an_engine_would_fail_and_rings_are_not(
    text: str, changed: dict[str, Any]
) -> None:
    for backend in ("jaccl", "jaccl-ring"):
        wrong = problems(backend=backend, **changed)
        assert wrong.keys() == {backend}
        assert wrong[backend][0] == "fail" and text in wrong[backend][1]
    assert problems(backend="ring", **changed) == {}


def test_an_m4_needs_no_wheel_for_accelerators_that_it_lacks() -> None:
    assert problems(version="14.7", wheel=14) == {}


def test_addresses_that_macos_made_up_or_that_belong_to_the_bridge() -> None:
    bridge = {"members": ["en2", "en3"], "addresses": ["192.168.2.1"]}
    assert problems(ips=("192.168.0.1",), bridge=bridge) == {}
    made_up = problems(ips=("169.254.20.7",))["ips"]
    of_bridge = problems(ips=("192.168.2.1",), bridge=bridge)["ips"]
    for level, text in (made_up, of_bridge):
        assert level == "warn" and "mlx.distributed_config --auto-setup" in text
    assert "169.254.20.7" in made_up[1] and "Bridge's" in of_bridge[1]


def test_a_bridge_is_in_the_way_of_rdma_alone() -> None:
    bridge = {"members": ["en2"], "addresses": []}
    assert problems(bridge=bridge) == {}
    assert problems(backend="jaccl", bridge=bridge).keys() == {"Thunderbolt Bridge"}
    assert problems(backend="jaccl", bridge={**bridge, "members": ["en3"]}) == {}


def test_who_comes_without_ssh_may_read_what_his_terminal_may() -> None:
    paths = {"fluxmesh": "/Users/me/Desktop/fluxmesh"}
    assert problems(host=Host(0, "127.0.0.1"), paths=paths) == {}


@pytest.mark.parametrize(
    ("path", "is_private"),
    [
        ("/Users/me/Library/Mobile Documents/com~apple~CloudDocs/f", True),
        ("/Users/me/Downloads/f", True),
        ("/Users/me/Documents2/f", False),
        ("/Users/you/Documents/f", False),
        ("/Volumes", False),
        ("/opt/fluxmesh", False),
    ],
)
def test_folders_that_are_private(path: str, is_private: bool) -> None:
    assert bool(problems(paths={"fluxmesh": path})) == is_private


def test_what_is_only_to_be_known_is_no_warning() -> None:
    look = {**GOOD, "mac": {**MAC, "firewall": 1, "has_remote_login": False, "gpu": M5}}
    judged = findings(Host(0, "127.0.0.1"), look, "ring")
    assert {finding.level for finding in judged} == {"ok"}
    checks = {finding.check for finding in judged}
    assert checks == {"macOS", "neural accelerators", "GPU memory", "firewall", "Remote Login"}
    (hint,) = (finding.text for finding in judged if finding.check == "firewall")
    assert f"socketfilterfw --add {GOOD['python']}" in hint


def test_a_full_disk_of_a_mac_is_told_with_what_finder_counts() -> None:
    full = {**GOOD, "disk_free_bytes": 10**8}
    texts = [
        next(finding.text for finding in checked(HOST, look, GOOD, NOW) if finding.check == "disk")
        for look in (full, {**full, "mac": MAC})
    ]
    assert ["Finder" in text for text in texts] == [False, True]
