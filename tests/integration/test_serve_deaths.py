"""SIGKILL under a server's clients: of an engine, of a whole host, and of the server itself."""

from __future__ import annotations

import base64
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from tests.faults.mesh import Up, up
from tests.processes import wait_until_gone
from tests.server_process import ServerProcess, server

pytestmark = pytest.mark.timeout(400)  # a mesh and a server begin before the first
TAKES = 100.0  # seconds
STEPS = 8
ASKED: dict[str, Any] = {
    "prompt": "a red apple",
    "size": "64x64",
    "n": 2,
    # A picture's own recipe says how it was spread, which may be another way every time.
    "extra_body": {"steps": STEPS, "seed": 7, "placement": "data"},
}


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """Two hosts, whose steps take long enough to be hit: four seconds behind a partial picture."""
    with up(tmp_path_factory.mktemp("mesh"), 2, dtype="bfloat16", delays="step=0.6") as machine:
        yield machine


@pytest.fixture(scope="module")
def running(mesh: Up, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("serve")
    with server("--model", "tiny", environment=mesh.env, folder=folder) as process:
        yield process
        process.signal()
        assert process.ended() == 0
        assert "Traceback" not in process.log


def events_of(url: str, id: str, until: str = "") -> list[tuple[str, dict[str, Any]]]:
    """A job's own events: to its end, or to the first one of a kind."""
    events: list[tuple[str, dict[str, Any]]] = []
    kind = ""
    with httpx2.stream("GET", f"{url}/api/jobs/{id}/events", timeout=TAKES) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            name, _, value = line.partition(": ")
            if name == "event":
                kind = value
            elif name == "data":
                events.append((kind, json.loads(value)))
                if kind == until:
                    break
    return events


def strike(mesh: Up, victim: str, rank: int) -> None:
    """Kills an engine, or an agent with its engine: what the host is to its coordinator."""
    pids = [mesh.pid("engine", rank)]
    if victim == "host":
        pids.insert(0, mesh.pid("agent", rank))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_until_gone(pids)


@pytest.fixture(scope="module")
def calm(running: ServerProcess) -> list[str]:
    """The pictures of `ASKED` when nobody dies."""
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        reply = client.images.generate(**ASKED)
    return [entry.b64_json or "" for entry in reply.data or []]


def stream(client: openai.OpenAI, id: str) -> Any:
    """The same, as a stream of a job of that id."""
    return client.images.generate(
        **ASKED, stream=True, partial_images=3, extra_headers={"idempotency-key": id}
    )


@pytest.mark.parametrize("victim", ["engine", "host"])
def test_a_stream_goes_on_and_gives_the_same_bytes_when_its_host_dies(
    mesh: Up, running: ServerProcess, calm: list[str], victim: str
) -> None:
    id = f"a-stream-whose-{victim}-dies"
    before: list[str] = []  # events up to the blow
    after: list[Any] = []
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        for event in stream(client, id):
            if before:
                after.append(event)
                continue
            before.append(event.type)
            planned = dict(events_of(running.url, id, until="planned"))["planned"]
            strike(mesh, victim, planned["hosts"][0])
    assert before == ["image_generation.partial_image"]
    whole = [event.b64_json for event in after if event.type == "image_generation.completed"]
    assert sorted(whole) == sorted(calm)
    told = events_of(running.url, id)
    lost = [data for kind, data in told if kind == "host"]
    assert len(lost) == 1 and lost[0]["text"]
    steps = [(data["image"], data["step"]) for kind, data in told if kind == "step"]
    assert len(steps) == len(set(steps)) == 2 * STEPS  # nothing that was done is told twice


def test_a_server_that_is_killed_loses_no_picture_and_says_what_it_lost(
    mesh: Up, calm: list[str], tmp_path: Path
) -> None:
    """Between two jobs and in one; the hosts are free for the next server."""
    options = ("--model", "tiny", "--pictures", tmp_path / "pictures")
    id = "the-job-that-is-cut-off"
    with (
        server(*options, environment=mesh.env, folder=tmp_path) as first,
        openai.OpenAI(base_url=f"{first.url}/v1", api_key="none", max_retries=0) as client,
    ):
        reply = client.images.generate(**ASKED, response_format="url")
        urls = [str(entry.url).removeprefix(first.url) for entry in reply.data or []]
        events = stream(client, id)
        assert next(events).type == "image_generation.partial_image"
        first.signal(signal.SIGKILL)
        with pytest.raises((openai.APIConnectionError, httpx2.TransportError)):
            list(events)  # it ends in an error, and not as if all had come
    with server(*options, environment=mesh.env, folder=tmp_path) as second:
        listed = httpx2.get(f"{second.url}/api/pictures").json()["pictures"]
        assert {picture["url"] for picture in listed} >= set(urls) and len(urls) == 2
        kept = [httpx2.get(f"{second.url}{url}").content for url in urls]
        assert [base64.b64encode(data).decode() for data in kept] == calm
        *_, (kind, data) = events_of(second.url, id)
        assert (kind, data["code"]) == ("error", "lost") and "ended before" in data["message"]
        # Asked for once more, by the same id, it goes on, and is told as any other.
        with openai.OpenAI(base_url=f"{second.url}/v1", api_key="none", max_retries=0) as client:
            reply = client.images.generate(**ASKED, extra_headers={"idempotency-key": id})
        assert [entry.b64_json for entry in reply.data or []] == calm
        assert events_of(second.url, id)[-1][0] == "done"
        second.signal()
        assert second.ended() == 0 and "1 job was not finished by the" in second.log
    with server(*options, environment=mesh.env, folder=tmp_path) as third:
        # And once more after a restart in order: what is on the disk, and no step again.
        done = events_of(third.url, id)
        with openai.OpenAI(base_url=f"{third.url}/v1", api_key="none", max_retries=0) as client:
            reply = client.images.generate(**ASKED, extra_headers={"idempotency-key": id})
        assert [entry.b64_json for entry in reply.data or []] == calm
        assert [kind for kind, _ in done] == ["picture", "picture", "done"]
        assert events_of(third.url, id) == done
