"""What macOS's tools print, of several versions and in two languages, becomes values."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from fluxmesh.deadlines import DEADLINES
from fluxmesh_coordinator.agents import macos
from fluxmesh_coordinator.agents import macos_tools as tools

WHEEL = """\
Wheel-Version: 1.0
Generator: setuptools (80.9.0)
Root-Is-Purelib: false
Tag: py3-none-macosx_{}_0_arm64

"""

PMSET_14 = """\
System-wide power settings:
Currently in use:
 standby              1
 Sleep On Power Button 1
 hibernatefile        /var/vm/sleepimage
 powernap             1
 networkoversleep     0
 disksleep            10
 sleep                1 (sleep prevented by powerd, coreaudiod)
 hibernatemode        3
 ttyskeepawake        1
 displaysleep         2
 tcpkeepalive         1
 lowpowermode         {}
 womp                 1
"""
PMSET_26 = PMSET_14.replace("lowpowermode         {}", "powermode            {}")

PLUGGED = """\
Now drawing from 'AC Power'
 -InternalBattery-0 (id=23134307)\t80%; AC attached; not charging present: true
"""
UNPLUGGED = """\
Now drawing from 'Battery Power'
 -InternalBattery-0 (id=23134307)\t17%; discharging; 2:11 remaining present: true
"""
DESKTOP = "Now drawing from 'AC Power'\n"
# A UPS on a desktop is no battery of the Mac's own.
UPS = "Now drawing from 'AC Power'\n -Back-UPS ES 700G (id=31)\t100%; charging present: true\n"

BRIDGE = """\
bridge0: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500
\toptions=63<RXCSUM,TXCSUM,TSO4,TSO6>
\tether 36:5a:1b:0e:8c:40
\tinet 169.254.20.7 netmask 0xffff0000 broadcast 169.254.255.255
\tConfiguration:
\t\tid 0:0:0:0:0:0 priority 0 hellotime 0 fwddelay 0
\t\tmaxage 0 holdcnt 0 proto stp maxaddr 100 timeout 1200
\tmember: en1 flags=3<LEARNING,DISCOVER>
\t        ifmaxaddr 0 port 8 priority 0 path cost 0
\tmember: en2 flags=3<LEARNING,DISCOVER>
\t        ifmaxaddr 0 port 9 priority 0 path cost 0
\tnd6 options=201<PERFORMNUD,DAD>
\tmedia: <unknown type>
\tstatus: inactive
"""

# The words before the colon stay English; names of ports follow the language of the system.
PORTS = """\

Hardware Port: Ethernet
Device: en0
Ethernet Address: 1c:f6:4c:00:00:01

Hardware Port: Thunderbolt 1
Device: en1
Ethernet Address: 36:5a:1b:0e:8c:40

Hardware Port: Thunderbolt 2
Device: en2
Ethernet Address: 36:5a:1b:0e:8c:44

Hardware Port: {bridge}
Device: bridge0
Ethernet Address: 36:5a:1b:0e:8c:40

Hardware Port: Wi-Fi
Device: en5
Ethernet Address: 1c:f6:4c:00:00:02

VLAN Configurations
===================
"""

IBV = """\
    device          \t   node GUID
    ------          \t----------------
    rdma_en2        \t8096a9d9edbaac05
    rdma_en3        \t8196a9d9edbaac05
"""

DEVICE: dict[str, Any] = {
    "architecture": "applegpu_g17s",
    "device_name": "Apple M5 Max",
    "max_buffer_length": 86586540032,
    "max_recommended_working_set_size": 115448725504,
    "memory_size": 137438953472,
    "resource_limit": 499000,
    "jaccl": True,
}


@pytest.mark.parametrize("text", ["14.7.6\n", "15.5\n", "26.2\n", "27.0\n"])
def test_versions(text: str) -> None:
    assert tools.version(text) == text.strip()


@pytest.mark.parametrize("target", [14, 15, 26])
def test_the_macos_that_a_wheel_was_built_for(target: int) -> None:
    assert tools.wheel_target(WHEEL.format(target)) == target
    assert tools.wheel_target("Tag: cp313-cp313-manylinux_2_35_x86_64\n") is None


def test_the_gpu_and_what_the_mlx_there_can_do() -> None:
    assert tools.gpu(f"a warning\n{json.dumps(DEVICE)}\n") == {
        "generation": 17,
        "name": "Apple M5 Max",
        "recommended_bytes": 115448725504,
        "jaccl": True,
    }
    older = tools.gpu(json.dumps({**DEVICE, "architecture": "applegpu_g13g"}))
    assert older is not None and older["generation"] == 13


def test_rdma() -> None:
    assert tools.rdma_devices(IBV) == ["rdma_en2", "rdma_en3"]
    assert tools.rdma_devices("\n".join(IBV.splitlines()[:2])) == []
    assert tools.rdma_state("enabled\n") == "enabled"
    assert tools.rdma_state("RDMA is Disabled.\n") == "disabled"


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ("Firewall is disabled. (State = 0)\n", 0),
        ("Firewall is enabled. (State = 1)\n", 1),
        ("Firewall is blocking all non-essential incoming connections. (State = 2)\n", 2),
        ("Die Firewall ist aktiviert. (State = 1)\n", 1),
    ],
)
def test_the_firewall(text: str, state: int) -> None:
    assert tools.firewall(text) == state


@pytest.mark.parametrize("form", [PMSET_14, PMSET_26])
def test_low_power_mode_by_both_its_names(form: str) -> None:
    assert tools.low_power(form.format(1)) is True
    assert tools.low_power(form.format(0)) is False
    assert tools.low_power(form.format(2)) is False  # high power
    assert tools.low_power(" sleep                1\n") is None


def test_heat() -> None:
    assert [tools.heat(f"{tools.HEAT} {level}\n") for level in range(5)] == [0, 1, 2, 3, 4]
    assert tools.heat("com.apple.system.other 3\n") is None


def test_the_battery() -> None:
    assert tools.battery(PLUGGED) == {"in_use": False, "percent": 80}
    assert tools.battery(UNPLUGGED) == {"in_use": True, "percent": 17}
    assert tools.battery(DESKTOP) is None
    assert tools.battery(UPS) is None


def test_the_bridge_of_the_thunderbolt_ports() -> None:
    assert tools.bridge(BRIDGE) == {"members": ["en1", "en2"], "addresses": ["169.254.20.7"]}


@pytest.mark.parametrize("bridge", ["Thunderbolt Bridge", "Thunderbolt-Bridge"])
def test_single_thunderbolt_ports_in_english_and_german(bridge: str) -> None:
    assert tools.thunderbolt_ports(PORTS.format(bridge=bridge)) == ["en1", "en2"]


@pytest.mark.parametrize("text", ["", "usage: what", "\x00\xff", "{}", "[]", "null"])
def test_what_no_tool_prints_is_nothing_and_no_error(text: str) -> None:
    for parse in (tools.version, tools.wheel_target, tools.gpu, tools.rdma_state, tools.firewall):
        assert parse(text) is None
    for parse in (tools.low_power, tools.heat, tools.battery, tools.number):
        assert parse(text) is None
    assert tools.rdma_devices(text) == tools.thunderbolt_ports(text) == []
    assert tools.bridge(text) == {"members": [], "addresses": []}


OUTPUTS = {
    "sw_vers": "26.2\n",
    "ibv_devices": IBV,
    "rdma_ctl": "enabled\n",
    "socketfilterfw": "Firewall is enabled. (State = 1)\n",
    "ifconfig": BRIDGE,
    "networksetup": PORTS.format(bridge="Thunderbolt Bridge"),
    "xcode-select": "/Library/Developer/CommandLineTools\n",
    "nc": "",
    "notifyutil": f"{tools.HEAT} 0\n",
}
SYSCTL = {
    "iogpu.wired_limit_mb": "0\n",
    "kern.memorystatus_vm_pressure_level": "1\n",
    "sysctl.proc_translated": "0\n",
}


def a_mac(*command: str, seconds: float = 0.0, env: Any = None) -> str | None:
    name = os.path.basename(command[0])
    if name == "pmset":
        return UNPLUGGED if "batt" in command else PMSET_26.format(0)
    if name == "sysctl":
        return SYSCTL[command[2]]
    if "-c" in command:
        return json.dumps(DEVICE) if "mlx" in command[2] else "Thu Nov 12 07:05:01 2026\n"
    return OUTPUTS[name]


def test_a_look_at_a_mac_asks_system_tools_by_their_paths() -> None:
    asked: list[str] = []

    def run(*command: str, **more: Any) -> str | None:
        asked.append(command[0])
        return a_mac(*command, **more)

    mac = macos.collect("~/models", run)

    assert all(os.path.isabs(path) for path in asked)
    assert json.loads(json.dumps(mac)) == mac
    assert mac["version"] == "26.2" and mac["gpu"]["generation"] == 17
    assert mac["firewall"] == 1 and mac["battery"]["in_use"] and mac["low_power"] is False
    assert mac["bridge"]["members"] == mac["thunderbolt"] == ["en1", "en2"]
    assert (mac["has_tools"], mac["has_remote_login"]) == (True, True)
    assert (mac["wired_limit_mb"], mac["pressure"], mac["is_translated"]) == (0, 1, False)
    assert mac["heat"] == 0
    assert mac["paths"]["models"] == str(Path.home().resolve() / "models")
    assert len(set(mac["identities"])) == 1


def test_a_mac_without_any_of_the_tools_is_looked_at_without_an_error() -> None:
    mac = macos.collect(None, lambda *command, **more: None)
    known = {key for key, value in mac.items() if value not in (None, False, [], [None, None])}
    assert known == {"home", "paths"}


def test_tools_that_all_hang_are_given_up_before_who_asks_gives_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a Mac that swaps."""
    now = [0.0]

    def hang(*command: str, seconds: float = DEADLINES.tool, **_: Any) -> None:
        assert seconds > 0
        now[0] += seconds

    monkeypatch.setattr(macos.time, "monotonic", lambda: now[0])
    mac = macos.collect(None, hang)
    assert mac["gpu"] is None and mac["identities"] == [None, None]
    assert DEADLINES.tools == now[0] < DEADLINES.ask_look


def test_crash_reports_of_python_of_the_last_day_are_named(tmp_path: Path) -> None:
    ages = {"python3.13-a.ips": 60, "Python-b.ips": 3600, "python3-c.ips": 90_000, "Finder.ips": 9}
    for name, age in ages.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (10**9 - age, 10**9 - age))
    assert macos.crashes(tmp_path, 1e9) == ["python3.13-a.ips", "Python-b.ips"]
    assert macos.crashes(tmp_path / "none", 1e9) == []


def test_a_tool_that_is_missing_fails_or_hangs_says_nothing(tmp_path: Path) -> None:
    assert macos.run("/no/such/tool") is None
    assert macos.run("/bin/sh", "-c", "echo half; exit 3") is None
    assert macos.run("/bin/sh", "-c", "sleep 30", seconds=0.1) is None
    assert macos.run("/bin/sh", "-c", "printf 'a\\377b'") == "a\ufffdb"


def test_tools_speak_english_whatever_the_user_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    assert macos.run("/bin/sh", "-c", "echo $LC_ALL") == "C\n"


def test_this_process_is_the_same_in_another_language_and_time_zone() -> None:
    first, second = macos.identities(macos.run)
    assert first == second and first not in (None, "None\n")


def test_hidden_pth_files_are_found_by_their_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "seen.pth").touch()
    (tmp_path / "_hidden.pth").touch()
    (tmp_path / "dangling.pth").symlink_to("nowhere")
    assert macos.hidden_files(tmp_path) == []
    hidden = 0x40 | stat.UF_HIDDEN
    monkeypatch.setattr(macos, "flags", lambda path: hidden if path.name[0] == "_" else 0x40)
    assert macos.hidden_files(tmp_path) == [str(tmp_path / "_hidden.pth")]
