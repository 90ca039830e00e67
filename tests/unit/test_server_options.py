"""What a request may say beside the common fields, on each face: taken, or refused by name."""

from __future__ import annotations

import re
import threading
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fluxmesh.images import parse_margins
from fluxmesh_coordinator.artifacts.pictures import encode_png
from fluxmesh_coordinator.commands.settings import GenerateSettings
from fluxmesh_coordinator.server.faces import bodies
from fluxmesh_coordinator.server.faces.api_fields import CALLED, OPTIONS
from fluxmesh_coordinator.server.faces.openapi import JOB
from fluxmesh_coordinator.server.paint_request import PaintRequest
from fluxmesh_coordinator.server.threads import SMALL
from tests.serving import Serving, png, text, wait_until_running

JSON = "application/json"
FACES = ["/api/jobs", "/v1/images/generations", "/sdapi/v1/txt2img"]


def asked_by(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, path: str, sent: dict[str, Any]
) -> tuple[Any, PaintRequest | None]:
    """The answer, and the request that was made of it."""
    heard: list[PaintRequest] = []
    resolve = serving.service.resolver.resolve

    async def noted(asked: PaintRequest) -> Any:
        heard.append(asked)
        return await resolve(asked)

    monkeypatch.setattr(serving.service.resolver, "resolve", noted)
    with serving.client() as client:
        answer = client.post(path, json={"prompt": "a dog", **sent})
        if answer.is_success:
            wait_until_running(serving)
    return answer, heard[0] if heard else None


@pytest.mark.parametrize("path", FACES)
def test_every_face_takes_what_the_command_line_takes(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    sent = {
        "bits": 4, "text_bits": 8, "dtype": "float16", "cache": 0.1, "t5_padding": False,
        "fuse_adapters": True,
    }  # fmt: skip
    answer, asked = asked_by(serving, monkeypatch, path, sent)
    assert answer.status_code in (200, 202), answer.text
    assert asked is not None
    assert (asked.bits, asked.text_bits, asked.dtype) == (4, 8, "float16")
    request = asked.settings(serving.service.catalogue).request("a dog", 0)
    assert (request.bits, request.text_bits, request.dtype) == (4, 8, "float16")
    assert (request.cache, request.t5_padding, request.fuse_adapters) == (0.1, False, True)


@pytest.mark.parametrize("path", FACES)
@pytest.mark.parametrize(
    ("sent", "name"),
    [({"bits": 7}, "bits"), ({"text_bits": 2}, "text_bits"), ({"dtype": "int8"}, "dtype"),
     ({"cache": 2}, "cache"), ({"t5_padding": "perhaps"}, "t5_padding"),
     ({"control": text(png())}, "control"), ({"outpaint": [1, 2, 3]}, "outpaint"),
     ({"outpaint": "9" * 5000}, "outpaint"), ({"outpaint": {"left": 1}}, "outpaint"),
     ({"outpaint": [0, 0, 64, 0]}, "outpaint")],
)  # fmt: skip
def test_what_is_wrong_with_them_is_told_by_name(
    serving: Serving, path: str, sent: dict[str, Any], name: str
) -> None:
    with serving.client() as client:
        answer = client.post(path, json={"prompt": "a dog", **sent})
    assert answer.status_code == 400 and f"`{name}`" in answer.text, answer.text


def test_a_border_is_painted_around_a_picture(serving: Serving) -> None:
    serving.lane.may_go.clear()
    sent = {"prompt": "a dog", "image": text(png()), "outpaint": [0, 0, 64, 0]}
    with serving.client() as client:
        assert client.post("/api/jobs", json=sent).status_code == 202
        wait_until_running(serving)
        ready = serving.lane.painted[0].ready
        assert ready is not None and ready.resolved.request.source is not None
        source = ready.resolved.request.source
        assert source.pixels.shape == (128, 192, 3) and source.mask is not None
        assert source.mask[:, 128:].min() == 255 and source.strength == 1.0
        sent["outpaint"] = "0,0,64,0"  # as a form has it
        assert client.post("/api/jobs", json=sent).status_code == 202
        sent["outpaint"] = [9000, 0, 0, 0]
        assert client.post("/api/jobs", json=sent).status_code == 400
    assert parse_margins("0,0,64,0") == (0, 0, 64, 0)


def test_every_option_of_the_command_line_is_taken_or_refused_by_name(serving: Serving) -> None:
    taken, names = set(JOB["properties"]), {each.name for each in fields(GenerateSettings)}
    with serving.client() as client:
        for name in sorted((names | OPTIONS | set(CALLED)) - taken):
            answer = client.post("/api/jobs", json={"prompt": "x", name: 1})
            error = answer.json()["error"]
            assert answer.status_code == 400
            if name in CALLED:
                named = set(re.findall(r"`(\w+)`", error["message"]))
                assert named and named <= taken and f"'{name}' is called" in error["message"]
            else:
                assert error["message"].startswith(f"'{name}' is an option of the command line")
        for path in ("/api/jobs", "/api/plan"):
            error = client.post(path, json={"prompt": "x", "stepz": 3}).json()["error"]
            assert error["setting"] == "stepz" and "did you mean steps?" in error["message"]
    assert serving.lane.painted == []


def test_every_field_that_is_described_is_read(serving: Serving) -> None:
    """A field of a kind that it can't have is refused by its name: so somebody looks at it."""
    with serving.client() as client:
        for name in set(JOB["properties"]) - {"prompt"}:
            wrong: Any = {"neither": "nor"}
            answer = client.post("/api/jobs", json={"prompt": "x", name: wrong})
            assert answer.status_code == 400 and f"`{name}`" in answer.text, (name, answer.text)


@pytest.mark.parametrize("path", FACES)
def test_a_seed_of_minus_one_is_drawn(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    answer, asked = asked_by(serving, monkeypatch, path, {"seed": -1})
    assert answer.status_code in (200, 202), answer.text
    assert asked is not None and asked.seed is None and serving.lane.painted[0].seed >= 0


@pytest.mark.parametrize("path", FACES)
def test_bytes_that_are_no_text_are_no_prompt(serving: Serving, path: str) -> None:
    with serving.client() as client:
        answer = client.post(path, json={"prompt": "a \0 dog"})
        assert answer.status_code == 400 and "zero byte" in answer.text
        form = {"prompt": (None, b"\xff\xfe\x00")}
        answer = client.post("/api/jobs", files=form)
        assert answer.status_code == 400 and "zero byte" in answer.text
        half = {"content": rb'{"prompt": "a \ud800 dog"}', "headers": {"content-type": JSON}}
        answer = client.post(path, **half)
        assert answer.status_code == 400 and "`prompt` has half of a surrogate" in answer.text
        whole = {**half, "content": rb'{"prompt": "a \ud83d\udc36", "width": 16, "height": 16}'}
        assert client.post(path, **whole).is_success
        wait_until_running(serving)  # a job is accepted before it is
    (painted,) = serving.lane.painted
    assert painted.ready is None or painted.ready.resolved.request.prompt == "a \U0001f436"


def test_what_is_wrong_with_pictures_names_their_field(tmp_path: Path) -> None:
    """As the face calls it, also where the library finds it out."""
    serving = Serving(tmp_path, model=None)  # any model may be taken for references
    small, tall, square = (text(png(*size)) for size in ((32, 64), (64, 640), (64, 64)))
    openai = {"prompt": "x", "size": "64x64"}
    own = {"prompt": "x", "width": 64, "height": 64}
    wide = {"image": square, "outpaint": [0, 0, 9000, 0]}
    cases: list[tuple[str, dict[str, Any], str, str]] = [
        ("/v1/images/edits", {**openai, "image": small}, "image", "is too small"),
        ("/v1/images/edits", {**openai, "image": tall}, "image", "is too narrow"),
        ("/v1/images/edits", {**openai, "image": [square] * 16}, "image", "are 16; give 10"),
        ("/api/jobs", {**own, "references": [square, small]}, "references", "picture 2 of 2"),
        ("/api/jobs", {"prompt": "x", **wide}, "outpaint", "a picture of 64x90"),
    ]
    with serving.client() as client:
        for path, sent, name, sentence in cases:
            answer = client.post(path, json=sent)
            error = answer.json()["error"]
            assert answer.status_code == 400, answer.text
            assert error.get("param", error.get("setting")) == name, error
            assert error["message"].startswith(f"`{name}`") and sentence in error["message"]
    assert not serving.lane.painted


@pytest.mark.parametrize("path", FACES[:2])
def test_an_idempotency_key_that_is_wrong_is_called_what_it_is(serving: Serving, path: str) -> None:
    headers = {"idempotency-key": "no good!"}
    with serving.client() as client:
        answer = client.post(path, json={"prompt": "x"}, headers=headers)
        assert answer.status_code == 400
        message = answer.json()["error"]["message"]
        assert message.startswith("`Idempotency-Key`") and "`id`" not in message
        if path == "/api/jobs":
            answer = client.post(path, json={"prompt": "x", "id": "no good!"}, headers=headers)
            assert answer.json()["error"]["message"].startswith("`id`")


def test_a_large_body_of_json_is_read_in_a_thread(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of 64 MiB takes a second, in which the event loop would hear nobody."""
    threads: list[str] = []
    parsed = bodies.parsed

    def noted(data: bytes, setting: str) -> Any:
        threads.append(threading.current_thread().name)
        return parsed(data, setting)

    monkeypatch.setattr(bodies, "parsed", noted)
    with serving.client() as client:
        body = b'{"prompt": "x"}' + b" " * SMALL
        assert client.post("/api/jobs", content=body).status_code == 202
    assert len(threads) == 1 and threads[0].startswith("asyncio_")


@pytest.mark.parametrize("large", ["image", "negative_prompt"])
def test_what_was_asked_is_hashed_in_a_thread_where_it_is_large(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, large: str
) -> None:
    threads: list[str] = []
    fingerprint = PaintRequest.fingerprint

    def noted(asked: PaintRequest) -> str:
        threads.append(threading.current_thread().name)
        return fingerprint.fget(asked)  # type: ignore[attr-defined, no-any-return]

    monkeypatch.setattr(PaintRequest, "fingerprint", property(noted))
    with serving.client() as client:
        noise = np.random.default_rng(1).integers(0, 256, (256, 256, 3), np.uint8)
        value = text(encode_png(noise, None)) if large == "image" else "x" * (SMALL + 1)
        client.post("/api/jobs", json={"prompt": "x", large: value})
    assert len(threads) == 1 and threads[0].startswith("asyncio_")
