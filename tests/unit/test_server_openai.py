"""OpenAI's face, on a lane that paints grey: fields, replies, streams, typed errors, edits."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.flux2_checkpoint import make_flux2
from tests.serving import Serving, in_thread, opened, png, sse, text, wait_until_running


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
    serving.lane.seconds = 0.3  # a step: who reads is slow beside a lane that only pretends
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
