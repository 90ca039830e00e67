"""The server's three faces, on a lane that paints grey: fields, replies, streams, typed errors."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from fluxmesh_coordinator.server.faces.automatic1111 import without_loras
from fluxmesh_coordinator.server.faces.openapi import document
from fluxmesh_coordinator.server.guard.access import Access
from fluxmesh_coordinator.server.paint_request import PaintRequest
from fluxmesh_coordinator.server.problems import ProblemError
from fluxmesh_coordinator.server.queue.fair_queue import QueueBounds
from tests.flux2_checkpoint import make_flux2
from tests.serving import Serving


@pytest.fixture
def serving(tmp_path: Path) -> Serving:
    return Serving(tmp_path)


def png(width: int = 128, height: int = 128, alpha: bool = False) -> bytes:
    pixels = np.full((height, width, 4), 255, np.uint8)
    pixels[: height // 2, :, 3] = 0
    out = io.BytesIO()
    Image.fromarray(pixels if alpha else pixels[:, :, :3]).save(out, "PNG")
    return out.getvalue()


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def opened(encoded: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def sse(body: str) -> list[dict[str, str]]:
    """Server-sent events: a field by its name, an event a dictionary; comments left out."""
    events = []
    for block in body.split("\n\n"):
        lines = [line.split(": ", 1) for line in block.splitlines() if not line.startswith(":")]
        if lines:
            events.append({line[0]: line[1] for line in lines})
    return events


def wait_until_running(serving: Serving) -> None:
    limit = time.monotonic() + 60
    while not serving.lane.painted:
        assert time.monotonic() < limit
        time.sleep(0.005)


# OpenAI


def test_generations_as_a_program_of_openai_asks(serving: Serving) -> None:
    with serving.client() as client:
        fields = {
            "prompt": "a red apple", "model": "dall-e-3", "n": 3, "size": "160x128", "seed": 7,
            "quality": "hd", "style": "vivid", "moderation": "low", "unknown": [1],
        }  # fmt: skip
        answer = client.post("/v1/images/generations", json=fields)
    assert answer.status_code == 200
    reply = answer.json()
    assert [opened(entry["b64_json"]).size for entry in reply["data"]] == [(160, 128)] * 3
    assert reply["size"] == "160x128" and reply["output_format"] == "png"
    assert reply["usage"]["total_tokens"] == 0 and reply["background"] == "opaque"
    job = serving.lane.painted[0]
    assert (job.seed, job.model, job.n_images) == (7, "tiny", 3)


def test_a_url_answers_with_a_picture_at_exactly_its_path(serving: Serving) -> None:
    with serving.client() as client:
        fields = {"prompt": "a dog", "response_format": "url", "output_format": "jpeg"}
        reply = client.post("/v1/images/generations", json=fields).json()
        url = reply["data"][0]["url"]
        assert url.startswith("http://127.0.0.1:8420/api/pictures/")
        answer = client.get(url, follow_redirects=False)
        assert answer.status_code == 200 and answer.headers["content-type"] == "image/png"
        assert Image.open(io.BytesIO(answer.content)).size == (128, 128)
        assert reply["output_format"] == "png"


@pytest.mark.parametrize(("name", "kind"), [("jpeg", "JPEG"), ("webp", "WEBP"), ("png", "PNG")])
def test_pictures_come_in_the_format_that_was_asked_for(
    serving: Serving, name: str, kind: str
) -> None:
    with serving.client() as client:
        fields = {"prompt": "a dog", "output_format": name, "output_compression": 40}
        reply = client.post("/v1/images/generations", json=fields).json()
    assert opened(reply["data"][0]["b64_json"]).format == kind
    assert reply["output_format"] == name


def test_a_stream_shows_as_many_partial_pictures_as_were_asked_for(serving: Serving) -> None:
    fields = {"prompt": "a dog", "n": 2, "stream": True, "partial_images": 2}
    serving.lane.seconds = 0.05  # a step: who reads is slow beside a lane that only pretends
    with serving.client() as client:
        answer = client.post("/v1/images/generations", json=fields)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(event["data"]) for event in sse(answer.text)]
    kinds = [event["type"].removeprefix("image_generation.") for event in events]
    assert kinds == ["partial_image", "partial_image", "completed"] * 2
    assert [event.get("partial_image_index") for event in events[:3]] == [0, 1, None]
    assert all(event["size"] == "128x128" and event["created_at"] for event in events)
    assert all(opened(event["b64_json"]).format == "PNG" for event in events)
    assert events[2]["usage"]["total_tokens"] == 0


def test_edits_take_forms_as_programs_send_them(serving: Serving) -> None:
    fields = {"prompt": "a hat", "n": "2", "size": "auto", "background": "auto", "stream": "true"}
    files = {
        "image[]": ("a.png", png(), "image/png"),
        "mask": ("m.png", png(alpha=True), "image/png"),
    }
    with serving.client() as client:
        answer = client.post("/v1/images/edits", data=fields, files=files)
    kinds = [json.loads(event["data"])["type"] for event in sse(answer.text)]
    assert kinds == ["image_edit.completed"] * 2
    recipe = serving.pictures.newest(1)[0][0].recipe
    assert recipe["from_picture"] and recipe["strength"] == 1.0


def test_where_a_mask_is_transparent_is_painted_anew(serving: Serving) -> None:
    serving.lane.may_go.clear()
    with serving.client() as client:
        fields = {"prompt": "a hat", "image": text(png()), "mask": text(png(alpha=True))}
        client.post("/api/jobs", json=fields)
        wait_until_running(serving)
        ready = serving.lane.painted[0].ready
        assert ready is not None and ready.resolved.request.source is not None
        mask = ready.resolved.request.source.mask
        assert mask is not None and mask[:64].min() == 255 and mask[64:].max() == 0


def test_an_edit_takes_a_model_that_edits_where_nobody_chose_one(tmp_path: Path) -> None:
    """`tiny`, which paints where nothing is named, would paint over the first picture."""
    files = [("image[]", (f"{k}.png", png(64, 64), "image/png")) for k in range(2)]
    under_mask = [files[0], ("mask", ("m.png", png(64, 64, alpha=True), "image/png"))]
    for given, sent, painter, is_over in (
        (None, files, "tiny-klein", False),
        (None, under_mask, "tiny", True),
        ("tiny", files[:1], "tiny", True),  # of whom it is known that it paints over
    ):
        folder = tmp_path / f"{given}-{len(sent)}-{painter}"
        folder.mkdir()
        serving = Serving(folder, model=given)
        with serving.client() as client:
            answer = client.post("/v1/images/edits", data={"prompt": "larger"}, files=sent)
            assert answer.status_code == 200, answer.text
            job = serving.lane.painted[0]
            recipe = serving.pictures.newest(1)[0][0].recipe
            assert (job.model, recipe["from_picture"]) == (painter, is_over)
            fields = {"prompt": "larger", "references": [text(png(64, 64))]}
            answer = client.post("/api/jobs", json=fields)
            if given is None:
                assert answer.status_code == 202, answer.text
                models = client.get("/api/models").json()["models"]
                assert models[0]["name"] == "tiny"  # still what paints where nothing is named
                assert {"tiny": "MIT", "tiny-klein": "MIT"}.items() <= {
                    model["name"]: model["licence"] for model in models
                }.items()
                assert all(model["embedded"] for model in models)
            else:
                assert "tiny-klein does" in answer.json()["error"]["message"]


def test_a_model_that_takes_references_is_shown_all_pictures_of_an_edit(tmp_path: Path) -> None:
    model = make_flux2(tmp_path / "my-klein")
    serving = Serving(tmp_path, model=str(model))
    assert not serving.service.catalogue.model("my-klein").described()["embedded"]
    serving.lane.may_go.clear()
    files = [("image[]", (f"{k}.png", png(64, 64), "image/png")) for k in range(2)]
    with serving.client() as client:
        known = client.get("/api/models").json()["models"][0]
        assert known["name"] == "my-klein" and known["max_references"] > 1
        assert "references" in known["takes"]
        fields = {"prompt": "a hat", "stream": "true"}
        sent = in_thread(lambda: client.post("/v1/images/edits", data=fields, files=files))
        wait_until_running(serving)
        ready = serving.lane.painted[0].ready
        assert ready is not None and len(ready.resolved.request.references) == 2
        assert ready.resolved.request.source is None and serving.lane.painted[0].nbytes > 0
        serving.lane.may_go.set()
        assert "image_edit.completed" in sent().text
        assert str(tmp_path) not in sent().text
        fields = {"prompt": "x", "references": [text(png(64, 64))] * 11}
        assert client.post("/api/jobs", json=fields).json()["error"]["setting"] == "references"
        for strengths, sentence in (
            ([0.5, 1.0], "are 2 for 1 references"),
            (["much"], "can't be read; send [1.0, 0.8]"),
            ([0.5], "my-klein takes no strength of a reference picture"),
        ):
            fields = {"prompt": "x", "references": [text(png(64, 64))]}
            fields |= {"reference_strengths": strengths}
            error = client.post("/api/jobs", json=fields).json()["error"]
            assert error["setting"] == "reference_strengths" and sentence in error["message"]


def test_a_model_that_takes_none_says_who_does(serving: Serving) -> None:
    with serving.client() as client:
        fields = {"prompt": "x", "references": [text(png())]}
        error = client.post("/api/jobs", json=fields).json()["error"]
        assert error["setting"] == "references" and "tiny takes no reference" in error["message"]


@pytest.mark.parametrize(
    ("fields", "setting"),
    [
        ({}, "prompt"),
        ({"prompt": "  "}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": "x" * 40_000}, "prompt"),
        ({"prompt": "x", "n": 11}, "n"),
        ({"prompt": "x", "n": 0}, "n"),
        ({"prompt": "x", "n": 1.5}, "n"),
        ({"prompt": "x", "n": "many"}, "n"),
        ({"prompt": "x", "size": "large"}, "size"),
        ({"prompt": "x", "size": "99999x99999"}, "size"),
        ({"prompt": "x", "steps": 100_000}, "steps"),
        ({"prompt": "x", "steps": 0}, "steps"),
        ({"prompt": "x", "num_inference_steps": 0}, "steps"),
        ({"prompt": "x", "seed": -4}, "seed"),
        ({"prompt": "x", "seed": 2**70}, "seed"),
        ({"prompt": "x", "guidance": 1e9}, "guidance"),
        ({"prompt": "x", "response_format": "tape"}, "response_format"),
        ({"prompt": "x", "output_format": "exe"}, "output_format"),
        ({"prompt": "x", "output_compression": 101}, "output_compression"),
        ({"prompt": "x", "stream": True, "partial_images": 4}, "partial_images"),
        ({"prompt": "x", "stream": "perhaps"}, "stream"),
        ({"prompt": "x", "loras": [7]}, "loras"),
        ({"prompt": "x", "loras": ["../../etc/passwd"]}, "loras"),
        ({"prompt": "x", "size": "4096x4096"}, "size"),
    ],
)
def test_a_wrong_field_is_named_as_the_client_calls_it(
    serving: Serving, fields: dict[str, Any], setting: str
) -> None:
    with serving.client() as client:
        answer = client.post("/v1/images/generations", json=fields)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["param"] == setting or f"`{setting}`" in error["message"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"].endswith(".")
    assert serving.lane.painted == []


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"[1]", "application/json", 400),
        (b'{"prompt": NaN}', "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"prompt=x", "application/x-www-form-urlencoded", 415),
        (b"prompt", "text/plain", 415),
        (b"--x", "multipart/form-data", 400),
        (b"nothing", "multipart/form-data; boundary=x", 400),
        (b"", "application/json", 400),
    ],
)
def test_a_body_that_is_none_is_refused(
    serving: Serving, body: bytes, kind: str, status: int
) -> None:
    with serving.client() as client:
        for path in ("/v1/images/generations", "/v1/images/edits", "/sdapi/v1/txt2img"):
            answer = client.post(path, content=body, headers={"content-type": kind})
            assert answer.status_code == status, (path, answer.text)


def test_without_a_model_of_its_own_a_server_paints_with_the_best_that_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    serving = Serving(tmp_path, model=None)
    with serving.client() as client:
        assert client.get("/api/models").json()["default"] == "tiny"
        fields = {"prompt": "a dog", "model": "gpt-image-1", "size": "64x64"}
        assert client.post("/v1/images/generations", json=fields).status_code == 200
        assert client.get("/sdapi/v1/options").json()["sd_model_checkpoint"] == "tiny"
    assert [job.model for job in serving.lane.painted] == ["tiny"]


def test_models_are_listed_and_found(serving: Serving) -> None:
    with serving.client() as client:
        listed = client.get("/v1/models").json()
        assert listed["object"] == "list" and listed["data"][0]["id"] == "tiny"
        assert client.get("/v1/models/tiny").json()["object"] == "model"
        assert client.get("/v1/models/nothing").json()["error"]["code"] == "model_not_found"


# AUTOMATIC1111


def test_txt2img_answers_with_an_info_that_its_clients_read(serving: Serving) -> None:
    fields = {  # as LibreChat's tool and Open WebUI send it
        "prompt": "a red apple", "negative_prompt": "blurry", "width": 130, "height": 120,
        "batch_size": 1, "n_iter": 2, "steps": 2, "seed": -1, "cfg_scale": 4.5,
        "sampler_name": "DPM++ 3M SDE", "scheduler": "Karras",
    }  # fmt: skip
    with serving.client() as client:
        reply = client.post("/sdapi/v1/txt2img", json=fields).json()
    assert [opened(image).size for image in reply["images"]] == [(128, 128)] * 2
    info = json.loads(reply["info"])
    job = serving.lane.painted[0]
    assert info["seed"] == job.seed and info["all_seeds"] == [job.seed, job.seed + 1]
    assert (info["width"], info["height"], info["steps"]) == (128, 128, 2)
    assert len(info["infotexts"]) == 2 and f"Seed: {job.seed}" in info["infotexts"][0]
    assert set(info["without_effect"]) == {"negative_prompt", "cfg_scale"}


@pytest.mark.parametrize("kind", ["opaque", "inverted"])
def test_img2img_reads_masks_as_its_clients_draw_them(serving: Serving, kind: str) -> None:
    """White strokes on nothing are painted; `inpainting_mask_invert` turns black and white."""
    pixels = np.full((128, 128, 4), 255, np.uint8)
    pixels[64:, :, 3 if kind == "opaque" else slice(3)] = 0
    if kind == "inverted":
        pixels = 255 - pixels[:, :, :3]
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    fields = {
        "prompt": "a hat",
        "init_images": [text(png())],
        "mask": text(out.getvalue()),
        "inpainting_mask_invert": int(kind == "inverted"),
    }
    with serving.client() as client:
        serving.lane.may_go.clear()
        sent = serving_thread(client, "/sdapi/v1/img2img", fields)
        wait_until_running(serving)
        ready = serving.lane.painted[0].ready
        assert ready is not None and ready.resolved.request.source is not None
        mask = ready.resolved.request.source.mask
        serving.lane.may_go.set()
        assert sent().status_code == 200
    assert mask is not None and mask[:64].min() == 255 and mask[64:].max() == 0


def test_img2img_paints_where_its_mask_is_white(serving: Serving) -> None:
    mask = np.zeros((128, 128), np.uint8)
    mask[:64] = 255
    out = io.BytesIO()
    Image.fromarray(mask).save(out, "PNG")
    fields = {
        "prompt": "a hat",
        "init_images": [f"data:image/png;base64,{text(png())}"],
        "mask": text(out.getvalue()),
        "denoising_strength": 0.5,
        "seed": 3,
    }
    serving.lane.may_go.clear()
    with serving.client() as client:
        sent = serving_thread(client, "/sdapi/v1/img2img", fields)
        wait_until_running(serving)
        ready = serving.lane.painted[0].ready
        assert ready is not None and ready.resolved.request.source is not None
        source = ready.resolved.request.source
        assert source.strength == 0.5 and source.mask is not None
        assert source.mask[:64].min() == 255 and source.mask[64:].max() == 0
        serving.lane.may_go.set()
        reply = sent()
        assert json.loads(reply.json()["info"])["denoising_strength"] == 0.5
        assert client.post("/sdapi/v1/img2img", json={"prompt": "x"}).status_code == 400


def in_thread(send: Callable[[], Any]) -> Callable[[], Any]:
    """Sends a request beside others; what it returns waits for the answer."""
    return ThreadPoolExecutor(1).submit(send).result


def serving_thread(client: TestClient, path: str, fields: dict[str, Any]) -> Any:
    """As `in_thread`, JSON to a path."""
    return in_thread(lambda: client.post(path, json=fields))


def test_progress_and_interrupt(serving: Serving) -> None:
    with serving.client() as client:
        idle = client.get("/sdapi/v1/progress").json()
        assert idle["progress"] == 0.0 and idle["current_image"] is None
        serving.lane.may_go.clear()
        sent = serving_thread(client, "/sdapi/v1/txt2img", {"prompt": "a dog"})
        wait_until_running(serving)
        state = client.get("/sdapi/v1/progress?skip_current_image=true").json()["state"]
        assert state["sampling_steps"] == 4 and state["job"] == serving.lane.painted[0].id
        other = client.post("/sdapi/v1/interrupt", headers={"x-fluxmesh-client": "another"})
        assert other.status_code == 200 and serving.lane.painted[0].stage == "running"
        client.post("/sdapi/v1/interrupt")
        assert sent().status_code == 200 and sent().json()["images"] == []


def test_options_switch_the_model_that_is_painted_with(serving: Serving) -> None:
    with serving.client() as client:
        options = client.get("/sdapi/v1/options").json()
        assert options["sd_model_checkpoint"] == "tiny"
        titles = [model["title"] for model in client.get("/sdapi/v1/sd-models").json()]
        assert "tiny" in titles
        assert client.post("/sdapi/v1/options", json=options).status_code == 200
        assert serving.service.resolver.chosen is not None
        wrong = client.post("/sdapi/v1/options", json={"sd_model_checkpoint": "sd15.safetensors"})
        assert wrong.status_code == 404 and "is not on this server" in wrong.json()["detail"]
        assert client.get("/sdapi/v1/samplers").json()[0]["name"] == "Euler"


def test_adapters_are_named_in_the_prompt(serving: Serving) -> None:
    assert without_loras("a <lora:robot:0.8> dog <lora:pen>") == (
        "a dog",
        (("robot", 0.8), ("pen", 1.0)),
    )
    assert without_loras("a  dog") == ("a  dog", ())
    (serving.adapters / "robot.safetensors").write_bytes(b"broken")
    with serving.client() as client:
        assert client.get("/sdapi/v1/loras").json()[0]["name"] == "robot"
        listed = client.get("/api/adapters").json()["adapters"]
        assert listed == [{"name": "robot", "bytes": 6}]
        for name in ("robots", "../adapters/robot", "/etc/passwd"):
            answer = client.post("/sdapi/v1/txt2img", json={"prompt": f"a <lora:{name}:1> dog"})
            assert answer.status_code == 400 and "not on this server" in answer.json()["detail"]
        answer = client.post("/sdapi/v1/txt2img", json={"prompt": "a <lora:robot:0.8> dog"})
        assert answer.status_code == 400 and answer.json()["detail"].startswith("robot.safetensors")
        assert str(serving.folder) not in answer.text


# fluxmesh's own


def test_a_job_is_sent_followed_and_found_in_the_gallery(serving: Serving) -> None:
    fields = {"prompt": "a dog", "n_images": 2, "seed": 5, "previews": True, "id": "my-own-id-1"}
    with serving.client() as client:
        sent = client.post("/api/jobs", json=fields)
        assert sent.status_code == 202
        assert sent.json() == {"id": "my-own-id-1", "place": 1, "seconds_left": 0.0, "seed": 5}
        events = sse(client.get("/api/jobs/my-own-id-1/events").text)
        kinds = [event["event"] for event in events]
        assert kinds[:2] == ["queued", "planned"] and kinds[-1] == "done"
        assert kinds.count("step") == 8 and kinds.count("picture") == 2
        pictures = json.loads(events[-1]["data"])["pictures"]
        seen = {"last-event-id": events[5]["id"]}
        later = sse(client.get("/api/jobs/my-own-id-1/events", headers=seen).text)
        assert later and all(int(event["id"]) > int(events[5]["id"]) for event in later)
        listed = client.get("/api/pictures?limit=1").json()
        assert listed["pictures"][0]["name"] == pictures[1] == listed["next"]
        assert listed["pictures"][0]["recipe"]["seed"] == 6
        rest = client.get(f"/api/pictures?before={listed['next']}").json()
        assert [entry["name"] for entry in rest["pictures"]] == pictures[:1]
        assert rest["next"] is None
        thumbnail = client.get(listed["pictures"][0]["thumbnail_url"])
        assert thumbnail.headers["content-type"] == "image/jpeg"
        assert client.delete(f"/api/pictures/{pictures[0]}").status_code == 204
        assert client.get(f"/api/pictures/{pictures[0]}").status_code == 404


def test_a_repeated_id_is_the_same_job_and_another_request_under_it_is_refused(
    serving: Serving,
) -> None:
    with serving.client() as client:
        for _ in range(2):
            answer = client.post("/api/jobs", json={"prompt": "a dog", "id": "my-own-id-2"})
            assert answer.status_code == 202
        client.get("/api/jobs/my-own-id-2/events")
        headers = {"idempotency-key": "my-own-id-2"}
        assert (
            client.post("/api/jobs", json={"prompt": "a dog"}, headers=headers).status_code == 202
        )
        answer = client.post("/api/jobs", json={"prompt": "a cat", "id": "my-own-id-2"})
        assert answer.status_code == 409 and answer.json()["error"]["setting"] == "id"
        assert client.post("/api/jobs", json={"prompt": "x", "id": "../x"}).status_code == 400
    assert len(serving.lane.painted) == 1


def test_a_job_that_was_cancelled_can_be_asked_for_again_by_its_id(serving: Serving) -> None:
    fields = {"prompt": "a dog", "seed": 1, "id": "my-own-id-3"}
    serving.lane.seconds = 3.0  # a step, in which a job hears nothing
    with serving.client() as client:
        client.post("/api/jobs", json=fields)
        wait_until_running(serving)
        first = serving.service.job("my-own-id-3")
        assert client.delete("/api/jobs/my-own-id-3").status_code == 204
        assert client.post("/api/jobs", json=fields).status_code == 202  # before that one has ended
        second = serving.service.job("my-own-id-3")
        assert second is not first and first.stage == "running"
        serving.lane.may_go.clear()
        while not first.events.is_over:
            time.sleep(0.01)
        assert list(serving.service.journal._open) == ["my-own-id-3"]
        serving.lane.seconds = 0.001
        serving.lane.may_go.set()
        told = client.get("/api/jobs/my-own-id-3/events").text
        assert "event: done" in told and "event: cancelled" not in told
    assert [job.stage for job in (first, second)] == ["cancelled", "done"]


def test_everybody_sees_the_line_and_whose_turn_comes(serving: Serving) -> None:
    serving.lane.may_go.clear()
    with serving.client() as client:

        def send(name: str) -> dict[str, Any]:
            headers = {"x-fluxmesh-client": name}
            answer = client.post("/api/jobs", json={"prompt": "a dog"}, headers=headers)
            sent: dict[str, Any] = answer.json()
            return sent

        first = send("anna")
        wait_until_running(serving)
        second, third, ben = send("anna"), send("anna"), send("ben")
        assert [job["place"] for job in (second, third, ben)] == [1, 2, 2]
        status = client.get("/api/status", headers={"x-fluxmesh-client": "ben"}).json()
        rows = [(row["id"], row["place"], row["mine"]) for row in status["queue"]]
        assert rows == [
            (first["id"], 0, False),
            (second["id"], 1, False),
            (ben["id"], 2, True),
            (third["id"], 3, False),
        ]
        assert client.delete(f"/api/jobs/{second['id']}").status_code == 204
        events = sse(client.get(f"/api/jobs/{second['id']}/events").text)
        assert [event["event"] for event in events] == ["queued", "cancelled"]
        metrics = client.get("/metrics").text
        assert 'fluxmesh_jobs{stage="queued"} 2' in metrics
        assert 'fluxmesh_jobs_total{outcome="cancelled"} 1' in metrics
        client.delete(f"/api/jobs/{first['id']}")
        events = sse(client.get(f"/api/jobs/{first['id']}/events").text)
        assert events[-1]["event"] == "cancelled"
        serving.lane.may_go.set()
        moved = sse(client.get(f"/api/jobs/{third['id']}/events").text)
        places = [json.loads(e["data"])["place"] for e in moved if e["event"] == "queued"]
        assert places == [2, 3, 1]  # ben joined, then anna's turn became its own
    assert [job.id for job in serving.lane.painted][:2] == [first["id"], third["id"]]


def test_unknown_models_and_jobs_are_told(serving: Serving) -> None:
    with serving.client() as client:
        answer = client.post("/api/jobs", json={"prompt": "x", "model": "tinny"})
        error = answer.json()["error"]
        assert (
            answer.status_code == 404 and error["setting"] == "model" and "tiny" in error["message"]
        )
        for path in ("/etc/passwd", "black-forest-labs/FLUX.1-dev", str(serving.folder)):
            answer = client.post("/api/jobs", json={"prompt": "x", "model": path})
            assert answer.status_code == 404
        assert client.get("/api/jobs/no-such-job/events").status_code == 404
        assert client.delete("/api/jobs/no-such-job").status_code == 404
        assert client.get("/api/pictures?limit=0").status_code == 400


def test_what_no_model_takes_yet_is_an_error_of_one_sentence(serving: Serving) -> None:
    with serving.client() as client:
        answer = client.post("/api/jobs", json={"prompt": "x", "control": text(png())})
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["setting"] == "control"
        assert error["message"].count(".") == 1


def test_the_description_names_every_route_of_the_api(serving: Serving) -> None:
    described = document()["paths"]
    app = serving.app(Access.of(None))
    inner = app.routes[0].app  # type: ignore[attr-defined]
    paths = {route.path for route in inner.routes if getattr(route, "path", "").startswith("/api/")}
    ours = paths - {"/api/openapi.json", "/api/openapi.css"}
    assert ours | {"/api/session"} == set(described)
    with serving.client() as client:
        page = client.get("/api").text
        assert "POST /api/jobs" in page and "<script" not in page and "http://" not in page
        assert client.get("/api/openapi.css").headers["content-type"].startswith("text/css")


def test_metrics_are_in_prometheus_form(serving: Serving) -> None:
    with serving.client() as client:
        client.post("/v1/images/generations", json={"prompt": "a secret"})
        answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = answer.text.splitlines()
    assert 'fluxmesh_jobs_total{outcome="done"} 1' in lines
    assert "fluxmesh_pictures_total 1" in lines
    phases = [line for line in lines if line.startswith("fluxmesh_phase_seconds_total{")]
    assert [line.split('"')[1] for line in phases] == ["painting", "preparing", "queued"]
    for line in lines:
        assert line.startswith(("# HELP", "# TYPE")) or len(line.rsplit(" ", 1)) == 2
    assert "secret" not in answer.text


# Ends


def scope(path: str, body: bytes) -> dict[str, Any]:
    return {
        "type": "http", "http_version": "1.1", "method": "POST", "path": path, "raw_path": b"",
        "query_string": b"", "root_path": "", "scheme": "http", "client": ("127.0.0.1", 5),
        "server": ("127.0.0.1", 8420), "asgi": {"version": "3.0", "spec_version": "2.3"},
        "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"application/json"),
                    (b"content-length", b"%d" % len(body))],
    }  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("where", ["running", "queued"])
def test_a_client_that_disconnects_cancels_its_job(
    serving: Serving, stream: bool, where: str
) -> None:
    from fluxmesh_coordinator.server.app import application

    serving.lane.may_go.clear()
    body = json.dumps({"prompt": "a dog", "stream": stream}).encode()

    async def ask(gone: asyncio.Event) -> list[dict[str, Any]]:
        pieces: list[dict[str, Any]] = [{"type": "http.request", "body": body}]
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            if pieces:
                return pieces.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        await app(scope("/v1/images/generations", body), receive, send)
        return sent

    async def life() -> None:
        await serving.service.open()
        gone, stays = asyncio.Event(), asyncio.Event()
        others = [asyncio.create_task(ask(stays))] if where == "queued" else []
        while others and not serving.lane.painted:
            await asyncio.sleep(0.005)
        asked = asyncio.create_task(ask(gone))
        while len(serving.service.rows()) < len(others) + 1 or not serving.lane.painted:
            await asyncio.sleep(0.005)
        job = serving.service.rows()[-1].job
        assert job.stage == where
        gone.set()
        await asked
        assert (await job.events.over()).kind == "cancelled" and not job.names
        assert len(serving.service.rows()) == len(others)
        serving.lane.may_go.set()
        for other in others:
            assert (await other)[0]["status"] == 200
        await serving.service.close()

    app = application(serving.service, Access.of(None))
    asyncio.run(asyncio.wait_for(life(), 60))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_has_gone_before_its_job_was_accepted_has_none(
    serving: Serving, stream: bool
) -> None:
    from fluxmesh_coordinator.server.app import application

    serving.lane.may_go.clear()
    body = json.dumps({"prompt": "a dog", "stream": stream}).encode()
    pieces: list[dict[str, Any]] = [{"type": "http.request", "body": body}]

    async def receive() -> dict[str, Any]:
        return pieces.pop() if pieces else {"type": "http.disconnect"}

    async def send(_message: Any) -> None:
        await asyncio.sleep(0.05)  # a connection that still holds the answer before

    async def life() -> None:
        await serving.service.open()
        await app(scope("/v1/images/generations", body), receive, send)
        for _ in range(200):
            if not serving.service.rows():
                break
            await asyncio.sleep(0.01)
        rows = serving.service.rows()
        serving.lane.may_go.set()
        await serving.service.close()
        assert not rows

    app = application(serving.service, Access.of(None))
    asyncio.run(asyncio.wait_for(life(), 60))


def test_a_request_that_is_looked_at_while_the_server_ends_is_told_so(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = serving.service.resolver.resolve

    async def slow(asked: PaintRequest) -> Any:
        ready = await resolve(asked)
        await serving.service.drain()
        return ready

    monkeypatch.setattr(serving.service.resolver, "resolve", slow)

    async def life() -> None:
        await serving.service.open()
        with pytest.raises(ProblemError, match="ending"):
            await serving.service.submit(PaintRequest(prompt="a dog"), "anna")
        assert not serving.service.rows()
        await serving.service.close()

    asyncio.run(life())


def test_the_first_signal_finishes_what_runs_and_tells_those_who_wait(serving: Serving) -> None:
    from fluxmesh_coordinator.server.paint_request import PaintRequest

    async def life() -> None:
        service = serving.service
        await service.open()
        serving.lane.may_go.clear()
        running = await service.submit(PaintRequest(prompt="a dog"), "a")
        while running.stage != "running":
            await asyncio.sleep(0.005)
        waiting = await service.submit(PaintRequest(prompt="a cat"), "a")
        drained = asyncio.create_task(service.drain())
        assert (await waiting.events.over()).data["code"] == "ending"
        assert not drained.done() and running.stage == "running"
        with pytest.raises(Exception, match="ending"):
            await service.submit(PaintRequest(prompt="a bird"), "a")
        serving.lane.may_go.set()
        await drained
        assert running.stage == "done" and len(running.names) == 1
        await service.close()

    asyncio.run(asyncio.wait_for(life(), 60))


def test_the_second_signal_cancels_what_runs(serving: Serving) -> None:
    from fluxmesh_coordinator.server.paint_request import PaintRequest

    async def life() -> None:
        service = serving.service
        await service.open()
        serving.lane.may_go.clear()
        running = await service.submit(PaintRequest(prompt="a dog"), "a")
        while running.stage != "running":
            await asyncio.sleep(0.005)
        drained = asyncio.create_task(service.drain())
        await asyncio.sleep(0.02)
        service.cancel_all()
        await drained
        assert running.stage == "cancelled"
        await service.close()

    asyncio.run(asyncio.wait_for(life(), 60))


def test_twenty_clients_are_served_in_turns_and_nothing_is_lost(tmp_path: Path) -> None:
    """A sample of `tools/serve_load.py`."""
    from fluxmesh_coordinator.server.paint_request import PaintRequest

    serving = Serving(tmp_path, QueueBounds(per_client=5, per_address=100, whole=100))
    serving.lane.seconds = 0

    async def life() -> None:
        service = serving.service
        await service.open()
        serving.lane.may_go.clear()
        asked = PaintRequest(prompt="a dog", width=16, height=16, steps=1)
        jobs = [
            await service.submit(asked, f"10.0.0.1 {name}") for name in range(20) for _ in range(5)
        ]
        serving.lane.may_go.set()
        for job in jobs:
            assert (await job.events.over()).kind == "done" and len(job.names) == 1
        assert service.rows() == []
        await service.close()

    asyncio.run(asyncio.wait_for(life(), 60))
    order = [job.client for job in serving.lane.painted]
    assert len(order) == 100
    for turn in range(1, 5):  # the first began before the others came
        assert len(set(order[20 * turn : 20 * turn + 20])) >= 19
    names = [picture.name for picture in serving.pictures.newest(200)[0]]
    assert len(set(names)) == 100


def test_what_no_face_has_is_told_as_that_and_a_wrong_method_as_what_it_is(
    serving: Serving,
) -> None:
    with serving.client() as client:
        for path in ("/v1/images/variations", "/sdapi/v1/skip", "/api/nothing", "/v1/", "/api/"):
            for method in ("GET", "POST", "DELETE"):
                assert client.request(method, path).status_code == 404, (method, path)
        for method, path, allowed in (
            ("GET", "/v1/images/generations", {"POST"}),
            ("DELETE", "/sdapi/v1/options", {"GET", "HEAD", "POST"}),
            ("PUT", "/api/jobs", {"POST"}),
        ):
            answer = client.request(method, path)
            assert answer.status_code == 405 and answer.json()
            assert set(answer.headers["allow"].split(", ")) <= allowed
        assert client.get("/").headers["content-type"].startswith("text/html")
        assert client.get("/app.js").status_code == client.get("/healthz").status_code == 200
        assert client.get("/nothing.js").status_code == 404


def test_what_is_wrong_is_named_as_automatic1111_s_clients_name_it(serving: Serving) -> None:
    with serving.client() as client:
        for path, fields, name in (
            ("txt2img", {"prompt": "a dog <lora:foo:0.8>"}, "prompt"),
            ("img2img", {"prompt": "a dog", "init_images": [text(png())] * 2}, "init_images"),
            ("options", {"sd_model_checkpoint": "sd15"}, "sd_model_checkpoint"),
        ):
            answer = client.post(f"/sdapi/v1/{path}", json=fields)
            assert answer.status_code in (400, 404) and f"`{name}`" in answer.json()["detail"]
