"""`tools/mac_check.sh` where there is no Mac: it runs, leaves out what it lacks, masks names."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mac import runs, until

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "mac_check.sh"


def script(*options: object, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, options)],
        env={**os.environ, **env},
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=250,
        check=False,
    )


def test_it_tells_its_options_and_refuses_others() -> None:
    usage = script("--help")
    assert usage.returncode == 0 and "--no-tests" in usage.stdout and "#" not in usage.stdout
    wrong = script("--no-such-thing")
    assert wrong.returncode == 2 and "--no-such-thing" in wrong.stderr


def function(name: str, text: str, **env: str) -> str:
    """What one of the script's functions makes of a text."""
    source = SCRIPT.read_text()
    functions = ""
    for each in ("mask", "literal", "limit", "awake"):
        begin = source.index(f"\n{each}() {{")
        functions += source[begin : source.index("\n}\n", begin) + 3]
    done = subprocess.run(
        ["bash", "-uc", f"{functions}\n{name}"],
        input=text,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_who_and_where_is_masked_and_nothing_else(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    said = {"hostname": "Annas-Mac.local", "scutil": "Anna's Mac [2]", "id": "anna"}
    for name, answer in said.items():
        (tools / name).write_text(f'#!/bin/sh\necho "{answer}"\n')
        (tools / name).chmod(0o755)
    text = (
        "/Users/anna/x Anna's Mac [2] Annas-Mac.local Annas-Mac /tmp/w/a anna annalena\n"
        "10.0.0.5:47100 192.168.1.17 127.0.0.1 26.2.0.1 0.32.4 36:5a:1b:0e:8c:40\n"
    )
    env = {"HOME": "/Users/anna", "PATH": f"{tools}:{os.environ['PATH']}", "work": "/tmp/w"}
    assert function("mask", text, **env) == (
        "HOME/x MACHINE MACHINE MACHINE TMP/a USER annalena\n"
        "ADDRESS:47100 ADDRESS 127.0.0.1 26.2.0.1 0.32.4 ADDRESS\n"
    )


def test_what_takes_too_long_is_ended_and_what_ends_has_its_own_code() -> None:
    assert function("limit 1 sleep 60; echo $?", "").endswith("124\n")
    assert function("limit 30 sh -c 'exit 3'; echo $?", "") == "3\n"


def test_what_takes_too_long_ends_with_all_that_it_has_started(tmp_path: Path) -> None:
    """A step is a function of the script: to end its shell alone would leave the program."""
    tell = f"sh -c 'echo $$ >>{tmp_path}/pids; exec sleep 60 >/dev/null 2>&1'"
    step = f"step() {{ {tell} & {tell}; }}; "

    assert function(f"{step}limit 3 step; echo $?", "").endswith("124\n")

    pids = [int(line) for line in (tmp_path / "pids").read_text().splitlines()]
    assert len(pids) == 2
    until(lambda: not any(map(runs, pids)))


@pytest.mark.parametrize("is_awake", [True, False])
def test_whether_anything_keeps_the_mac_awake_during_a_job(tmp_path: Path, is_awake: bool) -> None:
    assertion = (
        "   pid 501(caffeinate): [0x0001] 00:00:07 PreventUserIdleSystemSleep named: "
        '"caffeinate command-line tool"'
    )
    said = f"   PreventUserIdleSystemSleep    {int(is_awake)}\n" + assertion * is_awake
    pmset = tmp_path / "pmset"
    pmset.write_text(
        f"#!/bin/sh\nuntil [ -s {tmp_path}/pid ]; do sleep 0.1; done\ncat <<'END'\n{said}\nEND\n"
    )
    pmset.chmod(0o755)
    job = tmp_path / "python"
    job.write_text(f"#!/bin/sh\necho $$ >{tmp_path}/pid\nexec sleep 5\n")
    job.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "work": str(tmp_path), "python": str(job)}

    printed = function("awake", "", **env)

    assert not runs(int((tmp_path / "pid").read_text())), "the job was for this alone"
    assert printed.count("caffeinate command-line tool") == is_awake
    assert f"PreventUserIdleSystemSleep    {int(is_awake)}" in printed


def test_a_report_of_this_machine_has_no_name_in_it(tmp_path: Path) -> None:
    out = tmp_path / "report.txt"
    short = ("--no-tests", "--no-demo", "--no-mesh", "--no-measure")

    done = script(*short, "--out", out)

    assert done.returncode == 0, done.stderr
    report = out.read_text()
    assert report == done.stdout
    for title in ("This machine", "fluxmesh doctor", "One process under two languages"):
        assert f"### {title}" in report
    assert "(exit 0" in report and "Traceback" not in report
    for private in (platform.node(), str(Path.home()) + "/", str(ROOT)):
        assert private not in report


def measured(what: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-m", "tools.mac_measure", what, "--small"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
        check=True,
    )
    return done.stdout.splitlines()


def test_a_host_that_comes_late_is_waited_for_in_both_ways() -> None:
    lines = measured("late")
    ways = [re.fullmatch(r"the (\w+) waits: all is well after ([\d.]+) s", line) for line in lines]
    assert [way and way[1] for way in ways] == ["host", "graph"]
    assert all(way and float(way[2]) >= 1 for way in ways), "it came a second late"


def test_times_and_memory_are_told_by_dtype_and_by_bound() -> None:
    assert [line.split()[0] for line in measured("times")] == [
        f"mlx.core.{name}" for name in ("float16", "bfloat16", "float32")
    ]
    peaks = [float(line.split(": ")[1].split()[0]) for line in measured("decode")]
    assert len(peaks) == 3 and all(peak >= 0 for peak in peaks)
