"""What image clients send, as their own sources write it, replayed before a real server.

`recorded/` has the requests, a file a client, in the order in which it sends them. Only sizes and
steps are made smaller, so that a CPU paints them at once. Each answer is read as that client does.
"""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image

from tests.integration.conftest import environment
from tests.server_process import ServerProcess, server

RECORDED = Path(__file__).parent / "recorded"
KEY = "the-key-of-these-clients"
SMALLER = {"width": 64, "height": 64, "steps": 2}
WORDS = {
    "$KEY": KEY,
    "$BASIC": base64.b64encode(f"fluxmesh:{KEY}".encode()).decode(),
    "$MODEL": "tiny",
}
TAKES = 60.0  # seconds


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("serve")
    key = folder / "key"
    key.touch(mode=0o600)
    key.write_text(f"{KEY}\n")
    options = ("--model", "tiny", "--key-file", key)
    # 200 steps are not over before a test has seen them begin.
    env = environment(folder) | {"FLUXMESH_DELAYS": "step=0.1"}
    with server(*options, environment=env, folder=folder) as process:
        yield process
        process.signal()
        assert process.ended() == 0
        assert "Traceback" not in process.log


def png() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 60, 30)).save(out, "PNG")
    return out.getvalue()


class RecordedClient:
    """A client's requests, by what they do."""

    def __init__(self, name: str, url: str) -> None:
        self.url = url
        calls = json.loads((RECORDED / f"{name}.json").read_text())["calls"]
        self.calls: dict[str, dict[str, Any]] = {call["does"]: call for call in calls}

    def ask(self, does: str, **more: Any) -> httpx2.Response:
        """As it was recorded; `more` are fields of the JSON that are others in this test."""
        call = self.calls[does]
        headers = {name: filled(value) for name, value in call["headers"].items()}
        content = b""
        if "parts" in call:
            headers["content-type"] = f"multipart/form-data; boundary={call['boundary']}"
            content = form(call)
        elif "json" in call:
            headers["content-type"] = "application/json"
            fields = more.pop("instead", None) or small(call["json"]) | more
            content = json.dumps(fields).encode()
        return httpx2.request(
            call["method"], self.url + call["path"], headers=headers, content=content, timeout=TAKES
        )

    def send(self, does: str, **more: Any) -> httpx2.Response:
        """One that has to be answered well."""
        answer = self.ask(does, **more)
        assert answer.status_code == 200, (does, answer.text)
        return answer

    def read(self, does: str, **more: Any) -> Any:
        """The JSON of the answer."""
        return self.send(does, **more).json()


def filled(text: str) -> str:
    for word, value in WORDS.items():
        text = text.replace(word, value)
    return text


def small(fields: dict[str, Any]) -> dict[str, Any]:
    """Of sizes and steps that a CPU paints at once; what is a size of the model's own stays."""
    made = {name: SMALLER.get(name, value) for name, value in fields.items()}
    if made.get("size", "auto") != "auto":
        made["size"] = "64x64"
    return {
        name: filled(value) if isinstance(value, str) else value for name, value in made.items()
    }


def form(call: dict[str, Any]) -> bytes:
    """The body as the client's own library writes it, to the byte."""
    body = b""
    for part in call["parts"]:
        name, boundary = part["name"], call["boundary"]
        if "filename" in part:
            about = f'; filename="{part["filename"]}"\r\nContent-Type: {part["type"]}'
            data, head = png(), f'Content-Disposition: form-data; name="{name}"{about}\r\n\r\n'
        else:
            text = "64x64" if name == "size" and part["text"] != "auto" else part["text"]
            data = text.encode()
            head = f'{call["text_headers"]}Content-Disposition: form-data; name="{name}"\r\n\r\n'
        body += f"--{boundary}\r\n{head}".encode() + data + b"\r\n"
    return body + f"--{call['boundary']}--\r\n".encode()


def size_of(encoded: str) -> tuple[int, int]:
    with Image.open(io.BytesIO(base64.b64decode(encoded, validate=True))) as picture:
        assert picture.format == "PNG"
        return picture.size


def test_every_recorded_call_is_replayed_below() -> None:
    names = sorted(path.stem for path in RECORDED.iterdir())
    assert names == ["librechat", "n8n", "open_webui", "sillytavern"]
    source = Path(__file__).read_text()
    for name in names:
        for does in RecordedClient(name, "").calls:
            assert f'"{does}"' in source, (name, does)


def test_open_webui_finds_models_switches_and_paints(running: ServerProcess) -> None:
    client = RecordedClient("open_webui", running.url)
    options = client.read("verify")
    assert options["sd_model_checkpoint"] == "tiny"
    listed = [(model["title"], model["model_name"]) for model in client.read("models")]
    assert ("tiny", "tiny") in listed
    client.send("set_model", instead={**options, "sd_model_checkpoint": listed[0][0]})
    reply = client.read("txt2img")
    assert [size_of(picture) for picture in reply["images"]] == [(64, 64)] * 2
    assert json.loads(reply["info"])["steps"] == 2  # it is stored beside the picture


def test_open_webui_paints_and_edits_as_with_openai(running: ServerProcess) -> None:
    client = RecordedClient("open_webui", running.url)
    entries = client.read("openai")["data"]
    assert [size_of(entry["b64_json"]) for entry in entries] == [(64, 64)] * 2
    assert not any(entry.get("url") for entry in entries)  # which it would ask first
    (entry,) = client.read("openai_url")["data"]
    head = {"authorization": f"Bearer {KEY}"}  # it sends the key along
    answer = httpx2.get(entry["url"], headers=head)
    assert answer.headers["content-type"].split("/")[0] == "image"
    (edited,) = client.read("edit")["data"]
    assert size_of(edited["b64_json"]) == (64, 64)


def test_librechat_reads_the_picture_and_what_info_says_of_it(running: ServerProcess) -> None:
    client = RecordedClient("librechat", running.url)
    reply = client.read("txt2img")
    assert size_of(reply["images"][0].split(",")[0]) == (64, 64)
    info = json.loads(reply["info"])
    assert (info["width"], info["height"]) == (64, 64)
    last = info["infotexts"][0].split("\n")[-1]
    assert f"Seed: {info['seed']}" in last and "Steps: 2" in last
    assert set(info["without_effect"]) == {"negative_prompt", "cfg_scale"}
    assert size_of(client.read("openai")["data"][0]["b64_json"]) == (128, 128)
    assert size_of(client.read("edit")["data"][0]["b64_json"]) == (64, 64)


def test_n8n_reads_the_entries(running: ServerProcess) -> None:
    (entry,) = RecordedClient("n8n", running.url).read("generate")["data"]
    assert size_of(entry["b64_json"]) == (64, 64)


def test_sillytavern_fills_its_menus(running: ServerProcess) -> None:
    """It shows nothing of a server one of whose lists it can't read."""
    client = RecordedClient("sillytavern", running.url)
    assert client.read("ping")["sd_model_checkpoint"] == "tiny"
    for does, names in (
        ("samplers", ["Euler"]),
        ("schedulers", ["simple"]),
        ("upscalers", ["None"]),  # the first one stands for none at all
        ("latent_upscalers", []),
    ):
        assert [entry["name"] for entry in client.read(does)] == names
    assert [entry["model_name"] for entry in client.read("vaes")] == []
    assert "tiny" in [entry["title"] for entry in client.read("models")]
    client.send("set_model")
    state = client.read("progress")  # until nothing is done any more, it waits
    assert (state["progress"], state["state"]["job_count"]) == (0.0, 0)


def test_sillytavern_paints_and_interrupts(running: ServerProcess) -> None:
    client = RecordedClient("sillytavern", running.url)
    reply = client.read("txt2img")
    assert size_of(reply["images"][0]) == (64, 64)
    assert json.loads(reply["info"])["seed"] >= 0
    answers: list[httpx2.Response] = []
    painting = threading.Thread(target=lambda: answers.append(client.ask("txt2img", steps=200)))
    painting.start()
    limit = time.monotonic() + TAKES
    while client.read("progress")["state"]["sampling_step"] == 0:
        assert time.monotonic() < limit
        time.sleep(0.02)
    client.send("interrupt")
    painting.join(TAKES)
    assert answers[0].status_code == 200, answers[0].text
    (unfinished,) = answers[0].json()["images"]  # as it was seen last
    assert size_of(unfinished) == (64, 64)
    assert client.read("progress")["state"]["job_count"] == 0
