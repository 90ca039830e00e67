"""The face of AUTOMATIC1111's web UI, on a lane that paints grey."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from fluxmesh.weights import hub
from fluxmesh_coordinator.server.faces.automatic1111 import without_loras
from tests.checkpoints import make_checkpoint
from tests.serving import Serving, opened, png, serving_thread, text, wait_until_running


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


def test_what_is_wrong_is_named_as_automatic1111_s_clients_name_it(serving: Serving) -> None:
    with serving.client() as client:
        for path, fields, name in (
            ("txt2img", {"prompt": "a dog <lora:foo:0.8>"}, "prompt"),
            ("img2img", {"prompt": "a dog", "init_images": [text(png())] * 2}, "init_images"),
            ("options", {"sd_model_checkpoint": "sd15"}, "sd_model_checkpoint"),
        ):
            answer = client.post(f"/sdapi/v1/{path}", json=fields)
            assert answer.status_code in (400, 404) and f"`{name}`" in answer.json()["detail"]


def test_lists_of_what_only_stable_diffusion_has_are_there_and_empty(serving: Serving) -> None:
    empty = (
        *("extensions", "face-restorers", "hypernetworks", "latent-upscale-modes"),
        *("prompt-styles", "realesrgan-models", "script-info", "sd-modules", "sd-vae"),
    )
    with serving.client() as client:
        for name in empty:
            answer = client.get(f"/sdapi/v1/{name}")
            assert (answer.status_code, answer.json()) == (200, []), name
        assert client.get("/sdapi/v1/embeddings").json() == {"loaded": {}, "skipped": {}}
        assert client.get("/sdapi/v1/scripts").json() == {"txt2img": [], "img2img": []}
        assert client.get("/sdapi/v1/cmd-flags").json() == {}
        ram = client.get("/sdapi/v1/memory").json()["ram"]
        assert 0 < ram["free"] <= ram["total"] == ram["free"] + ram["used"]


def test_a_refresh_looks_at_the_files_again(
    serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_checkpoint(tmp_path / "my-new").path

    def names(client: TestClient, listed: str, key: str) -> set[str]:
        return {entry[key] for entry in client.get(f"/sdapi/v1/{listed}").json()}

    with serving.client() as client:
        assert "my-new" not in names(client, "sd-models", "model_name")
        known = list(hub.names_here())
        monkeypatch.setattr(hub, "names_here", lambda: iter([*known, str(model)]))
        for listed in ("loras", "vae", "embeddings"):
            answer = client.post(f"/sdapi/v1/refresh-{listed}")
            assert (answer.status_code, answer.json()) == (200, None)
        assert "my-new" not in names(client, "sd-models", "model_name")  # within half a minute
        assert client.post("/sdapi/v1/refresh-checkpoints").json() is None
        assert "my-new" in names(client, "sd-models", "model_name")
        (serving.adapters / "robot.safetensors").write_bytes(b"new")
        assert client.post("/sdapi/v1/refresh-loras").status_code == 200
        assert names(client, "loras", "name") == {"robot"}
        assert client.get("/sdapi/v1/refresh-loras").status_code == 405


def test_skip_ends_the_last_picture_of_a_job_and_says_that_no_other_ends_alone(
    serving: Serving,
) -> None:
    with serving.client() as client:
        assert client.post("/sdapi/v1/skip").json() is None  # nothing is painted
        serving.lane.may_go.clear()
        sent = serving_thread(client, "/sdapi/v1/txt2img", {"prompt": "a dog", "batch_size": 2})
        wait_until_running(serving)
        refused = client.post("/sdapi/v1/skip")
        assert refused.status_code == 409 and "has 2 pictures to paint" in refused.json()["detail"]
        assert serving.lane.painted[0].stage == "running"
        client.post("/sdapi/v1/interrupt")
        assert sent().json()["images"] == []
        sent = serving_thread(client, "/sdapi/v1/txt2img", {"prompt": "a cat"})
        while len(serving.lane.painted) < 2:
            time.sleep(0.005)
        other = client.post("/sdapi/v1/skip", headers={"x-fluxmesh-client": "another"})
        assert other.status_code == 200 and serving.lane.painted[1].stage == "running"
        assert client.post("/sdapi/v1/skip").status_code == 200
        assert sent().status_code == 200 and serving.lane.painted[1].stage == "cancelled"
