"""A server that starts again, and clients that send their jobs again by the same ids."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from fluxmesh.errors import WeightsError
from fluxmesh_coordinator.artifacts.recipe import Recipe
from fluxmesh_coordinator.server.queue.lane import Tell
from fluxmesh_coordinator.server.queue.served_job import ServedJob
from tests.serving import Serving

ID = "a-job-of-mine"
ASKED = {"prompt": "a dog", "n_images": 4, "width": 64, "height": 64, "steps": 2, "id": ID}


def events(client: TestClient, id: str = ID) -> list[tuple[str, dict[str, Any]]]:
    lines = client.get(f"/api/jobs/{id}/events").text.splitlines()
    kinds = [line[7:] for line in lines if line.startswith("event: ")]
    data = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    return list(zip(kinds, data, strict=True))


def painted(client: TestClient, **fields: Any) -> list[str]:
    """The names of the pictures of `ASKED`, in the order in which they were told."""
    assert client.post("/api/jobs", json={**ASKED, **fields}).status_code == 202
    heard = events(client)
    assert heard[-1][0] == "done"
    names = [data["name"] for kind, data in heard if kind == "picture"]
    assert sorted(names) == sorted(heard[-1][1]["pictures"])
    return names


def killed(folder: Path, *, without: tuple[int, ...]) -> dict[int, str]:
    """A server that is killed before these images of `ASKED` are there; the others, by image."""
    serving = Serving(folder)
    with serving.client() as client, pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving.service.journal, "ended", lambda id, is_done=False: None)
        names = dict(enumerate(sorted(painted(client))))
    for image in without:
        serving.pictures.remove(names.pop(image))
    return names


def test_a_job_that_is_done_is_answered_from_the_disk_after_a_restart(tmp_path: Path) -> None:
    first = Serving(tmp_path)
    with first.client() as client:
        names = painted(client)
        seed = client.post("/api/jobs", json=ASKED).json()["seed"]
    again = Serving(tmp_path)
    with again.client() as client:
        assert [kind for kind, _ in events(client)] == ["picture"] * 4 + ["done"]
        assert painted(client) == names
        assert client.post("/api/jobs", json=ASKED).json() == {
            "id": ID, "place": 0, "seconds_left": 0.0, "seed": seed,
        }  # fmt: skip
        other = client.post("/api/jobs", json={**ASKED, "prompt": "a cat"})
        assert other.status_code == 409
        # OpenAI's clients are answered with it, too.
        sent = {"prompt": "a bird", "size": "64x64"}
        headers = {"idempotency-key": "an-id-of-openai"}
        one = client.post("/v1/images/generations", json=sent, headers=headers).json()["data"]
    assert len(again.lane.painted) == 1
    third = Serving(tmp_path)
    with third.client() as client:
        assert painted(client) == names
        same = client.post("/v1/images/generations", json=sent, headers=headers).json()["data"]
    assert same == one and third.lane.painted == []


def test_a_job_that_was_cut_off_goes_on_with_its_seed_and_what_is_there(tmp_path: Path) -> None:
    kept = killed(tmp_path, without=(1, 3))
    again = Serving(tmp_path)
    files = {name: again.pictures.path(name).stat().st_ino for name in kept.values()}
    with again.client() as client:
        ((kind, _), (_, told), (last, lost)) = events(client)
        assert (kind, last, lost["code"]) == ("picture", "error", "lost")
        assert told["name"] in lost["message"]
        names = painted(client)
        assert names[:2] == list(kept.values())  # told at once
        seeds = {data["image"]: data["seed"] for kind, data in events(client) if kind == "picture"}
        steps = {data["image"] for kind, data in events(client) if kind == "step"}
        listed = client.get("/api/pictures").json()["pictures"]
    assert seeds == {k: seeds[0] + k for k in range(4)} and steps == {1, 3}
    assert sorted(names) == sorted(picture["name"] for picture in listed)
    assert {picture["recipe"]["seed"] for picture in listed} == set(seeds.values())
    assert {name: again.pictures.path(name).stat().st_ino for name in files} == files
    assert [job.kept for job in again.lane.painted] == [2]


def test_a_server_that_is_killed_twice_still_goes_on(tmp_path: Path) -> None:
    kept = killed(tmp_path, without=(3,))
    second = Serving(tmp_path)  # which is killed before anybody asks
    assert list(second.service.lost) == [ID]
    second.service.journal.close()
    again = Serving(tmp_path)
    with again.client() as client:
        assert painted(client)[:3] == list(kept.values())


def test_a_job_that_lacks_only_its_end_is_done(tmp_path: Path) -> None:
    kept = killed(tmp_path, without=())
    again = Serving(tmp_path)
    assert not again.service.lost
    with again.client() as client:
        assert painted(client) == list(kept.values())
    assert again.lane.painted == []
    assert [each.id for each in Serving(tmp_path).service.journal.done] == [ID]


def test_pictures_of_another_model_or_version_are_not_mixed_with_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = killed(tmp_path, without=(2,))
    again = Serving(tmp_path)
    read = again.pictures.recipe

    def of_an_older_model(name: str) -> Recipe:
        recipe = read(name)
        assert recipe is not None
        return replace(recipe, revision="before")

    monkeypatch.setattr(again.pictures, "recipe", of_an_older_model)
    with again.client() as client:
        names = painted(client)
    assert len(names) == 4 and not set(names) & set(kept.values())
    assert len({*names, *kept.values()}) == 7  # those of before stay where they are


def test_a_job_whose_picture_was_removed_paints_that_one_again(tmp_path: Path) -> None:
    serving = Serving(tmp_path)
    with serving.client() as client:
        names = painted(client)
        client.delete(f"/api/pictures/{names[2]}")
        assert sorted(painted(client)) == names
        client.delete(f"/api/pictures/{names[0]}")
    again = Serving(tmp_path)
    with again.client() as client:
        assert sorted(painted(client)) == names
    assert [job.kept for job in serving.lane.painted] == [0, 3]
    assert [job.kept for job in again.lane.painted] == [3]


@pytest.mark.parametrize("without", [(), (1, 2)])
def test_who_followed_the_server_before_hears_all_of_what_the_next_one_tells(
    tmp_path: Path, without: tuple[int, ...]
) -> None:
    """A browser goes on behind the last number that it saw, by itself, and its card ends."""
    serving = Serving(tmp_path)
    with serving.client() as client, pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving.service.journal, "ended", lambda id, is_done=False: None)
        names = sorted(painted(client))
        lines = client.get(f"/api/jobs/{ID}/events").text.splitlines()
        numbers = [line[4:] for line in lines if line.startswith("id: ")]
    for image in without:
        serving.pictures.remove(names[image])
    with Serving(tmp_path).client() as client:
        for number in numbers:  # wherever it was cut off
            text = client.get(f"/api/jobs/{ID}/events", headers={"last-event-id": number}).text
            assert text.count("event: picture") == 4 - len(without)
            assert ("event: error" if without else "event: done") in text
        assert len(painted(client)) == 4
        text = client.get(f"/api/jobs/{ID}/events", headers={"last-event-id": numbers[-1]}).text
        assert text.count("event: picture") == 4 and "event: done" in text


def test_a_stream_that_was_cut_off_may_be_asked_for_without_one(tmp_path: Path) -> None:
    """Who looks on changes no picture."""
    kept = killed(tmp_path, without=(2,))
    again = Serving(tmp_path)
    with again.client() as client:
        assert set(kept.values()) < set(painted(client, previews=True))


def test_a_job_that_has_failed_goes_on_where_it_is_sent_again(tmp_path: Path) -> None:
    """What it is told to do, say where its model's files were changed while it waited in line."""
    serving = Serving(tmp_path)
    paint = serving.lane.paint

    def breaks_off(job: ServedJob, tell: Tell) -> None:
        def told(kind: str, data: dict[str, Any]) -> None:
            tell(kind, data)
            if kind == "picture" and data["image"] == 1:
                raise WeightsError("The files of tiny were changed; send it again.")

        paint(job, told)

    with serving.client() as client, pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving.lane, "paint", breaks_off)
        seed = client.post("/api/jobs", json=ASKED).json()["seed"]
        first = events(client)
        assert first[-1][0] == "error" and "again" in first[-1][1]["message"]
        patch.undo()
        names = painted(client)
        kept = [data["name"] for kind, data in first if kind == "picture"]
        assert len(kept) == 2 and names[:2] == kept and len(names) == 4
        assert client.post("/api/jobs", json=ASKED).json()["seed"] == seed
        assert [job.kept for job in serving.lane.painted] == [0, 2]
        serving.lane.fails = WeightsError("The files of tiny were changed; send it again.")
        client.post("/api/jobs", json={**ASKED, "id": "another-of-mine"})
        assert events(client, "another-of-mine")[-1][0] == "error"
        serving.lane.fails = None
        other = {**ASKED, "id": "another-of-mine", "prompt": "a cat"}
        assert client.post("/api/jobs", json=other).status_code == 202
        assert events(client, "another-of-mine")[-1][0] == "done"


def test_another_request_by_the_id_of_a_lost_job_begins_anew(tmp_path: Path) -> None:
    kept = killed(tmp_path, without=(2,))
    again = Serving(tmp_path)
    with again.client() as client:
        names = painted(client, prompt="a cat")
    assert len(names) == 4 and not set(names) & set(kept.values())
