"""`fluxmesh serve` with a model whose files somebody changes while it is in memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import httpx2
import pytest

from fluxmesh.weights import hub
from fluxmesh_coordinator.commands.generate import Painter, Spread
from fluxmesh_coordinator.commands.settings import GenerateSettings
from fluxmesh_coordinator.server.picture_folder import PictureFolder
from fluxmesh_coordinator.server.queue.lane import Lane
from fluxmesh_coordinator.server.queue.served_job import ServedJob
from tests.checkpoints import make_checkpoint
from tests.integration.conftest import Run, environment
from tests.server_process import server

SIZE = {"width": 32, "height": 32, "steps": 2, "seed": 7}


def paint(http: httpx2.Client, id: str) -> tuple[list[tuple[str, dict[str, Any]]], bytes]:
    """What a job told, and its picture; b"": there is none."""
    sent = http.post("/api/jobs", json={"prompt": "a red apple", "id": id, **SIZE})
    assert sent.status_code == 202, sent.text
    lines = http.get(f"/api/jobs/{id}/events").text.splitlines()
    kinds = [line[7:] for line in lines if line.startswith("event: ")]
    told = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    urls = [data["url"] for kind, data in zip(kinds, told, strict=True) if kind == "picture"]
    return list(zip(kinds, told, strict=True)), http.get(urls[0]).content if urls else b""


def test_a_request_after_a_change_of_the_files_is_painted_with_the_new_ones(
    tmp_path: Path, home: Path, fluxmesh: Run
) -> None:
    old, new = (make_checkpoint(tmp_path / name, seed=k).path for k, name in enumerate("ab"))
    model = tmp_path / "mine"
    shutil.copytree(old, model)
    options = ("--image-size", "32x32", "--steps", 2, "--seed", 7)

    def by_command(name: str) -> bytes:
        file = tmp_path / f"{name}.png"
        done = fluxmesh("generate", "a red apple", "--model", model, *options, "--output", file)
        assert done.code == 0, done.err
        return file.read_bytes()

    alone = by_command("old")
    with (
        server("--model", model, environment=environment(home), folder=tmp_path) as it,
        httpx2.Client(base_url=it.url, timeout=100) as http,
    ):
        assert paint(http, "the-first-job")[1] == alone
        shutil.rmtree(model)
        refused = http.post("/api/jobs", json={"prompt": "a red apple", **SIZE})
        assert refused.status_code == 404 and "mine" in refused.text, refused.text
        assert str(tmp_path) not in refused.text  # what lies where is nobody's business
        listed = http.get("/api/models").json()["models"]
        assert [each["name"] for each in listed] == ["tiny", "tiny-klein"]  # the page goes on
        shutil.copytree(new, model)
        listed = http.get("/api/models").json()["models"]
        assert [each["name"] for each in listed] == ["mine", "tiny", "tiny-klein"]
        heard, picture = paint(http, "the-second-job")
        assert any(kind == "model" for kind, _ in heard)  # it was read anew
        third = paint(http, "the-third-job")
        assert third[1] == picture and not any(kind == "model" for kind, _ in third[0])
        it.signal()
        assert it.ended() == 0, it.log
        assert "Traceback" not in it.log
    # Pixels and recipe are of the new files, as a command line that has never seen the old ones.
    assert picture == by_command("new") != alone


def test_a_picture_tells_of_the_files_that_an_engine_has_opened(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where they change after the lane has looked, and before the engine does."""
    for name, value in environment(home).items():
        monkeypatch.setenv(name, value)
    old, new = (make_checkpoint(tmp_path / name, seed=k).path for k, name in enumerate("ab"))
    model, start = tmp_path / "mine", Painter.start
    shutil.copytree(old, model)

    def change_then(*how: Any) -> Any:
        shutil.rmtree(model)
        shutil.copytree(new, model)
        return start(*how)

    settings = GenerateSettings(model=str(model), image_size=(32, 32), steps=1)
    pictures = PictureFolder(tmp_path / "pictures")
    lane = Lane(pictures)
    try:
        with lane.painters.holding() as painter:
            ready = painter.resolve(settings, "a red apple", 7)
        job = ServedJob.of(
            ready, id="the-first-job", client="", fingerprint="", model="mine", spread=Spread(),
            previews=False,
        )  # fmt: skip
        monkeypatch.setattr(Painter, "start", change_then)
        told: list[dict[str, Any]] = []
        lane.paint(job, lambda kind, data: told.append(data) if kind == "picture" else None)
    finally:
        lane.close()
    made = pictures.recipe(told[0]["name"])
    assert made is not None
    assert made.revision == hub.resolve(str(new)).revision != ready.recipe.revision
