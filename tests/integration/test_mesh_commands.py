"""`up`, `status`, `plan`, `logs`, `doctor` and `down`, with real agents and engines on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fluxmesh.kernels.ops import device
from fluxmesh.planning.workload import ModelSizes, Workload
from fluxmesh.request import GenerateRequest
from fluxmesh.storage.processes import started_at
from fluxmesh.weights import hub
from fluxmesh_coordinator.agents.launch import start_ephemeral
from fluxmesh_coordinator.agents.status import survey
from tests.checkpoints import make_checkpoint
from tests.flux2_checkpoint import make_flux2
from tests.integration.conftest import FinishedProcess, environment
from tests.parallel.cases import LARGE
from tests.ports import free_ports
from tests.processes import wait_until_gone


class MeshMachine:
    """One user's `fluxmesh`, with folders of its own."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        own = {name: str(folder / name.lower()) for name in ("FLUXMESH_HOME", "FLUXMESH_STATE")}
        self.env = environment(folder) | own

    def __call__(self, *arguments: object, **more: Any) -> FinishedProcess:
        done = subprocess.run(
            [sys.executable, "-m", "fluxmesh_coordinator", *map(str, arguments)],
            env=self.env,
            cwd=self.folder,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=200,
            check=False,
            **more,
        )
        return FinishedProcess(done.returncode, done.stdout, done.stderr)

    def hostfile(self, agents: int, **keys: Any) -> Path:
        """A hostfile of so many agents at free ports."""
        hosts = [
            {"ssh": "127.0.0.1", "ips": ["127.0.0.1"], "control": f"127.0.0.1:{port}", **keys}
            for port in free_ports(agents)
        ]
        path = self.folder / "mesh.json"
        path.write_text(json.dumps(hosts))
        return path

    def up(self, *arguments: object) -> FinishedProcess:
        done = self("up", *arguments, "--model", self.model, "--json")
        assert done.code == 0, done.err
        return done

    def hosts(self) -> list[dict[str, Any]]:
        hosts: list[dict[str, Any]] = self("status", "--json").of("status")[0]["hosts"]
        return hosts


@pytest.fixture
def machine(tmp_path: Path, checkpoint: Path) -> Iterator[MeshMachine]:
    machine = MeshMachine(tmp_path, checkpoint)  # its pictures are 32x32: quick to time
    yield machine
    machine("down", "--force")


def processes(hosts: list[dict[str, Any]]) -> list[int]:
    return [host[key] for host in hosts for key in ("pid", "engine_pid")]


def test_a_mesh_comes_up_is_found_changed_and_goes_down_without_a_trace(
    machine: MeshMachine,
) -> None:
    done = machine.up(machine.hostfile(2))
    first = done.of("up")[0]["hosts"]
    assert {host["holds"]["weights"]["model"] for host in first} == {str(machine.model)}
    assert [len(host["measured"]) for host in first] == [1, 0]  # one device is timed once
    assert {(link["source"], link["target"]) for link in done.of("up")[0]["links"]} == {
        (0, 1),
        (1, 0),
    }
    assert {line["host"] for line in done.of("progress")} == {0, 1}

    again = machine.up(machine.folder / "mesh.json")
    stages = [line["text"] for line in again.of("stage")]
    assert stages == ["Looking at the hosts", "Starting agents"]
    second = again.of("up")[0]["hosts"]
    assert processes(second) == processes(first)

    plan = machine("plan", "-n", 2, "--json").of("plan")[0]
    assert {option["name"] for option in plan["options"]} == {"data", "sequence", "tensor", "mixed"}
    assert [host["rank"] for host in plan["hosts"]] == [0, 1]
    assert all(option["measured"] for option in plan["options"])

    hosts = json.loads((machine.folder / "mesh.json").read_text())
    (machine.folder / "mesh.json").write_text(json.dumps(hosts[1:]))
    changed = machine.up(machine.folder / "mesh.json").of("up")[0]["hosts"]
    assert processes(changed) == processes(first)[2:]
    wait_until_gone(processes(first)[:2])

    doctor = machine("doctor", "--json")
    assert doctor.code == 0, doctor.out
    checks = {(line["rank"], line["check"]): line["level"] for line in doctor.of("check")}
    assert checks[0, "agent"] == checks[0, "control"] == checks[-1, "keys"] == "ok"

    lines = machine("logs", "0", "-n", 500).out
    assert "listens at 127.0.0.1" in lines
    assert "a red" not in lines

    down = machine("down")
    assert (down.code, down.out) == (0, "The mesh is down: 1 agent ended.\n")
    wait_until_gone(processes(changed))
    assert not (machine.folder / "fluxmesh_home" / "mesh.json").exists()
    assert machine("down").out == "No mesh is up; `fluxmesh up` starts one.\n"


def test_a_mesh_of_this_machine_needs_no_hostfile(machine: MeshMachine) -> None:
    (host,) = machine.up().of("up")[0]["hosts"]
    address, _, port = host["address"].rpartition(":")
    assert host["answers"] and address == "127.0.0.1"
    assert int(port) in range(47100, 47200)  # the first one that nobody has
    assert machine.up().of("up")[0]["hosts"][0]["pid"] == host["pid"]
    table = machine("status").out
    assert " bfloat16 " in table and " ready " in table
    for name in ("fluxmesh_home", "fluxmesh_state"):
        for path in [machine.folder / name, *(machine.folder / name).rglob("*.key")]:
            assert path.stat().st_mode & 0o077 == 0, path


def test_a_model_too_large_for_each_host_is_loaded_in_shards(machine: MeshMachine) -> None:
    # Its pictures are 32x32: next to its transformer, what a decode takes is nothing.
    machine.model = make_checkpoint(
        machine.folder / "large", transformer=LARGE, dtype="bfloat16"
    ).path
    sizes = ModelSizes.of(hub.resolve(str(machine.model)))
    request = GenerateRequest("", 0, str(machine.model))
    work = Workload.of(sizes.fill(request), sizes)
    needs = [max(work.memory("tensor", 2, shards, device())) for shards in (1, 2)]
    done = machine.up(machine.hostfile(2, memory=sum(needs) // 2))
    hosts = done.of("up")[0]["hosts"]
    assert [(host["holds"]["shard"], host["holds"]["shards"]) for host in hosts] == [(0, 2), (1, 2)]
    whole = machine("plan", "--json").of("plan")[0]
    winner = whole["options"][whole["winner"]]
    assert (winner["name"], winner["phases"][0]["layout"]) == ("tensor", "sharded")
    (warmed,) = done.of("warmed")
    assert (warmed["placement"], warmed["hosts"]) == ("tensor", [0, 1])
    assert {shape["hosts"] for host in hosts for shape in host["compiled"]} == {2}

    timed = [timing for host in hosts for timing in host["measured"]]
    assert [(timing["placement"], timing["hosts"]) for timing in timed] == [("tensor", 2)] * 2
    slowest = max(timing["step_seconds"] for timing in timed)
    assert winner["phases"][0]["step_seconds"] == slowest and winner["measured"]
    assert {host["counters"]["sent_bytes"] > 0 for host in hosts} == {True}
    assert re.search(r"\d+x\d+ on 2\b", machine("status").out)
    again = machine.up(machine.folder / "mesh.json")
    assert "Timing a step" not in [line["text"] for line in again.of("stage")]
    painted = machine("generate", "a red apple", "--model", machine.model, "--steps", 1, "-v")
    assert painted.code == 0, painted.err
    assert [host["ring_generation"] for host in machine.hosts()] == [
        host["ring_generation"] for host in hosts
    ]


def test_up_without_a_model_loads_the_best_that_is_here(machine: MeshMachine) -> None:
    repo = machine.folder / "hub" / "hub" / "models--black-forest-labs--FLUX.2-klein-4B"
    make_flux2(repo / "snapshots" / "0123456")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123456")
    done = machine("up", "--no-warm", "--json")
    assert done.code == 0, done.err
    assert any(line["text"].startswith("klein-4b is the best") for line in done.of("note"))
    (host,) = machine.hosts()
    assert host["holds"]["weights"]["model"] == "klein-4b"


def test_a_host_that_fails_is_named_and_the_rest_can_go_on(machine: MeshMachine) -> None:
    path = machine.hostfile(3)
    port = json.loads(path.read_text())[1]["control"].rpartition(":")[2]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(port)))
        taken.listen()
        whole = machine("up", path, "--model", machine.model)
        assert whole.code == 1
        assert f"host 1 (127.0.0.1), control: 127.0.0.1:{port} is taken" in whole.err
        assert "--allow-partial goes on without" in whole.err and "Traceback" not in whole.err

        partial = machine.up(path, "--allow-partial")
        assert [line["host"] for line in partial.of("left_out")] == [1]
        assert [host["rank"] for host in partial.of("up")[0]["hosts"]] == [0, 2]
        doctor = machine("doctor", path)
        assert doctor.code == 1 and "FAILS" in doctor.out


def test_a_dead_agent_is_told_and_up_brings_it_back_with_its_key(machine: MeshMachine) -> None:
    path = machine.hostfile(2)
    before = machine.up(path).of("up")[0]["hosts"]
    record = json.loads((machine.folder / "fluxmesh_home" / "mesh.json").read_text())
    os.kill(before[1]["pid"], signal.SIGKILL)
    wait_until_gone(processes(before)[2:])

    dead = machine("status", "--json")
    assert dead.code == 0
    assert [host["answers"] for host in dead.of("status")[0]["hosts"]] == [True, False]
    assert "host 1 (127.0.0.1): Nobody listens" in dead.of("status")[0]["hosts"][1]["reason"]

    after = machine.up(path).of("up")[0]["hosts"]
    assert after[0]["pid"] == before[0]["pid"] and after[0]["holds"]  # its engine joins a new ring
    assert after[1]["pid"] != before[1]["pid"] and after[1]["holds"]
    kept = json.loads((machine.folder / "fluxmesh_home" / "mesh.json").read_text())
    assert [each["key"] for each in kept["members"]] == [each["key"] for each in record["members"]]


def test_another_user_joins_a_mesh_and_changes_nothing_of_it(machine: MeshMachine) -> None:
    path = machine.hostfile(1)
    (before,) = machine.up(path).of("up")[0]["hosts"]
    other = MeshMachine(machine.folder, machine.model)
    other.env = machine.env | {"FLUXMESH_HOME": str(machine.folder / "other")}

    joined = other.up(path, "--env", "FLUXMESH_TEST=5")

    (after,) = joined.of("up")[0]["hosts"]
    assert processes([after]) == processes([before])
    (note,) = [line["text"] for line in joined.of("note")]
    assert note.startswith("Host 0 keeps the settings of ")
    assert [host["answers"] for host in machine.hosts()] == [True]
    changed = machine.up(path, "--env", "FLUXMESH_TEST=5").of("up")[0]["hosts"][0]
    assert changed["pid"] != before["pid"]
    assert [host["answers"] for host in other.hosts()] == [True]  # its key is still known


def test_down_ends_agents_and_engines_that_hang(machine: MeshMachine) -> None:
    (host,) = machine.up(machine.hostfile(1)).of("up")[0]["hosts"]
    for key in ("pid", "engine_pid"):
        os.kill(host[key], signal.SIGSTOP)

    done = machine("down", "--force")

    assert done.code == 0, done.err
    wait_until_gone(processes([host]))


# A job of tiny steps that follow at once keeps two processors busy by itself, and where others want
# them too it is taken for hung, and moves to another host. One that waits costs no time.
PACED = {"FLUXMESH_DELAYS": "step=0.2"}  # of engines, for the environment of `up`


@contextlib.contextmanager
def long_job(machine: MeshMachine) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A `generate` that would go on for long, and its name, once the first host works on it.

    The mesh came up with `PACED`.
    """
    command = ["generate", "a red apple", "--model", machine.model, "--steps", 1000, "-n", 50]
    with subprocess.Popen(
        [sys.executable, "-m", "fluxmesh_coordinator", *map(str, command)],
        env=machine.env,
        cwd=machine.folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as painting:
        try:
            deadline = time.monotonic() + 120
            while (host := machine.hosts()[0])["state"] != "busy":
                assert time.monotonic() < deadline and painting.poll() is None
            yield painting, host["job"]
        finally:
            painting.kill()


def test_up_that_would_end_agents_of_a_job_has_to_be_forced(machine: MeshMachine) -> None:
    path = machine.hostfile(2)
    machine.env |= PACED
    before = machine.up(path).of("up")[0]["hosts"]
    entries = json.loads(path.read_text())
    with long_job(machine) as (painting, job):
        lease = machine.hosts()[0]["lease"]
        title = f"{lease['title']} ({lease['user']})"
        why = f"Host 0 works on {title}; wait until it is done, or use --force.\n"
        path.write_text(json.dumps(entries[1:]))
        for command in (("up", path), ("up", path, "--rotate-keys")):
            refused = machine(*command, "--model", machine.model)
            assert refused.code == 1 and refused.err.endswith(f"would end agents. {why}")
        path.write_text(json.dumps(entries))
        changed = machine("up", path, "--model", machine.model, "--env", "FLUXMESH_TEST=5")
        assert changed.code == 1 and changed.err.endswith(f"would end agents. {why}")
        assert machine.hosts()[0]["job"] == job
        assert processes(machine.hosts()) == processes(before)

        path.write_text(json.dumps(entries[1:]))
        forced = subprocess.Popen(
            [sys.executable, "-m", "fluxmesh_coordinator", "up", str(path), "--force"]
            + ["--model", str(machine.model)],
            env=machine.env,
            cwd=machine.folder,
            stdout=subprocess.DEVNULL,
        )
        wait_until_gone(processes(before)[:2], 120)
        painting.kill()  # else `up` waits in its line for the other host
        assert forced.wait(120) == 0
    assert processes(machine.hosts()) == processes(before)[2:]


def test_down_during_a_job_has_to_be_forced_and_then_nobody_brings_an_agent_back(
    machine: MeshMachine,
) -> None:
    machine.env |= PACED
    (host,) = machine.up(machine.hostfile(1)).of("up")[0]["hosts"]
    with long_job(machine) as (painting, job):
        lease = machine.hosts()[0]["lease"]
        refused = machine("down")
        assert refused.code == 1
        assert refused.err == (
            f"Error: Host 0 works on {lease['title']} ({lease['user']}); "
            "wait until it is done, or use --force.\n"
        )
        assert lease["title"].startswith("50 images, ")
        assert machine.hosts()[0]["job"] == job

        forced = machine("down", "--force")
        assert forced.code == 0, forced.err
        _, err = painting.communicate(timeout=60)
        assert painting.returncode in (1, 3) and "Traceback" not in err
    wait_until_gone(processes([host]))
    folder = machine.folder / "fluxmesh_state"
    assert list(folder.glob("agent-*/started.json")) == []
    assert list(folder.glob("agent-*/agent.json")) == []


def test_status_is_told_again_and_again_until_ctrl_c(machine: MeshMachine) -> None:
    machine.up(machine.hostfile(1))
    with subprocess.Popen(
        [sys.executable, "-m", "fluxmesh_coordinator", "status", "--watch", "--json"],
        env=machine.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as watching:
        assert watching.stdout is not None
        statuses = [json.loads(watching.stdout.readline()) for _ in range(3)]
        watching.send_signal(signal.SIGINT)
        assert watching.wait(60) == 130
    clocks = [line["hosts"][0]["clock"] for line in statuses]
    assert clocks == sorted(set(clocks))


def test_a_model_that_is_not_here_is_told_with_how_to_get_it(machine: MeshMachine) -> None:
    done = machine("up", "--model", "schnell")
    assert done.code == 1
    assert "fluxmesh models pull schnell" in done.err and "Traceback" not in done.err


def test_no_host_that_answers_is_exit_code_3(machine: MeshMachine) -> None:
    (host,) = machine.up(machine.hostfile(1)).of("up")[0]["hosts"]
    os.kill(host["pid"], signal.SIGKILL)
    wait_until_gone(processes([host]))
    for command in (("status",), ("plan",)):
        done = machine(*command)
        assert done.code == 3
        assert "No host of" in done.err and "Nobody listens" in done.err


def test_envs_of_the_command_line_reach_the_engines(machine: MeshMachine) -> None:
    path = machine.hostfile(1)
    (host,) = machine.up(path, "--env", "FLUXMESH_TEST=5").of("up")[0]["hosts"]
    assert psutil.Process(host["engine_pid"]).environ()["FLUXMESH_TEST"] == "5"
    wrong = machine("up", path, "--env", "nonsense")
    assert wrong.code == 2 and "--env nonsense: expected KEY=VALUE" in wrong.err


def test_an_agent_for_one_call_ends_with_its_starter(tmp_path: Path) -> None:
    code = (
        "import os, time\n"
        "from fluxmesh_coordinator.agents.launch import start_ephemeral\n"
        "one = start_ephemeral()\n"
        "print(one.process.pid, one.record.members[0].state, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(tmp_path) | {"TMPDIR": str(tmp_path)},
    ) as starter:
        assert starter.stdout is not None
        pid, state = starter.stdout.readline().split()
        assert started_at(int(pid)) is not None and Path(state).is_dir()
        starter.kill()
    wait_until_gone([int(pid)])


def test_an_agent_for_one_call_lets_in_its_starter_alone_and_leaves_no_folder() -> None:
    with start_ephemeral() as agent:
        state = Path(agent.record.members[0].state)
        assert [user.read_text().strip() for user in (state / "authorized").glob("*.pub")] == [
            agent.keys.public
        ]
        answers = survey(agent.record, agent.keys)
        assert answers.errors == {} and answers.view.ranks == (0,)
        engine = answers.statuses[0].engine_pid
    assert not state.exists()
    wait_until_gone([agent.process.pid, *([engine] if engine else [])])


def test_a_bare_up_looks_after_the_mesh_that_is_up_and_ends_no_host_unasked(
    machine: MeshMachine,
) -> None:
    path = machine.hostfile(2)
    before = machine.up(path).of("up")[0]["hosts"]
    kept = machine("up", "--json")
    assert kept.code == 0, kept.err
    after = kept.of("up")[0]["hosts"]
    assert processes(after) == processes(before)
    assert {host["holds"]["weights"]["model"] for host in after} == {str(machine.model)}
    assert f"Looking after the mesh of {path}." in [line["text"] for line in kept.of("note")]

    refused = machine("up", "--local", 1, "--model", machine.model)
    assert refused.code == 1 and "would end the agents of 127.0.0.1, 127.0.0.1" in refused.err
    assert "--force does, or give a hostfile" in refused.err
    assert processes(machine.hosts()) == processes(before)
    forced = machine.up("--local", 1, "--force").of("up")[0]["hosts"]
    assert len(forced) == 1
    wait_until_gone(processes(before))


def test_engines_of_this_machine_need_no_hostfile(machine: MeshMachine) -> None:
    both = machine.up("--local", 2).of("up")[0]["hosts"]
    assert len({host["address"] for host in both}) == 2
    assert processes(machine.up().of("up")[0]["hosts"]) == processes(both)
    one = machine.up("--local", 1).of("up")[0]["hosts"]
    assert len(one) == 1
    wrong = machine("up", machine.hostfile(1), "--local", 2)
    assert wrong.code == 2 and "--local is a mesh without a hostfile" in wrong.err


@pytest.mark.parametrize("finder", ["down", "up"])
def test_what_an_up_that_was_killed_has_started_is_found(machine: MeshMachine, finder: str) -> None:
    path = machine.hostfile(2)
    command = [sys.executable, "-m", "fluxmesh_coordinator", "up", str(path)]
    starting = machine.folder / "fluxmesh_home" / "starting.json"
    for _ in range(5):
        with subprocess.Popen(
            [*command, "--model", str(machine.model)],
            env=machine.env,
            cwd=machine.folder,
            stderr=subprocess.DEVNULL,
        ) as killed:
            deadline = time.monotonic() + 120
            while len(list((machine.folder / "fluxmesh_state").glob("agent-*/started.json"))) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.005)
            killed.kill()
        if not (machine.folder / "fluxmesh_home" / "mesh.json").exists():
            break
        assert machine("down").code == 0  # it was faster than its killer
    assert starting.exists()
    if finder == "up":
        assert len(machine.up(path).of("up")[0]["hosts"]) == 2
        assert not starting.exists()
    down = machine("down")
    # Those who started them may have been faster than `down`: they had nobody to answer any more.
    ended = "2 agents ended" if finder == "up" else r"[012] agents? ended"
    assert down.code == 0 and re.search(ended, down.out), down.err
    assert not starting.exists()
    assert list((machine.folder / "fluxmesh_state").glob("agent-*/started.json")) == []
