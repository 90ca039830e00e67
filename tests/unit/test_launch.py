"""How hosts are asked: the command lines, and the sentences when they don't answer."""

from __future__ import annotations

import os
import platform
import signal
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fluxmesh.cluster.hostfile import Host, parse
from fluxmesh.deadlines import DEADLINES
from fluxmesh.errors import FluxmeshError, HostUnreachableError
from fluxmesh.storage.keys import Keys
from fluxmesh_coordinator.agents import launch, remote
from fluxmesh_coordinator.agents.agent_here import agent_command

REMOTE = Host(1, "me@mac1")


def fake_ssh(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ssh that runs `script`; returns the file in which it leaves its arguments."""
    path, arguments = folder / "ssh", folder / "arguments"
    path.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" >> {arguments}\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("FLUXMESH_SSH", str(path))
    return arguments


def test_no_key_and_no_path_of_the_user_is_part_of_a_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = fake_ssh(tmp_path, 'cat > "$0.stdin"; exit 255', monkeypatch)
    keys = Keys.new()
    spec = {"address": "192.168.0.1", "port": 47100, "models": "~/models", "envs": []}

    with pytest.raises(HostUnreachableError):
        launch.start(REMOTE, spec, keys)

    said = arguments.read_text()
    assert keys.public not in said and keys.secret not in said and "models" not in said
    stdin = (tmp_path / "ssh.stdin").read_text()
    assert keys.secret not in stdin
    assert "~/models" in stdin
    assert "BatchMode=yes" in said and "--\nme@mac1\n" in said


@pytest.mark.parametrize(
    ("script", "kind", "text"),
    [
        (
            "echo 'Permission denied (publickey).' >&2; exit 255",
            HostUnreachableError,
            "ssh-copy-id",
        ),
        ("exit 127", FluxmeshError, "no Python there has fluxmesh"),
        ("echo 'No module named fluxmesh_coordinator' >&2; exit 1", FluxmeshError, "install it"),
        ("echo Boom. >&2; exit 1", FluxmeshError, "fluxmesh fails there: Boom."),
        ('echo \'{"error": "The disk is full."}\'', FluxmeshError, "The disk is full."),
        (
            "echo '/Users/me/Documents/venv/bin/python: Operation not permitted' >&2; exit 127",
            FluxmeshError,
            "macOS does not let who comes over ssh read /Users/me/Documents/venv/bin/python",
        ),
    ],
)
def test_a_host_that_fails_is_named_with_its_reason(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    kind: type[FluxmeshError],
    text: str,
) -> None:
    fake_ssh(tmp_path, f"cat >/dev/null; {script}", monkeypatch)
    with pytest.raises(kind) as caught:
        remote.ask(REMOTE, "look")
    assert type(caught.value) is kind
    assert str(caught.value).startswith("host 1 (mac1): ") and text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["mac1", "mac1.local"])
def test_a_mac_that_refuses_ssh_is_told_with_remote_login(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    line = "ssh: connect to host mac1 port 22: Connection refused"
    fake_ssh(tmp_path, f"cat >/dev/null; echo '{line}' >&2; exit 255", monkeypatch)
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    for here, is_own in (("mac9.local", False), ("mac1.local", True)):
        monkeypatch.setattr(platform, "node", lambda here=here: here)
        with pytest.raises(HostUnreachableError, match="switch on Remote Login") as caught:
            remote.ask(Host(1, f"me@{name}"), "look")
        assert ('"127.0.0.1"' in str(caught.value)) == is_own


def test_a_connection_that_others_share_and_that_stays_open_holds_up_no_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ssh's ControlMaster outlives the command that began it, and holds its stderr."""
    master = f"sleep 600 >/dev/null & echo $! >{tmp_path}/pid"
    fake_ssh(tmp_path, f"{master}; cat >/dev/null; echo '{{\"result\": {{}}}}'", monkeypatch)
    code = (
        "from fluxmesh.cluster.hostfile import Host\n"
        "from fluxmesh_coordinator.agents import remote\n"
        "print(remote.ask(Host(1, 'me@mac1'), 'logs'))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        said, noise = process.communicate(timeout=60)
    finally:
        process.kill()
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    assert (process.returncode, said, noise) == (0, "{}\n", "")


def test_what_a_login_script_prints_is_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "echo Welcome; echo '[1]'; echo '{\"result\": {\"clock\": 1}}'"
    fake_ssh(tmp_path, f"cat >/dev/null; {lines}", monkeypatch)
    assert remote.ask(REMOTE, "look") == {"clock": 1}


def test_progress_is_heard_before_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = 'echo \'{"done_bytes": 1, "total_bytes": 2}\'; echo \'{"result": {}}\''
    fake_ssh(tmp_path, f"cat >/dev/null; {lines}", monkeypatch)
    heard: list[dict[str, int]] = []
    remote.ask(REMOTE, "pull", heard.append, model="dev")
    assert heard == [{"done_bytes": 1, "total_bytes": 2}]


def test_a_host_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ssh(tmp_path, "exec sleep 60", monkeypatch)
    with pytest.raises(HostUnreachableError, match="does not answer"):
        remote.ask(REMOTE, "look", deadlines=replace(DEADLINES, ask_look=0.3))


def test_another_version_there_is_told() -> None:
    host = Host(0, "127.0.0.1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "__version__", "9.9")
        with pytest.raises(FluxmeshError, match=r"has fluxmesh \d.* and this machine 9\.9"):
            remote.ask(host, "look")


def test_this_machine_is_asked_without_ssh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUXMESH_SSH", "/no/such/ssh")
    answer = remote.ask(Host(0, "localhost"), "look", ips=["127.0.0.1", "203.0.113.7"])
    assert answer["python"] == sys.executable
    assert answer["ips"] == {"127.0.0.1": True, "203.0.113.7": False}


def test_hosts_are_asked_side_by_side_and_each_has_its_own_end() -> None:
    hosts = [Host(rank, f"mac{rank}") for rank in range(3)]

    def do(host: Host) -> str:
        if host.rank == 1:
            raise FluxmeshError("host 1 fails.")
        return host.name

    results, errors = remote.each(hosts, do)
    assert results == {0: "mac0", 2: "mac2"}
    assert {rank: str(error) for rank, error in errors.items()} == {1: "host 1 fails."}


def test_a_name_goes_to_its_host_with_the_addresses_that_are_known_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_ssh(tmp_path, "echo user me; echo hostname 127.0.0.9", monkeypatch)
    hosts = parse('[{"ssh": "mac1", "ips": ["192.168.0.1"]}]')
    spec = launch.agent_spec(hosts, 0, ())
    assert (spec["address"], spec["addresses"], spec["port"]) == ("", ["127.0.0.9"], 47100)
    fake_ssh(tmp_path, "echo hostname no-such-host.invalid", monkeypatch)
    assert launch.agent_spec(hosts, 0, ())["addresses"] == []
    given = parse('[{"ssh": "mac1", "ips": ["192.168.0.1"], "control": "10.0.0.9:5"}]')
    assert launch.place_of(given, 0) == {"address": "10.0.0.9", "addresses": [], "port": 5}


def test_agents_of_one_machine_have_a_gpu_each_where_they_talk_by_nccl() -> None:
    host = '{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}'
    for backend, wanted in (("nccl", ["0", "1"]), ("ring", [None, None])):
        hosts = parse(f'{{"backend": "{backend}", "hosts": [{host}, {host}]}}')
        specs = [launch.agent_spec(hosts, rank, [("NCCL_DEBUG", "INFO")]) for rank in range(2)]
        assert [dict(spec["envs"]).get("CUDA_VISIBLE_DEVICES") for spec in specs] == wanted
        assert all(["NCCL_DEBUG", "INFO"] in spec["envs"] for spec in specs)
        assert not any("MLX_USE_CUDA_GRAPHS" in dict(spec["envs"]) for spec in specs)


def test_three_gpus_or_more_launch_kernels_without_graphs_unless_told_otherwise() -> None:
    hosts = ", ".join(['{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}'] * 3)
    for backend, given, wanted in (
        ("nccl", [], ("0", "30")),
        ("nccl", [("MLX_USE_CUDA_GRAPHS", "1"), ("MLX_MAX_OPS_PER_BUFFER", "50")], ("1", "50")),
        ("ring", [], (None, None)),
    ):
        mesh = parse(f'{{"backend": "{backend}", "hosts": [{hosts}]}}')
        for rank in range(3):
            envs = dict(launch.agent_spec(mesh, rank, given)["envs"])
            found = tuple(
                envs.get(key) for key in ("MLX_USE_CUDA_GRAPHS", "MLX_MAX_OPS_PER_BUFFER")
            )
            assert found == wanted


def test_the_command_of_an_agent_holds_no_secret() -> None:
    spec = {"address": "127.0.0.1", "port": 1, "models": "~/m", "memory": 7, "roots": ["/r"]}
    command = agent_command(Path("/state"), {**spec, "envs": [["KEY", "VALUE"]]})
    assert command[:4] == [sys.executable, "-m", "fluxmesh_agent", "run"]
    assert "VALUE" not in " ".join(command)
    assert command[command.index("--models") + 1] == os.path.expanduser("~/m")
    assert "--keys-stdin" in command


def test_users_are_told_apart_by_their_keys() -> None:
    first, second = Keys.new(), Keys.new()
    assert launch.user_name(first.public) != launch.user_name(second.public)
    assert launch.user_name(first.public) == launch.user_name(first.public)


@pytest.mark.parametrize("broken", ["folder", "process"])
def test_an_agent_for_one_call_that_cannot_be_started_is_a_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    folder = tmp_path / "temporary"
    monkeypatch.setattr(launch.tempfile, "tempdir", str(folder))
    if broken == "process":
        folder.mkdir()
        monkeypatch.setattr(launch, "agent_command", lambda *_: [str(tmp_path / "no-python")])
    with pytest.raises(FluxmeshError, match="can't be started: .*No such file or directory"):
        launch.start_ephemeral()
    assert not folder.exists() or list(folder.iterdir()) == []
