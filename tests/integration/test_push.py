"""`models push` between agents that have disks of their own, and what happens when one dies."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import make_checkpoint
from tests.push_mesh import PushMesh, cached, contents, push_mesh

LARGE = 150 << 20  # bytes, which take a second or two


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PushMesh]:
    with push_mesh(tmp_path_factory.mktemp("push"), 3) as mesh:
        yield mesh


@pytest.fixture
def repo(request: pytest.FixtureRequest) -> str:
    """A repository of the test's own."""
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)
    return f"somebody/{name.strip('-')[-40:]}".replace("--", "-")


def lines_of(out: bytes, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in out.splitlines()]
    return [line for line in lines if line["event"] == event]


def test_a_snapshot_goes_down_the_chain_to_all_who_lack_it(mesh: PushMesh, repo: str) -> None:
    made = contents(cached(mesh.own_cache, repo))
    lone = mesh("models", "push", repo, "1", "--json")
    assert lone.code == 0, lone.err
    assert [line["host"] for line in lone.of("arrived")] == [1]
    assert lone.of("arrived")[0]["source"] is None  # this machine, which is no host

    done = mesh("models", "push", repo, "--json")
    assert done.code == 0, done.err
    assert {line["host"]: line["source"] for line in done.of("arrived")} == {2: 1, 0: 2}
    assert done.of("pushed") == [
        {"event": "pushed", "name": repo, "hosts": [0, 2], "failed": []},
    ]
    for rank in range(3):
        assert contents(mesh.snapshot(rank, repo)) == made
    last = done.of("progress")[-1]
    assert last["done_bytes"] == last["total_bytes"]

    again = mesh("models", "push", repo)
    assert (again.code, again.out) == (0, f"Every host has {repo} already.\n")


def test_what_can_t_be_pushed_is_told(mesh: PushMesh) -> None:
    nobody = mesh("models", "push", "nobody/nothing")
    assert nobody.code == 1 and "No host of the mesh has nobody/nothing" in nobody.err
    unknown = mesh("models", "push", "nobody/nothing", "mac9")
    assert unknown.code == 2 and "no host 'mac9'" in unknown.err
    tiny = mesh("models", "push", "tiny")
    assert tiny.code == 2 and "every host has it" in tiny.err


@pytest.mark.parametrize("layout", ["diffusers", "bfl"])
def test_a_folder_or_a_file_is_found_by_the_path_that_it_has_at_home(
    mesh: PushMesh, layout: str, tmp_path: Path
) -> None:
    folder = tmp_path / "my flux"
    make_checkpoint(folder, layout=layout, dtype="bfloat16")
    model = folder if layout == "diffusers" else folder / "flux1-test.safetensors"
    done = mesh("models", "push", model, "--json")
    assert done.code == 0, done.err
    assert len(done.of("arrived")) == 3
    name = "my flux" if layout == "diffusers" else "flux1-test"
    made = contents(folder)
    for rank in range(3):
        assert contents(mesh.models(rank) / name) == made
    folder.rename(tmp_path / "elsewhere")  # so that nobody reads it where it was
    again = mesh("models", "push", model)
    assert (again.code, again.out) == (0, f"Every host has {model} already.\n")


def test_ctrl_c_leaves_what_has_come_and_no_process(mesh: PushMesh, repo: str) -> None:
    cached(mesh.own_cache, repo, pad=LARGE)
    before = mesh.processes()
    with mesh.slowed(0):
        process = mesh.start("models", "push", repo, "--json")
        mesh.wait_for_bytes(0, repo, random.Random(3).randrange(LARGE // 8, LARGE // 2))
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=100)
    assert process.returncode == 130, (out, err)
    assert b"Traceback" not in err
    deadline = time.monotonic() + 60
    while mesh.processes() - before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert mesh.processes() <= before
    left = mesh.partial(0, repo)
    assert left > LARGE // 8
    assert not (mesh.snapshot(0, repo) / "model_index.json").exists()

    again = mesh("models", "push", repo, "--json")
    assert again.code == 0, again.err
    (first,) = [line for line in again.of("arrived") if line["host"] == 0]
    assert first["bytes"] <= first["total_bytes"] - left


@pytest.mark.parametrize("victim", [0, 1])
def test_a_host_that_dies_is_told_and_the_others_finish(
    mesh: PushMesh, victim: int, repo: str
) -> None:
    made = contents(cached(mesh.own_cache, repo, pad=LARGE))
    with mesh.slowed(victim):
        process = mesh.start("models", "push", repo, "--json")
        mesh.wait_for_bytes(victim, repo, random.Random(victim).randrange(1, LARGE // 2))
        os.kill(mesh.agent_pid(victim), signal.SIGKILL)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 1, err
    (left_out,) = lines_of(out, "left_out")
    assert left_out["host"] == victim and f"host {victim}" in left_out["reason"]
    (end,) = lines_of(out, "pushed")
    others = [rank for rank in range(3) if rank != victim]
    assert (end["hosts"], end["failed"]) == (others, [victim])
    for rank in others:
        assert contents(mesh.snapshot(rank, repo)) == made
    assert f"{repo} did not get to 1 host" in out.decode() + err.decode()

    mesh.up()
    again = mesh("models", "push", repo, "--json")
    assert again.code == 0, again.err
    (arrived,) = again.of("arrived")
    assert arrived["host"] == victim and arrived["bytes"] < arrived["total_bytes"]
    assert contents(mesh.snapshot(victim, repo)) == made


def test_where_the_only_host_that_has_it_dies_the_rest_go_on_when_it_is_back(
    mesh: PushMesh, repo: str
) -> None:
    made = contents(cached(mesh.cache(0), repo, pad=LARGE))
    with mesh.slowed(1):
        process = mesh.start("models", "push", repo, "--json")
        mesh.wait_for_bytes(1, repo, LARGE // 10)
        os.kill(mesh.agent_pid(0), signal.SIGKILL)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 1, (out, err)
    assert {line["host"] for line in lines_of(out, "left_out")} == {1, 2}
    left = mesh.partial(1, repo)
    assert left >= LARGE // 10

    mesh.up()
    again = mesh("models", "push", repo, "--json")
    assert again.code == 0, again.err
    for rank in range(3):
        assert contents(mesh.snapshot(rank, repo)) == made
    (first,) = [line for line in again.of("arrived") if line["host"] == 1]
    assert first["source"] == 0 and first["bytes"] <= first["total_bytes"] - left


def test_an_agent_answers_while_files_come_and_go(mesh: PushMesh, repo: str) -> None:
    cached(mesh.own_cache, repo, pad=2 * LARGE)
    with mesh.slowed(1):
        process = mesh.start("models", "push", repo, "--json")
        mesh.wait_for_bytes(1, repo, 1 << 20)
        status = mesh("status", "--json")
        was_busy = process.poll() is None
    assert status.code == 0 and was_busy
    assert all(host["answers"] for host in status.of("status")[0]["hosts"])
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 0 and not lines_of(out, "left_out")


def test_up_offers_a_copy_before_it_offers_the_hub(mesh: PushMesh, repo: str) -> None:
    cached(mesh.own_cache, repo)
    up = ("up", mesh.folder / "hosts.json", "--model", repo, "--no-warm", "--json")
    refused = mesh(*up)
    assert refused.code == 1
    assert "It is here: --push copies it." in refused.err
    (lacking,) = refused.of("lacking")
    assert (lacking["model"], lacking["where"], lacking["hosts"]) == (repo, "here", [0, 1, 2])
    assert lacking["bytes"] > 0 and lacking["push"] is False

    done = mesh(*up, "--push")
    assert done.code == 0, done.err
    assert {line["host"] for line in done.of("progress") if "copying" in line["what"]} == {0, 1, 2}
    held = [host["holds"]["weights"]["model"] for host in done.of("up")[0]["hosts"]]
    assert held == [repo] * 3
    again = mesh(*up)
    assert again.code == 0 and not again.of("lacking")
