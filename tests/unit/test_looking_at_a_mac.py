"""What a Mac is found to be goes from the starter there to `doctor`'s table, and stops `up`."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fluxmesh.cluster import hostfile as hostfiles
from fluxmesh.cluster.hostfile import Host
from fluxmesh.cluster.snapshot import ModelVariant
from fluxmesh.errors import FluxmeshError
from fluxmesh.storage.homes import Home
from fluxmesh.storage.keys import Keys
from fluxmesh.version import __version__
from fluxmesh_coordinator.agents import bootstrap, macos, remote
from fluxmesh_coordinator.deploy import bringup
from fluxmesh_coordinator.deploy.bringup import Bringup, Wish
from tests.unit.test_checks import GOOD
from tests.unit.test_macos_checks import MAC
from tests.unit.test_macos_tools import a_mac
from tests.unit.test_warming import Told

CABLES = [
    {"ssh": "mac0", "ips": ["10.0.0.1"], "rdma": [None, "rdma_en2"], "control": "10.0.0.1:1"},
    {"ssh": "mac1", "ips": ["10.0.0.2"], "rdma": ["rdma_en2", None], "control": "10.0.0.2:1"},
]
HOSTS = json.dumps({"backend": "jaccl", "hosts": CABLES})


def test_the_starter_looks_at_a_mac_and_at_no_other_system(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "mac" not in bootstrap.look({}, print)
    words = {name: getattr(platform, name) for name in ("node", "machine", "python_version")}
    fake = SimpleNamespace(**{**words, "system": lambda: "Darwin"})
    collect = macos.collect
    monkeypatch.setattr(bootstrap, "platform", fake)
    monkeypatch.setattr(macos, "collect", lambda models: collect(models, a_mac))
    mac = bootstrap.look({"models": "/models"}, print)["mac"]
    assert (mac["version"], mac["paths"]["models"]) == ("26.2", "/models")


@pytest.fixture
def macs(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """What is found on each Mac beside `MAC`, by the name that ssh has for it."""
    differences: dict[str, dict[str, Any]] = {}

    def ask(host: Host, action: str, **_: Any) -> dict[str, Any]:
        assert action == "look"
        mac = {**MAC, **differences.get(host.name, {})}
        look = {**GOOD, "system": "Darwin arm64", "clock": time.time(), "mac": mac}
        return {**look, "ips": {}, "ends": False}

    monkeypatch.setattr(remote, "ask", ask)
    return differences


def test_doctor_tells_of_each_mac_what_is_wrong_there(macs: dict[str, dict[str, Any]]) -> None:
    macs["mac1"] = {"low_power": True, "rdma_state": "disabled"}
    findings = bringup.examine(hostfiles.parse(HOSTS), None)
    wrong = {
        (finding.rank, finding.check): finding.level
        for finding in findings
        if finding.level != "ok"
    }
    assert wrong == {(1, "power"): "warn", (1, "jaccl"): "fail"}
    assert (0, "jaccl") in {(finding.rank, finding.check) for finding in findings}


def test_up_leaves_a_mac_out_where_the_backend_cannot_be(
    macs: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    macs["mac1"] = {"low_power": True, "rdma_state": "disabled"}
    hosts, reporter = hostfiles.parse(HOSTS), Told()
    weights = ModelVariant("tiny", "bfloat16", None, ())
    for allowed in (False, True):
        wish = Wish(hosts, "mesh.json", HOSTS, weights, allow_partial=allowed)
        up = Bringup(wish, reporter, Home(tmp_path))
        if allowed:
            assert [host.rank for host in up._check(hosts.hosts, Keys.new(), ())[0]] == [0]
        else:
            with pytest.raises(FluxmeshError, match=r"host 1 \(mac1\), jaccl: RDMA is off"):
                up._check(hosts.hosts, Keys.new(), ())
    assert [note for note in reporter.notes if "Low Power Mode" in note]
    assert list(reporter.left_out) == [1]


@pytest.mark.parametrize("system", ["Darwin", "Linux"])
def test_what_macos_does_not_permit_is_told_as_such(system: str) -> None:
    path = "/Users/me/Documents/models/x.safetensors"
    code = (
        "import errno, platform\n"
        "from fluxmesh_coordinator.agents import bootstrap as starter\n"
        f"platform.system = lambda: {system!r}\n"
        "def look(request, tell):\n"
        f"    raise PermissionError(errno.EPERM, 'Operation not permitted', {path!r})\n"
        "starter.ACTIONS['look'] = look\n"
        "starter.main()\n"
    )
    request = {"action": "look", "version": __version__, "keep_ssh": False}
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(request) + "\n",
        capture_output=True,
        text=True,
        check=True,
    )
    error = json.loads(done.stdout)["error"]
    assert path in error
    assert ("Full Disk Access" in error) == (system == "Darwin")
