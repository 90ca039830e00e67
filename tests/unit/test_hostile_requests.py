"""Hundreds of requests that nobody should send: each is answered, and the server lives on."""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from starlette.testclient import TestClient

from tests.hostile import HostileRequest, requests
from tests.serving import Serving


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Serving, TestClient]]:
    serving = Serving(tmp_path_factory.mktemp("hostile"))
    with serving.client(raise_server_exceptions=False) as client:
        yield serving, client


def send(client: TestClient, request: HostileRequest) -> int:
    path, _, query = request.path.partition("?")
    path = urllib.parse.quote(path, safe="/%", errors="replace")
    query = urllib.parse.quote(query, safe="=&%", errors="replace")
    answer = client.request(
        request.method,
        f"{path}?{query}" if query else path,
        content=request.body,
        headers=request.headers,
    )
    return answer.status_code


@settings(
    max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), database=None,
    derandomize=True,
)  # fmt: skip
@given(request=requests())
def test_a_hostile_request_is_answered_and_breaks_nothing(
    attacked: tuple[Serving, TestClient], request: HostileRequest
) -> None:
    _, client = attacked
    assert send(client, request) not in (500, 502)
    assert client.get("/healthz").json() == {"status": "ok"}


def test_after_all_of_them_a_good_request_is_painted(
    attacked: tuple[Serving, TestClient],
) -> None:
    _, client = attacked
    answer = client.post("/v1/images/generations", json={"prompt": "a dog", "size": "64x64"})
    assert answer.status_code == 200
