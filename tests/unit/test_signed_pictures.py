"""Addresses of pictures that open without the key: one picture each, for an hour, and no more."""

from __future__ import annotations

import io
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from PIL import Image

from fluxmesh_coordinator.server.guard import access as guard
from fluxmesh_coordinator.server.guard.access import Access
from fluxmesh_coordinator.server.guard.signatures import SECONDS, is_signed, signed
from tests.serving import ADDRESS, Serving

KEY = "the-key-of-this-test"
HEADERS = {"authorization": f"Bearer {KEY}"}
PICTURE = "/api/pictures/20261128-161530-123-1f0c9a7be2d4-0.png"
OTHER = PICTURE.replace("-0.png", "-1.png")
NOW = 1_795_000_000.0


def query(address: str) -> str:
    return urlsplit(address).query


def test_a_token_opens_its_picture_until_it_expires() -> None:
    address = signed(PICTURE, KEY, NOW)
    assert is_signed("GET", PICTURE, query(address), KEY, NOW)
    assert is_signed("HEAD", PICTURE, query(address), KEY, NOW + SECONDS - 1)
    assert not is_signed("GET", PICTURE, query(address), KEY, NOW + SECONDS)


@pytest.mark.parametrize(
    ("method", "path", "key"),
    [
        ("DELETE", PICTURE, KEY),
        ("POST", PICTURE, KEY),
        ("GET", OTHER, KEY),
        ("GET", f"{PICTURE}/thumbnail", KEY),
        ("GET", "/api/pictures", KEY),
        ("GET", "/api/status", KEY),
        ("GET", PICTURE, f"{KEY}x"),
    ],
)
def test_it_opens_nothing_else(method: str, path: str, key: str) -> None:
    address = signed(PICTURE, KEY, NOW)
    assert not is_signed(method, path, query(address), key, NOW)
    # Nor does a token that was made for a path which is no picture's.
    assert path in (PICTURE, OTHER) or not is_signed(
        "GET", path, query(signed(path, KEY, NOW)), KEY, NOW
    )


@pytest.mark.parametrize(
    "wrong",
    ["", "token=", "token=x&expires=", "expires={expires}", "token={token}",
     "token={token}&expires=1{expires}", "token={token}&expires=-1", "token={token}&expires=９",
     "token={token}&expires=" + "9" * 5000, "token=%00&expires={expires}", "&" * 5000 + "token=x",
     "token=é&expires={expires}"],
)  # fmt: skip
def test_a_token_that_was_changed_is_none(wrong: str) -> None:
    fields = parse_qs(query(signed(PICTURE, KEY, NOW)))
    text = wrong.format(token=fields["token"][0], expires=fields["expires"][0])
    assert not is_signed("GET", PICTURE, text, KEY, NOW)


def test_a_client_that_sends_no_key_fetches_the_url_that_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving = Serving(tmp_path)
    fields = {"prompt": "a dog", "n": 2, "response_format": "url"}
    with serving.client(Access.of(KEY)) as client:
        reply = client.post("/v1/images/generations", json=fields, headers=HEADERS).json()
        first, second = (entry["url"] for entry in reply["data"])
        assert first.startswith(f"{ADDRESS}/api/pictures/") and KEY not in first
        answer = client.get(first)
        assert answer.status_code == 200 and answer.headers["content-type"] == "image/png"
        assert Image.open(io.BytesIO(answer.content)).size == (128, 128)
        # A chat in a browser shows it beside its own pages; nobody else's page shows any other.
        assert answer.headers["cross-origin-resource-policy"] == "cross-origin"
        assert answer.headers["x-content-type-options"] == "nosniff"
        plain = second.partition("?")[0]
        answer = client.get(plain, headers=HEADERS)
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert client.get(plain).status_code == 401
        assert client.get(f"{plain}?{query(first)}").status_code == 401
        assert client.delete(first).status_code == 401
        assert client.get(first, headers={"host": "evil.example"}).status_code == 421
        monkeypatch.setattr(guard.time, "time", lambda: 2e10)
        assert client.get(first).status_code == 401


def test_without_a_key_an_address_is_plain(tmp_path: Path) -> None:
    with Serving(tmp_path).client() as client:
        fields = {"prompt": "a dog", "response_format": "url"}
        reply = client.post("/v1/images/generations", json=fields).json()
        assert "?" not in reply["data"][0]["url"]


def test_the_log_holds_no_token(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with Serving(tmp_path).client(Access.of(KEY)) as client:
        client.get(signed(PICTURE, KEY, NOW))
    lines = [line for line in caplog.messages if "HTTP Request:" not in line]  # the client's own
    assert any(PICTURE in line for line in lines) and not any("token" in line for line in lines)
