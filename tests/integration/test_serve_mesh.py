"""`fluxmesh serve` before a mesh that is up: jobs beside each other, models beside each other."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import pytest

from fluxmesh.kernels.ops import device
from fluxmesh.planning.workload import ModelSizes, Workload
from fluxmesh.request import GenerateRequest
from fluxmesh.weights import hub
from tests.flux2_checkpoint import make_flux2
from tests.integration.test_mesh_commands import MeshMachine, machine
from tests.server_process import ServerProcess, server

__all__ = ["machine"]  # a fixture

LIMIT = 90.0  # seconds
SIZE: dict[str, Any] = {"width": 32, "height": 32}


class AskedServer:
    """A server, and a client that keeps its connection."""

    def __init__(self, process: ServerProcess, http: httpx2.Client) -> None:
        self.process, self.http = process, http

    def send(self, id: str, client: str = "", **fields: object) -> None:
        body = {"prompt": "a red apple", "id": id, **SIZE, **fields}
        answer = self.http.post("/api/jobs", json=body, headers={"x-fluxmesh-client": client})
        assert answer.status_code == 202, answer.text

    def events(self, id: str) -> list[tuple[str, dict[str, Any]]]:
        """All that a job told, to its end."""
        lines = self.http.get(f"/api/jobs/{id}/events").text.splitlines()
        kinds = [line[7:] for line in lines if line.startswith("event: ")]
        data = [json.loads(line[5:]) for line in lines if line.startswith("data:")]
        return list(zip(kinds, data, strict=True))

    def picture(self, id: str) -> bytes:
        heard = self.events(id)
        (made,) = [data for kind, data in heard if kind == "picture"]
        assert heard[-1][0] == "done"
        return self.http.get(made["url"]).content

    def status(self, of: str) -> list[dict[str, Any]]:
        """The `hosts`, or the `queue`."""
        listed: list[dict[str, Any]] = self.http.get("/api/status").json()[of]
        return listed

    def until_loaded(self, models: list[str]) -> None:
        """What is told of hosts may be a second old."""
        limit = time.monotonic() + LIMIT
        while (known := [host["models"] for host in self.status("hosts")]) != [models]:
            assert time.monotonic() < limit, known
            time.sleep(0.1)


@contextmanager
def asked_server(machine: MeshMachine, *options: object) -> Iterator[AskedServer]:
    with (
        server(*options, environment=machine.env, folder=machine.folder) as process,
        httpx2.Client(base_url=process.url, timeout=LIMIT) as http,
    ):
        yield AskedServer(process, http)


def test_jobs_of_two_clients_are_painted_at_once_each_on_a_host_of_its_own(
    machine: MeshMachine,
) -> None:
    slow = machine.env | {"FLUXMESH_DELAYS": "step=0.5"}
    machine.env, quick = slow, machine.env
    engines = machine.up(machine.hostfile(2), "--no-warm").of("up")[0]["hosts"]
    machine.env = quick
    # Of 10 s: both run side by side, also where they begin apart.
    fields = {"steps": 20, "n_images": 1, "placement": "data"}
    with asked_server(machine) as it:
        it.send("job-of-anna", "anna", seed=1, **fields)
        it.send("job-of-ben", "ben", seed=2, **fields)
        limit = time.monotonic() + LIMIT
        while True:  # until both have steps behind them, and neither is done
            queue = it.status("queue")
            assert len(queue) == 2 and time.monotonic() < limit, queue
            if all(0 < job["progress"] < 1 for job in queue):
                break
            time.sleep(0.05)
        assert [(job["state"], job["place"]) for job in queue] == [("running", 0)] * 2
        it.send("third-job", "cleo", seed=3, **fields)
        queue = it.status("queue")
        assert [job["place"] for job in queue] == [0, 0, 1]
        it.http.delete("/api/jobs/third-job")
        os.kill(engines[1]["engine_pid"], signal.SIGKILL)
        both = [it.events(id) for id in ("job-of-anna", "job-of-ben")]
        used = [{tuple(d["hosts"]) for kind, d in each if kind == "planned"} for each in both]
        lost = [any(kind == "host" for kind, _ in each) for each in both]
        # The death touches one of them, which goes on; the other hears nothing of it.
        assert sorted(zip(used, lost, strict=True)) == [({(0,)}, False), ({(1,)}, True)]
        pictures = it.picture("job-of-anna"), it.picture("job-of-ben")
        it.process.signal()
        assert it.process.ended() == 0, it.process.log
    assert pictures[0] != pictures[1]
    options = ("--image-size", "32x32", "--steps", 20, "--seed", 2, "--placement", "data")
    done = machine("generate", "a red apple", *options, "--output", "ben.png")
    assert done.code == 0, done.err
    assert (machine.folder / "ben.png").read_bytes() == pictures[1]


@pytest.mark.parametrize("is_roomy", [True, False])
def test_models_by_name_stay_in_memory_where_there_is_room_for_both(
    machine: MeshMachine, is_roomy: bool
) -> None:
    repo = machine.folder / "hub" / "hub" / "models--black-forest-labs--FLUX.2-klein-4B"
    klein = make_flux2(repo / "snapshots" / "0123456")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123456")
    if not is_roomy:  # each of them fits, and both do not: they are of one size
        machine.model = make_flux2(machine.folder / "other", seed=1)
    names = ["klein-4b", machine.model.name]
    if not is_roomy:
        needs = []
        for source in map(str, (klein, machine.model)):
            sizes = ModelSizes.of(hub.resolve(source))
            work = Workload.of(sizes.fill(GenerateRequest("", 0, source)), sizes)
            needs.append(max(work.memory("data", 1, 1, device())) + work.text_bytes)
        machine.up(machine.hostfile(1, memory=max(needs) + 200_000), "--no-warm")
    with asked_server(machine, "--model", machine.model) as it:
        loads, pictures = [], []
        for number, name in enumerate([*names, names[0]]):
            it.send(f"the-job-{number}", model=name, steps=2, seed=7)
            pictures.append(it.picture(f"the-job-{number}"))
            read = [data for kind, data in it.events(f"the-job-{number}") if kind == "model"]
            assert {data["name"] for data in read} <= {name}
            loads.append(bool(read))
            others = [names[number % 2 - 1]] if number and is_roomy else []
            it.until_loaded([name, *others])
        assert loads == [True, True, not is_roomy]
        assert pictures[0] == pictures[2] != pictures[1]
