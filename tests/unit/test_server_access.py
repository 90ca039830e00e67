"""Who may ask a server what: each line fails where the check that it is about is taken out."""

from __future__ import annotations

import asyncio
import base64
import hmac
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fluxmesh.deadlines import DEADLINES
from fluxmesh.errors import FluxmeshError, UsageError
from fluxmesh.storage.homes import HomeError
from fluxmesh_coordinator.server import key_file
from fluxmesh_coordinator.server.guard import access as guard
from fluxmesh_coordinator.server.guard.access import Access, host_name, is_loopback
from fluxmesh_coordinator.server.run import ServeOptions, uvicorn_config
from tests.serving import ADDRESS, JSON, Serving

KEY = "the-key-of-this-test"


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("127.0.0.1:8420", "127.0.0.1"),
        ("[::1]:8420", "::1"),
        ("[::1]", "::1"),
        ("Studio.Local.", "studio.local"),
        ("", None),
        ("[::1", None),
        ("[::1]x", None),
        ("a:b", None),
        ("a:1:2", None),
    ],
)
def test_a_host_is_read_or_refused(host: str, name: str | None) -> None:
    assert host_name(host) == name


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8420", "127.0.0.1.evil.example", "localhost.evil", "a:b"]
)
@pytest.mark.parametrize("path", ["/", "/healthz", "/api/status", "/v1/models", "/metrics"])
def test_a_rebound_name_reaches_nothing(serving: Serving, host: str, path: str) -> None:
    with serving.client() as client:
        assert client.get(path, headers={"host": host}).status_code == 421


def test_addresses_own_names_and_names_that_were_given_are_right(serving: Serving) -> None:
    access = Access.of(None, ["Mesh.Example.org"])
    with serving.client(access) as client:
        for host in ("127.0.0.1", "localhost:8420", "[::1]:8420", "10.0.0.7", "mesh.example.org"):
            assert client.get("/healthz", headers={"host": host}).json() == {"status": "ok"}


CROSS = [
    {"origin": "https://evil.example"},
    {"origin": "null"},
    {"origin": "http://127.0.0.1:3000"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"sec-fetch-site": "same-origin", "origin": "https://evil.example"},
]
CHANGES = [
    ("POST", "/api/jobs"),
    ("DELETE", "/api/jobs/some-job-id"),
    ("POST", "/api/plan"),
    ("DELETE", "/api/pictures/some.png"),
    ("POST", "/api/session"),
    ("POST", "/v1/images/generations"),
    ("POST", "/v1/images/edits"),
    ("POST", "/sdapi/v1/txt2img"),
    ("POST", "/sdapi/v1/img2img"),
    ("POST", "/sdapi/v1/options"),
    ("POST", "/sdapi/v1/interrupt"),
    ("POST", "/sdapi/v1/skip"),
    ("POST", "/sdapi/v1/refresh-checkpoints"),
]


def test_no_page_from_elsewhere_changes_anything(serving: Serving) -> None:
    with serving.client() as client:
        for method, path in CHANGES:
            for headers in CROSS:
                answer = client.request(method, path, headers=headers, content="{}")
                assert answer.status_code == 403, (method, path, headers)
    assert serving.lane.painted == []


def test_every_route_that_changes_something_is_in_that_test(serving: Serving) -> None:
    with serving.client() as client:
        described = client.get("/api/openapi.json").json()["paths"]
    ours = {(m.upper(), path) for path, methods in described.items() for m in methods}
    changing = {(method, path) for method, path in ours if method != "GET"}
    assert len(changing) == sum(path.startswith("/api") for _, path in CHANGES)


def test_our_own_page_and_programs_may(serving: Serving) -> None:
    fine: list[dict[str, str]] = [
        {},
        {"origin": ADDRESS, "sec-fetch-site": "same-origin"},
        {"sec-fetch-site": "none"},
        {"origin": "https://mesh.example.org", "host": "mesh.example.org"},  # TLS in front
    ]
    with serving.client(Access.of(None, ["mesh.example.org"])) as client:
        for headers in fine:
            answer = client.post("/sdapi/v1/interrupt", headers=headers, content="{}")
            assert answer.status_code == 200, headers


def test_an_answer_tells_browsers_to_keep_it_to_our_page(serving: Serving) -> None:
    with serving.client() as client:
        for path in ("/healthz", "/api/status", "/api/nothing"):
            headers = client.get(path).headers
            assert "access-control-allow-origin" not in headers
            assert headers["cross-origin-resource-policy"] == "same-origin"
            assert headers["x-content-type-options"] == "nosniff"
            assert "default-src 'self'" in headers["content-security-policy"]
            assert "frame-ancestors 'none'" in headers["content-security-policy"]


# Proxies


@pytest.mark.parametrize(
    ("proxies", "seen"),
    [((), ("127.0.0.1", "http")), (("127.0.0.1",), ("10.9.9.9", "https")),
     (("10.0.0.0/8",), ("127.0.0.1", "http"))],
)  # fmt: skip
def test_only_a_proxy_that_was_named_says_who_asks(
    proxies: tuple[str, ...], seen: tuple[str, str]
) -> None:
    heard: list[tuple[str, str]] = []

    async def app(scope: Any, _receive: Any, _send: Any) -> None:
        heard.append((scope["client"][0], scope["scheme"]))

    config = uvicorn_config(app, proxies)
    config.load()
    headers = [(b"x-forwarded-for", b"10.9.9.9"), (b"x-forwarded-proto", b"https")]
    scope = {"type": "http", "client": ("127.0.0.1", 9), "scheme": "http", "headers": headers,
             "server": ("127.0.0.1", 8420), "path": "/", "method": "GET"}  # fmt: skip

    async def nothing(*_: Any) -> Any:
        return {}

    asyncio.run(config.loaded_app(scope, nothing, nothing))  # type: ignore[arg-type]
    assert heard == [seen]


@pytest.mark.parametrize("proxy", ["*", "", "proxy.example", "10.0.0.1/8"])
def test_a_proxy_is_an_address_or_a_network(proxy: str) -> None:
    with pytest.raises(UsageError, match="`proxy`"):
        ServeOptions(proxies=(proxy,))
    assert ServeOptions(proxies=("127.0.0.1", "fd00::/8")).needs_key


# The key


@pytest.mark.parametrize(
    "path",
    ["/api/status", "/api/pictures", "/api", "/api/openapi.json", "/v1/models", "/metrics",
     "/sdapi/v1/options", "/v1/nothing"],
)  # fmt: skip
def test_without_the_key_nothing_is_told(serving: Serving, path: str) -> None:
    basic = base64.b64encode(f"me:{KEY}x".encode()).decode()
    wrong: list[dict[str, str]] = [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": f"Bearer {KEY[:-1]}"},
        {"authorization": f"Basic {basic}"},
        {"authorization": "Basic not base64"},
        {"authorization": KEY},
        {"cookie": f"fluxmesh_session={KEY}"},
    ]
    with serving.client(Access.of(KEY)) as client:
        for headers in wrong:
            answer = client.get(path, headers=headers)
            assert answer.status_code == 401, headers
            assert KEY not in answer.text and answer.headers["www-authenticate"]


def test_the_key_opens_as_bearer_as_password_and_by_a_cookie(serving: Serving) -> None:
    basic = base64.b64encode(f"anybody:{KEY}".encode()).decode()
    with serving.client(Access.of(KEY)) as client:
        for value in (f"Bearer {KEY}", f"bearer {KEY}", f"Basic {basic}"):
            assert client.get("/api/status", headers={"authorization": value}).status_code == 200
        assert client.post("/api/session", json={"key": "wrong"}).status_code == 401
        assert client.get("/api/status").status_code == 401
        answer = client.post("/api/session", json={"key": KEY})
        assert answer.json() == {"needs_key": True}
        cookie = answer.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=strict" in cookie and KEY not in cookie
        assert client.get("/api/status").status_code == 200


def test_the_page_and_healthz_are_open_and_a_body_of_a_stranger_is_not_read(
    serving: Serving,
) -> None:
    with serving.client(Access.of(KEY)) as client:
        assert client.get("/healthz").status_code == 200
        assert client.post("/v1/images/generations", content=b"{" * 100).status_code == 401
        assert client.post("/api/session", content=b"x" * 100_000).status_code in (401, 413)


def test_keys_are_compared_in_constant_time(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[Any] = []

    def compare(given: bytes, wanted: bytes) -> bool:
        compared.append((given, wanted))
        return hmac.compare_digest(given, wanted)

    class Hmac:
        compare_digest = staticmethod(compare)
        new = staticmethod(hmac.new)

    monkeypatch.setattr(guard, "hmac", Hmac)
    access = Access.of(KEY)
    with serving.client(access) as client:
        client.get("/api/status", headers={"authorization": "Bearer wrong"})
        # The key and the cookie, each whole and both always: no word of which of them was nearer.
        assert compared == [(b"wrong", KEY.encode()), (b"", access.session.encode())]


def test_a_key_is_made_once_for_its_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "inner" / "serve.key"
    key, is_new = key_file.read_or_make(path)
    assert is_new and len(key) >= 40 and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert key_file.read_or_make(path) == (key, False)
    path.chmod(0o640)
    with pytest.raises(HomeError, match="can be read by others"):
        key_file.read_or_make(path)
    path.chmod(0o600)
    path.write_text("short\n")
    with pytest.raises(UsageError, match="holds no key"):
        key_file.read_or_make(path)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.1.2.3"])
def test_loopback_alone_needs_no_key(host: str) -> None:
    assert is_loopback(host) and not ServeOptions(host=host).needs_key


def test_whatever_is_reached_from_elsewhere_needs_one(tmp_path: Path) -> None:
    assert ServeOptions().host == "127.0.0.1"
    for host in ("0.0.0.0", "::", "192.168.1.7", "studio.local", ""):
        assert ServeOptions(host=host).needs_key, host
    assert ServeOptions(names=("mesh.example.org",)).needs_key  # a proxy is in front
    assert ServeOptions(key_file=tmp_path / "key").needs_key


def test_errors_have_the_form_of_the_face_that_was_asked(serving: Serving) -> None:
    with serving.client(Access.of(KEY)) as client:
        openai = client.get("/v1/models").json()["error"]
        assert openai["type"] == "authentication_error" and openai["code"] == "wrong_key"
        assert set(client.get("/api/status").json()["error"]) == {"message", "setting", "code"}
        assert set(client.get("/sdapi/v1/options").json()) == {"error", "detail", "errors", "body"}


def test_what_goes_wrong_inside_is_told_without_its_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    serving = Serving(tmp_path)
    serving.lane.fails = FluxmeshError("Host studio failed.")
    with serving.client() as client:
        answer = client.post("/v1/images/generations", headers=JSON, content='{"prompt": "a cat"}')
        assert answer.status_code == 500 and "studio failed" in answer.json()["error"]["message"]
        serving.lane.fails = RuntimeError("/home/anna/secret")  # type: ignore[assignment]
        answer = client.post("/v1/images/generations", headers=JSON, content='{"prompt": "a cat"}')
        assert answer.status_code == 500 and "anna" not in answer.text


def test_what_breaks_is_counted_as_broken_and_told_as_safely_as_all_else(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise RuntimeError

    monkeypatch.setattr(serving.service, "rows", broken)
    with serving.client(raise_server_exceptions=False) as client:
        answer = client.get("/api/status")
        assert answer.status_code == 500
        for name, value in guard.HEADERS:
            assert answer.headers[name.decode()] == value.decode()
        monkeypatch.undo()
        assert 'fluxmesh_requests_total{status="500"} 1' in client.get("/metrics").text


def test_who_sends_a_key_slowly_is_cut_off(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "DEADLINES", replace(DEADLINES, session_body=0.05))
    app = guard.AccessMiddleware(serving.app(Access.of(KEY)), Access.of(KEY))
    scope = {"type": "http", "method": "POST", "path": "/api/session", "scheme": "http",
             "headers": [(b"host", b"127.0.0.1")]}  # fmt: skip
    sent: list[Any] = []

    async def receive() -> Any:
        await asyncio.sleep(0.02)
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(asyncio.wait_for(app(scope, receive, send), 60))
    assert sent[0]["status"] == 408


def test_the_log_holds_no_prompt(serving: Serving, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with serving.client(Access.of(KEY)) as client:
        headers = {"authorization": f"Bearer {KEY}"}
        prompt = {"prompt": "my secret garden"}
        assert client.post("/api/jobs", json=prompt, headers=headers).status_code == 202
        fields = {"prompt": "my secret garden", "negative_prompt": "weeds", "steps": 0}
        assert client.post("/api/jobs", json=fields, headers=headers).status_code == 400
        client.get("/api/pictures?before=my-secret-query", headers=headers)
        client.get("/api/line%0d%0abreak", headers=headers)
    lines = [line for line in caplog.messages if "HTTP Request:" not in line]  # the client's own
    text = " | ".join(lines)
    assert "POST /api/jobs 202" in text and "GET /api/pictures 200" in text
    assert not any(word in text for word in ("secret", "weeds", KEY))
    assert "\nbreak" not in text and "\r" not in text
