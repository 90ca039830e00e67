"""The server's own face, on a lane that paints grey: jobs, the line, the gallery, metrics."""

from __future__ import annotations

import json
import time
from typing import Any

from fluxmesh_coordinator.server.faces.openapi import document
from fluxmesh_coordinator.server.guard.access import Access
from tests.serving import Serving, png, sse, text, wait_until_running


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
    serving.lane.seconds = 60.0  # a step, in which a job hears nothing
    with serving.client() as client:
        client.post("/api/jobs", json=fields)
        wait_until_running(serving)
        first = serving.service.job("my-own-id-3")
        assert client.delete("/api/jobs/my-own-id-3").status_code == 204
        assert client.post("/api/jobs", json=fields).status_code == 202  # before that one has ended
        second = serving.service.job("my-own-id-3")
        assert second is not first and first.stage == "running"
        serving.lane.may_go.clear()
        serving.lane.hurries.set()  # that step ends
        while not first.events.is_over:
            time.sleep(0.01)
        assert list(serving.service.journal._open) == ["my-own-id-3"]
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


def test_what_no_face_has_is_told_as_that_and_a_wrong_method_as_what_it_is(
    serving: Serving,
) -> None:
    with serving.client() as client:
        for path in ("/v1/images/variations", "/sdapi/v1/nothing", "/api/nothing", "/v1/", "/api/"):
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


def test_the_files_of_the_page_are_asked_for_again_and_sent_only_where_they_changed(
    serving: Serving,
) -> None:
    """Else a browser goes on with those of the fluxmesh before for as long as it likes."""
    with serving.client() as client:
        for path in ("/", "/app.js", "/style.css"):
            first = client.get(path)
            assert (first.status_code, first.headers["cache-control"]) == (200, "no-cache")
            again = client.get(path, headers={"if-none-match": first.headers["etag"]})
            assert (again.status_code, again.headers["cache-control"]) == (304, "no-cache")
