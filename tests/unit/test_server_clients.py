"""Calls that programs send, word for word, and the shape of what they read.

From the sources of openai-python, Open WebUI, LibreChat, n8n and SillyTavern, and AUTOMATIC1111's
own API models. That they work through real sockets is `tests/integration/test_serve.py`'s.
"""

from __future__ import annotations

import base64
import json
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

from fluxmesh_coordinator.server.guard.access import Access
from fluxmesh_coordinator.server.picture_folder import PictureFolder
from tests.serving import Serving, in_thread, opened, png, sse, text, wait_until_running

KEY = "the-key-of-this-test"
BASIC = {"authorization": "Basic " + base64.b64encode(f"user:{KEY}".encode()).decode()}


def wait(until: Any) -> None:
    limit = time.monotonic() + 60
    while not until():
        assert time.monotonic() < limit
        time.sleep(0.005)


# AUTOMATIC1111


def test_open_webui_verifies_lists_switches_and_paints(serving: Serving) -> None:
    with serving.client(Access.of(KEY), headers=BASIC) as client:
        assert client.get("/sdapi/v1/options").status_code == 200
        (model, *_) = client.get("/sdapi/v1/sd-models").json()
        assert set(model) >= {"title", "model_name", "hash", "sha256", "filename", "config"}
        options = client.get("/sdapi/v1/options").json()
        options["sd_model_checkpoint"] = model["title"]
        assert client.post("/sdapi/v1/options", json=options).status_code == 200
        fields = {
            "prompt": "a dog", "batch_size": 2, "width": 512, "height": 512, "steps": 2,
            "negative_prompt": "blurry", "cfg_scale": 7.0, "sampler_name": "Euler",
            "scheduler": "simple",
        }  # fmt: skip
        reply = client.post("/sdapi/v1/txt2img", json=fields).json()
        assert set(reply) == {"images", "parameters", "info"} and len(reply["images"]) == 2
        assert isinstance(reply["info"], str) and json.loads(reply["info"])["steps"] == 2


def test_librechat_paints(serving: Serving) -> None:
    fields = {
        "prompt": "a dog", "negative_prompt": "blurry", "cfg_scale": 4.5, "steps": 22,
        "width": 1024, "height": 1024, "sampler_index": "Euler",
    }  # fmt: skip
    serving.lane.seconds = 0
    with serving.client() as client:
        reply = client.post("/sdapi/v1/txt2img", json=fields).json()
    info = json.loads(reply["info"])
    assert (info["height"], info["width"], info["seed"]) == (1024, 1024, info["all_seeds"][0])
    assert isinstance(info["infotexts"][0], str) and opened(reply["images"][0]).size == (1024, 1024)


def test_sillytavern_asks_for_lists_and_paints(serving: Serving) -> None:
    with serving.client(Access.of(KEY), headers=BASIC) as client:
        lists = {
            name: client.get(f"/sdapi/v1/{name}").json()
            for name in ("samplers", "schedulers", "upscalers", "latent-upscale-modes", "sd-vae",
                         "sd-models", "loras")
        }  # fmt: skip
        assert all(isinstance(entries, list) for entries in lists.values())
        for name in ("samplers", "schedulers", "upscalers"):
            assert lists[name] and all(isinstance(each["name"], str) for each in lists[name])
        switched = client.post(
            "/sdapi/v1/options", json={"sd_model_checkpoint": lists["sd-models"][0]["title"]}
        )
        assert switched.status_code == 200
        idle = client.get("/sdapi/v1/progress").json()
        assert idle["progress"] == 0.0 and idle["state"]["job_count"] == 0  # it waits for both
        fields = {
            "url": "http://127.0.0.1:8420", "auth": "user:key", "prompt": "a dog",
            "negative_prompt": "", "sampler_name": "Euler a", "scheduler": "Automatic",
            "steps": 2, "cfg_scale": 7, "width": 512, "height": 512, "restore_faces": True,
            "enable_hr": True, "hr_upscaler": "Latent", "hr_scale": 2, "hr_additional_modules": [],
            "denoising_strength": 0.7, "hr_second_pass_steps": 0, "seed": -1, "clip_skip": 1,
            "override_settings": {"CLIP_stop_at_last_layers": 1, "sd_vae": ""},
            "override_settings_restore_afterwards": True, "save_images": True,
            "send_images": True, "do_not_save_grid": False, "do_not_save_samples": False,
            "alwayson_scripts": {},
        }  # fmt: skip
        reply = client.post("/sdapi/v1/txt2img", json=fields).json()
        assert opened(reply["images"][0]).format == "PNG"
        assert {"restore_faces", "enable_hr"} <= set(json.loads(reply["info"])["without_effect"])


def test_a_plug_in_of_krita_changes_a_picture_under_a_mask(serving: Serving) -> None:
    fields = {
        "prompt": "a hat", "negative_prompt": "", "init_images": [text(png())],
        "mask": text(png()), "inpainting_fill": 1, "mask_blur": 4, "inpaint_full_res": False,
        "denoising_strength": 0.75, "resize_mode": 0, "width": 128, "height": 128, "steps": 2,
        "n_iter": 1, "batch_size": 1, "seed": "-1", "sampler_name": "Euler", "cfg_scale": 7.0,
    }  # fmt: skip
    with serving.client() as client:
        reply = client.post("/sdapi/v1/img2img", json=fields).json()
    assert opened(reply["images"][0]).size == (128, 128)


@pytest.mark.parametrize(
    ("sides", "size"),
    [({"width": 256}, (256, 128)), ({"height": 96}, (128, 96)), ({}, (128, 128)),
     ({"width": 64, "height": 80}, (64, 80))],
)  # fmt: skip
@pytest.mark.parametrize("call", ["txt2img", "img2img"])
def test_a_side_that_is_not_said_is_the_model_s_own(
    serving: Serving, sides: dict[str, int], size: tuple[int, int], call: str
) -> None:
    fields = {"prompt": "a dog", "steps": 2, "init_images": [text(png())], **sides}
    with serving.client() as client:
        reply = client.post(f"/sdapi/v1/{call}", json=fields).json()
    assert opened(reply["images"][0]).size == size


def test_who_asks_for_progress_sees_the_picture_come(serving: Serving) -> None:
    with serving.client() as client:
        serving.lane.seconds = 2.0  # a step, of four
        sent = in_thread(lambda: client.post("/sdapi/v1/txt2img", json={"prompt": "a dog"}))
        wait_until_running(serving)
        seen: list[dict[str, Any]] = []

        def has_picture() -> bool:
            seen.append(client.get("/sdapi/v1/progress?skip_current_image=false").json())
            return seen[-1]["current_image"] is not None

        wait(has_picture)
        assert opened(seen[-1]["current_image"]).size == (128, 128)
        state = seen[-1]["state"]
        assert set(state) == {
            "skipped", "interrupted", "stopping_generation", "job", "job_count", "job_timestamp",
            "job_no", "sampling_step", "sampling_steps",
        }  # fmt: skip
        assert 0 < seen[-1]["progress"] <= 1 and isinstance(seen[-1]["eta_relative"], float)
        skipped = client.get("/sdapi/v1/progress?skip_current_image=true").json()
        assert skipped["current_image"] is None
        serving.lane.hurries.set()
        assert sent().status_code == 200


def test_interrupt_ends_what_runs_and_what_is_finished_comes(serving: Serving) -> None:
    with serving.client() as client:
        serving.lane.seconds = 0.2  # a step, of four
        fields = {"prompt": "a dog", "batch_size": 1, "n_iter": 8, "seed": 5}
        sent = in_thread(lambda: client.post("/sdapi/v1/txt2img", json=fields))
        wait(lambda: serving.lane.painted and len(serving.lane.painted[0].names) >= 2)
        assert client.post("/sdapi/v1/interrupt").json() == {}
        reply = sent()
        assert reply.status_code == 200
        count = len(reply.json()["images"])
        info = json.loads(reply.json()["info"])
        assert 2 <= count < 8 and info["all_seeds"] == list(range(5, 5 + count))


def test_interrupt_before_the_first_picture_gives_it_as_far_as_it_was_seen(
    serving: Serving,
) -> None:
    """As there, where clients that paint a sketch stop as soon as they have seen enough."""
    with serving.client() as client:
        serving.lane.seconds = 0.05
        fields = {"prompt": "a dog", "steps": 200, "seed": 5, "width": 64, "height": 96}
        sent = in_thread(lambda: client.post("/sdapi/v1/txt2img", json=fields))
        wait(lambda: client.get("/sdapi/v1/progress").json()["current_image"] is not None)
        client.post("/sdapi/v1/interrupt")
        reply = sent()
        assert reply.status_code == 200, reply.text
        (image,) = reply.json()["images"]
        assert opened(image).size == (64, 96) and opened(image).format == "PNG"
        info = json.loads(reply.json()["info"])
        assert (info["seed"], info["all_seeds"]) == (5, [5]) and len(info["infotexts"]) == 1
        assert serving.pictures.newest(9)[0] == []  # nothing of it is kept


def test_interrupt_leaves_what_waits_behind_it_and_ends_what_waits_alone(serving: Serving) -> None:
    """As there: one call ends one picture. But there nobody waits behind somebody else."""
    serving.lane.may_go.clear()
    with serving.client() as client:

        def nothing(reply: httpx2.Response) -> bool:
            """An answer to what was interrupted before anything was to be seen."""
            info = json.loads(reply.json()["info"])
            assert info["all_seeds"] == info["infotexts"] == [] and info["seed"] >= 0
            return reply.status_code == 200 and reply.json()["images"] == []

        def send(name: str) -> Any:
            headers, before = {"x-fluxmesh-client": name}, len(serving.service.rows())
            fields = {"prompt": "a dog"}
            answer = in_thread(
                lambda: client.post("/sdapi/v1/txt2img", json=fields, headers=headers)
            )
            wait(lambda: len(serving.service.rows()) > before)
            return answer

        mine = [send("anna")]
        wait_until_running(serving)
        mine += [send("anna")]
        other = send("ben")
        client.post("/sdapi/v1/interrupt", headers={"x-fluxmesh-client": "ben"})
        wait(lambda: len(serving.service.rows()) == 2)
        assert nothing(other())
        client.post("/sdapi/v1/interrupt", headers={"x-fluxmesh-client": "anna"})
        assert nothing(mine[0]())
        wait(lambda: len(serving.lane.painted) == 2)
        serving.lane.may_go.set()
        assert mine[1]().status_code == 200


# OpenAI


def test_open_webui_and_n8n_read_what_they_asked_for(serving: Serving) -> None:
    bearer = {"authorization": f"Bearer {KEY}"}
    with serving.client(Access.of(KEY)) as client:
        listed = client.get("/v1/models", headers=bearer).json()
        assert set(listed) == {"object", "data"}
        assert set(listed["data"][0]) >= {"id", "object", "created", "owned_by"}
        fields = {"model": "dall-e-2", "prompt": "a dog", "n": 1, "size": "512x512",
                  "response_format": "b64_json"}  # fmt: skip
        reply = client.post("/v1/images/generations", json=fields, headers=bearer).json()
        assert set(reply["data"][0]) == {"b64_json"}
        # n8n lets its user choose the address, and a browser fetches it without the key.
        fields = {"prompt": "a dog", "model": "dall-e-3", "response_format": "url", "n": 1,
                  "quality": "hd", "size": "1024x1024", "style": "vivid"}  # fmt: skip
        reply = client.post("/v1/images/generations", json=fields, headers=bearer).json()
        assert set(reply["data"][0]) == {"url"}
        assert client.get(reply["data"][0]["url"]).headers["content-type"] == "image/png"


def test_librechat_and_open_webui_edit_with_forms(serving: Serving) -> None:
    fields = {"prompt": "a hat", "model": "gpt-image-1", "n": "1", "size": "auto",
              "quality": "auto", "background": "auto"}  # fmt: skip
    with serving.client() as client:
        for name in ("image", "image[]"):
            files = [(name, ("image.png", png(), "image/png"))]
            reply = client.post("/v1/images/edits", data=fields, files=files).json()
            assert opened(reply["data"][0]["b64_json"]).format == "PNG"


def test_an_event_of_a_stream_has_what_openai_s_types_want(serving: Serving) -> None:
    serving.lane.seconds = 0.3  # a step: who reads is slow beside a lane that only pretends
    fields = {"prompt": "a dog", "stream": True, "partial_images": 1}
    with serving.client() as client:
        answer = client.post("/v1/images/generations", json=fields)
    partial, completed = (json.loads(event["data"]) for event in sse(answer.text))
    common = {"type", "b64_json", "created_at", "size", "quality", "background", "output_format"}
    assert set(partial) == common | {"partial_image_index"}
    assert set(completed) == common | {"usage"}
    assert set(completed["usage"]) == {
        "input_tokens", "output_tokens", "total_tokens", "input_tokens_details",
    }  # fmt: skip


# A picture that somebody removes


class VanishingFolder(PictureFolder):
    """A folder in which every picture is removed as soon as its name is known."""

    def path(self, name: str) -> Path:
        path = super().path(name)
        path.unlink()
        return path


def vanishing(serving: Serving) -> None:
    serving.service.pictures = VanishingFolder(serving.pictures.folder)


@pytest.mark.parametrize("path", ["/v1/images/generations", "/sdapi/v1/txt2img"])
def test_a_picture_that_was_removed_is_told_and_not_a_mistake_of_ours(
    serving: Serving, path: str
) -> None:
    vanishing(serving)
    with serving.client() as client:
        answer = client.post(path, json={"prompt": "a dog"})
    assert answer.status_code == 404 and "no picture of that name" in answer.text


def test_a_stream_tells_which_picture_was_removed_and_goes_on(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = serving.pictures.read

    def first_is_gone(name: str) -> bytes:
        if name.endswith("-0.png"):
            serving.pictures.remove(name)
        return read(name)

    monkeypatch.setattr(serving.pictures, "read", first_is_gone)
    with serving.client() as client:
        fields = {"prompt": "a dog", "n": 2, "stream": True}
        answer = client.post("/v1/images/generations", json=fields)
    completed, error = (json.loads(event["data"]) for event in sse(answer.text))
    assert completed["type"] == "image_generation.completed"
    assert error["type"] == "error" and error["error"]["code"] == "no_such_picture"


@pytest.mark.parametrize(
    ("method", "more"), [("GET", ""), ("HEAD", ""), ("DELETE", ""), ("GET", "/thumbnail")]
)
def test_a_picture_that_is_removed_meanwhile_is_not_there(
    serving: Serving, method: str, more: str
) -> None:
    name = serving.pictures.commit("a-job-of-mine", 2e9, 0, png())
    vanishing(serving)
    with serving.client() as client:
        assert client.request(method, f"/api/pictures/{name}{more}").status_code == 404


def test_many_pictures_become_json_in_a_thread(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen of them are 60 MB of text: the event loop would hear nobody meanwhile."""
    from starlette.responses import JSONResponse

    threads: dict[str, str] = {}
    render = JSONResponse.render

    def noted(self: JSONResponse, content: Any) -> bytes:
        for key in {"data", "images"} & set(content):
            threads[key] = threading.current_thread().name
        return render(self, content)

    monkeypatch.setattr(JSONResponse, "render", noted)
    with serving.client() as client:
        paint(client, "/v1/images/generations")
        paint(client, "/sdapi/v1/txt2img")
    assert set(threads) == {"data", "images"}
    assert all(name.startswith("AnyIO worker") for name in threads.values())


def paint(client: TestClient, path: str) -> None:
    assert client.post(path, json={"prompt": "a dog"}).status_code == 200
