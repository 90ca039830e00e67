"""`fluxmesh serve` and the clients that people have, in processes of their own.

What each face makes of its fields is `tests/unit/test_server_openai.py`'s, and its neighbours'.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from PIL import Image

from tests.integration.conftest import Run, environment
from tests.processes import wait_until_gone
from tests.server_process import ServerProcess, server

# Of the engine that all tests share: work that is cut off is not over before a test comes to that.
PACED = {"FLUXMESH_DELAYS": "step=0.4"}
SMALL: dict[str, Any] = {"size": "64x64", "extra_body": {"steps": 2, "seed": 7}}


@pytest.fixture(scope="module")
def own_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="module")
def running(own_folder: Path) -> Iterator[ServerProcess]:
    env = environment(own_folder) | PACED
    with server("--model", "tiny", environment=env, folder=own_folder) as it:
        yield it


@pytest.fixture
def client(running: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as it:
        yield it


def opened(encoded: str | None) -> Image.Image:
    assert encoded is not None
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def png(alpha: bool = False) -> bytes:
    pixels = np.full((64, 64, 4), 255, np.uint8)
    pixels[:, :, 0] = np.arange(64) * 4
    pixels[:32, :, 3] = 0
    out = io.BytesIO()
    Image.fromarray(pixels if alpha else pixels[:, :, :3]).save(out, "PNG")
    return out.getvalue()


def test_openai_s_client_paints_one_and_three_and_they_are_the_command_line_s_files(
    client: openai.OpenAI, fluxmesh: Run, tmp_path: Path
) -> None:
    single = client.images.generate(prompt="a red apple", model="gpt-image-1", **SMALL)
    assert single.data is not None and single.size == "64x64" and single.usage is not None
    three = client.images.generate(
        prompt="a red apple", n=3, size="64x64", extra_body={"steps": 2, "seed": 6}
    )
    assert three.data is not None and len(three.data) == 3
    # Image k is the one that seed + k gives alone, byte for byte.
    assert three.data[1].b64_json == single.data[0].b64_json
    options = ("--model", "tiny", "--image-size", "64x64", "--steps", 2, "--seed", 7)
    done = fluxmesh("generate", "a red apple", *options, "--output", "apple.png")
    assert done.code == 0, done.err
    assert base64.b64decode(single.data[0].b64_json or "") == (tmp_path / "apple.png").read_bytes()


def test_openai_s_client_follows_a_stream_and_an_engine_that_is_killed_does_not_end_it(
    client: openai.OpenAI, running: ServerProcess
) -> None:
    killed: list[int] = []
    kinds = []
    fields = {"steps": 16, "seed": 7}
    stream = client.images.generate(
        prompt="a red apple", size="64x64", stream=True, partial_images=3, extra_body=fields
    )
    whole = None
    for event in stream:
        kinds.append(event.type)
        assert opened(event.b64_json).size == (64, 64)
        if event.type == "image_generation.completed":
            whole = event.b64_json
        elif not killed:
            (engine,) = running.engines()
            killed.append(engine.pid)
            engine.kill()
            wait_until_gone(killed)
    assert killed and kinds[-1] == "image_generation.completed"
    assert 2 <= len(kinds) <= 4
    again = client.images.generate(prompt="a red apple", size="64x64", extra_body=fields)
    assert again.data is not None and again.data[0].b64_json == whole
    metrics = httpx2.get(f"{running.url}/metrics").text
    assert "fluxmesh_lost_hosts_total 1" in metrics


def test_openai_s_client_edits_with_a_mask(client: openai.OpenAI) -> None:
    reply = client.images.edit(
        image=("a.png", png(), "image/png"),
        mask=("m.png", png(alpha=True), "image/png"),
        prompt="a dog",
        **SMALL,
    )
    assert reply.data is not None
    edited = np.asarray(opened(reply.data[0].b64_json))
    before = np.asarray(Image.open(io.BytesIO(png())))
    assert np.array_equal(edited[32:], before[32:])  # opaque: it stays
    assert not np.array_equal(edited[:32], before[:32])


def test_openai_s_client_raises_typed_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt="x", size="7x7x7")  # type: ignore[call-overload]
    assert refused.value.param == "size" and refused.value.code == "invalid_value"
    with pytest.raises(openai.BadRequestError, match="`n`"):
        client.images.generate(prompt="x", n=99)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")
    assert [model.id for model in client.models.list()] == ["tiny", "tiny-klein"]


def test_a_picture_is_changed_by_automatic1111_s_img2img(running: ServerProcess) -> None:
    """What its clients send for a new one is `test_serve_recorded.py`'s."""
    fields = {
        "prompt": "a dog", "batch_size": 1, "width": 64, "height": 64, "negative_prompt": "blurry",
        "steps": 2, "seed": 7, "denoising_strength": 0.5,
        "init_images": [base64.b64encode(png()).decode()],
    }  # fmt: skip
    reply = httpx2.post(f"{running.url}/sdapi/v1/img2img", json=fields, timeout=100).json()
    assert opened(reply["images"][0]).size == (64, 64)
    info = json.loads(reply["info"])
    assert (info["seed"], info["denoising_strength"]) == (7, 0.5)


def test_a_client_that_goes_frees_the_mesh_for_the_next(
    running: ServerProcess, client: openai.OpenAI, fluxmesh: Run, own_folder: Path
) -> None:
    fields = {"prompt": "a dog", "size": "64x64", "steps": 200}

    async def ask_and_go() -> None:
        async with httpx2.AsyncClient(base_url=running.url, timeout=100) as http:
            asked = asyncio.create_task(http.post("/v1/images/generations", json=fields))
            while "running" not in [
                entry["state"] for entry in (await http.get("/api/status")).json()["queue"]
            ]:
                assert not asked.done()
                await asyncio.sleep(0.02)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked

    asyncio.run(ask_and_go())
    reply = client.images.generate(prompt="a red apple", **SMALL)
    assert reply.data is not None
    metrics = httpx2.get(f"{running.url}/metrics").text
    assert 'fluxmesh_jobs_total{outcome="cancelled"} 1' in metrics


def test_a_job_paints_again_what_was_removed_of_it_and_the_same_bytes(
    running: ServerProcess,
) -> None:
    fields = {"prompt": "a dog", "width": 64, "height": 64, "steps": 2, "n_images": 3}

    def painted() -> list[bytes]:
        asked = httpx2.post(f"{running.url}/api/jobs", json={**fields, "id": "some-of-it-again"})
        assert asked.status_code == 202
        told = httpx2.get(f"{running.url}/api/jobs/some-of-it-again/events", timeout=100).text
        assert "event: done" in told
        names = json.loads(told.rsplit("data: ", 1)[1])["pictures"]
        urls.update((name, f"{running.url}/api/pictures/{name}") for name in names)
        return [httpx2.get(urls[name]).content for name in names]

    urls: dict[str, str] = {}
    before = painted()
    for name in sorted(urls)[::2]:  # the first and the last: two parts, with one between them
        assert httpx2.delete(urls[name]).status_code == 204
    assert painted() == before and len(set(before)) == len(urls) == 3


def test_a_job_is_seen_by_status_finished_at_ctrl_c_and_there_after_a_restart(
    tmp_path: Path, home: Path, fluxmesh: Run
) -> None:
    # The first job runs on until a command has started and looked.
    env = environment(home) | {"FLUXMESH_DELAYS": "step=1"}
    pictures = tmp_path / "pictures"
    with server("--model", "tiny", "--pictures", pictures, environment=env, folder=tmp_path) as it:
        fields = {"prompt": "a dog", "width": 64, "height": 64, "steps": 20, "id": "the-first-job"}
        assert httpx2.post(f"{it.url}/api/jobs", json=fields).status_code == 202
        waiting = {**fields, "id": "the-second-job"}
        httpx2.post(f"{it.url}/api/jobs", json=waiting)
        while "Server" not in (shown := fluxmesh("status").out):  # it gives a server two seconds
            assert "running" in httpx2.get(f"{it.url}/api/status").text
        assert f"Server {it.url}: 2 jobs." in shown and "place 1" in shown, shown
        lines: list[str] = []

        def follow() -> None:
            with httpx2.stream(
                "GET", f"{it.url}/api/jobs/the-first-job/events", timeout=100
            ) as answer:
                lines.extend(answer.iter_lines())

        following = threading.Thread(target=follow)
        following.start()
        while not any(line == "event: step" for line in lines):
            time.sleep(0.02)
        it.signal()
        following.join(100)
        assert "event: done" in lines
        assert it.ended() == 0, it.log
        assert "Finishing what runs" in it.log and "Traceback" not in it.log
        assert "a dog" not in it.log
    with server("--model", "tiny", "--pictures", pictures, environment=env, folder=tmp_path) as it:
        listed = httpx2.get(f"{it.url}/api/pictures").json()["pictures"]
        assert len(listed) == 1 and listed[0]["recipe"]["prompt"] == "a dog"
        httpx2.post(f"{it.url}/api/jobs", json={**fields, "steps": 200, "id": "the-third-job"})
        it.process.kill()
        it.process.wait()
    with server("--model", "tiny", "--pictures", pictures, environment=env, folder=tmp_path) as it:
        lost = httpx2.get(f"{it.url}/api/jobs/the-third-job/events").text
        assert '"code": "lost"' in lost
        while "Server" not in (shown := fluxmesh("status").out):  # it gives a server two seconds
            assert httpx2.get(f"{it.url}/api/status").is_success
        assert shown.count("Server") == 1
        it.signal()
        assert it.ended() == 0
    assert "Server" not in fluxmesh("status").out
