"""How much a client may send, and how slowly: bodies, files, pixels, headers, answers."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import struct
import threading
import time
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from fluxmesh.errors import UsageError
from fluxmesh_coordinator.server import uploads
from fluxmesh_coordinator.server.guard.connections import ImpatientProtocol
from fluxmesh_coordinator.server.guard.limits import BodyLimits, LimitsMiddleware
from fluxmesh_coordinator.server.paint_request import PaintRequest
from fluxmesh_coordinator.server.problems import ProblemError
from fluxmesh_coordinator.server.queue import resolver
from fluxmesh_coordinator.server.queue.fair_queue import QueueBounds
from tests.serving import Serving

SMALL = BodyLimits(body_bytes=2 << 20, piece_seconds=0.05, body_seconds=0.2)


def picture(width: int = 32, height: int = 32, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(out, kind)
    return out.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that says that it is this large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"0" * 99))


def test_a_body_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with Serving(tmp_path).client(limits=SMALL) as client:
        answer = client.post("/api/jobs", content=b"x" * (SMALL.body_bytes + 1))
        assert answer.status_code == 413 and "2 MiB" in answer.json()["error"]["message"]
        length = {"content-length": str(10**15)}
        assert client.post("/api/jobs", content=b"{}", headers=length).status_code == 413


@pytest.mark.parametrize("coding", ["gzip", "br", "deflate, gzip"])
def test_a_packed_body_is_refused_unread(tmp_path: Path, coding: str) -> None:
    with Serving(tmp_path).client() as client:
        headers = {"content-encoding": coding, "content-type": "application/json"}
        for path in ("/api/jobs", "/v1/images/generations", "/sdapi/v1/txt2img"):
            answer = client.post(path, content=b'{"prompt": "a dog"}', headers=headers)
            assert answer.status_code == 415 and "packed" in answer.text


def scope(**more: Any) -> Scope:
    return {"type": "http", "path": "/api/jobs", "headers": [], "method": "POST", **more}


async def answer_of(
    app: Callable[[Scope, Receive, Send], Awaitable[None]],
    receive: Receive,
    limits: BodyLimits = SMALL,
) -> list[Message]:
    messages: list[Message] = []

    async def send(message: Message) -> None:
        messages.append(message)

    await LimitsMiddleware(app, limits)(scope(), receive, send)
    return messages


async def reads(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that reads its body, and answers."""
    while (await receive()).get("more_body"):
        pass
    await Response("ok")(scope, receive, send)


def test_a_body_without_a_length_is_counted_as_it_comes() -> None:
    async def endless() -> Message:
        return {"type": "http.request", "body": b"x" * 100_000, "more_body": True}

    messages = asyncio.run(answer_of(reads, endless, BodyLimits(body_bytes=2 << 20)))
    assert messages[0]["status"] == 413


@pytest.mark.parametrize("pause", [10.0, 0.02], ids=["stops", "trickles"])
def test_a_slow_body_is_cut_off(pause: float) -> None:
    async def slow() -> Message:
        await asyncio.sleep(pause)
        return {"type": "http.request", "body": b"x", "more_body": True}

    messages = asyncio.run(answer_of(reads, slow))
    assert messages[0]["status"] == 408


def test_once_the_body_is_there_nothing_hurries() -> None:
    async def body() -> None:
        pieces = [{"type": "http.request", "body": b"x", "more_body": False}]

        async def receive() -> Message:
            if pieces:
                return pieces.pop()
            await asyncio.sleep(0.15)  # a client that waits for its pictures
            return {"type": "http.disconnect"}

        async def waits(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            assert (await receive())["type"] == "http.disconnect"
            await Response("ok")(scope, receive, send)

        assert (await answer_of(waits, receive))[0]["status"] == 200

    asyncio.run(body())


# Pictures


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_common_pictures_come_through_as_they_are(kind: str) -> None:
    data = picture(kind=kind)
    text = base64.b64encode(data).decode()
    head = f"data:image/{kind.lower()};base64,"
    assert uploads.checked_all([data], [text, f"{head}{text}"], "image") == [data] * 3


@pytest.mark.parametrize("size", [(60_000, 60_000), (8193, 8193), (2**31 - 1, 2**31 - 1)])
def test_a_picture_that_unpacks_to_gigabytes_is_refused_unread(size: tuple[int, int]) -> None:
    data = bomb(*size)
    assert len(data) < 200
    with pytest.raises(UsageError, match="`image` has more than 64 million pixels"):
        uploads.checked_all([data], [], "image")


def test_pictures_are_counted_together_too() -> None:
    data = bomb(8000, 8000)
    assert uploads.checked_all([data] * 2, [], "references") == [data] * 2
    with pytest.raises(UsageError, match="`references` has more than 128 million pixels in all"):
        uploads.checked_all([data] * 3, [], "references")


def test_only_common_formats_are_opened() -> None:
    for kind in ("TIFF", "PPM", "TGA", "ICO"):
        with pytest.raises(UsageError, match="can't be read as a picture"):
            uploads.checked_all([picture(kind=kind)], [], "mask")


@pytest.mark.parametrize("text", ["", "not base64!", "QUJD", 7, None, ["x"], "data:image/png,x"])
def test_what_is_no_picture_is_told_by_its_field(text: Any) -> None:
    with pytest.raises(UsageError, match="^`mask`"):
        uploads.checked_all([], [text], "mask")


def test_a_large_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MAX_FILE", 50)
    data = picture()
    for send in (
        lambda: uploads.checked_all([data], [], "image"),
        lambda: uploads.checked_all([], [base64.b64encode(data).decode()], "image"),
    ):
        with pytest.raises(UsageError, match="is larger than"):
            send()


def test_many_files_and_many_fields_are_refused(tmp_path: Path) -> None:
    with Serving(tmp_path).client() as client:
        files = [("image[]", ("a.png", picture(), "image/png"))] * (uploads.MAX_FILES + 1)
        answer = client.post("/v1/images/edits", data={"prompt": "x"}, files=files)
        assert answer.status_code == 400 and "files" in answer.json()["error"]["message"]
        fields = {f"field{number}": "x" for number in range(200)}
        answer = client.post("/v1/images/edits", data=fields, files=files[:1])
        assert answer.status_code == 400 and "fields" in answer.json()["error"]["message"]
        pictures = [base64.b64encode(picture()).decode()] * (uploads.MAX_FILES + 1)
        answer = client.post("/api/jobs", json={"prompt": "x", "references": pictures})
        assert answer.json()["error"]["setting"] == "references"


# The line


def test_a_client_has_so_many_in_line_and_then_waits(tmp_path: Path) -> None:
    serving = Serving(tmp_path, QueueBounds(per_client=2, whole=3))
    serving.lane.may_go.clear()
    with serving.client() as client:

        def send(name: str) -> Any:
            headers = {"x-fluxmesh-client": name}
            return client.post("/api/jobs", json={"prompt": "a dog"}, headers=headers)

        assert send("anna").status_code == 202
        while not serving.lane.painted:
            pass
        assert [send("anna").status_code for _ in range(2)] == [202, 202]
        refused = send("anna")
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
        assert [send("ben").status_code for _ in range(2)] == [202, 429]
        serving.lane.may_go.set()


def test_pictures_are_unpacked_in_the_same_few_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each thread that once unpacked a large one keeps up to 64 MB of the heap for itself."""
    threads: list[str] = []

    def seed() -> int:
        threads.append(threading.current_thread().name)
        time.sleep(0.02)
        return 1

    monkeypatch.setattr(resolver, "draw_seed", seed)
    serving = Serving(tmp_path)

    async def life() -> None:
        await serving.service.open()
        asked = PaintRequest(prompt="a dog", width=16, height=16, steps=1)
        jobs = [serving.service.submit(asked, f"10.0.0.{k}") for k in range(8)]
        await asyncio.gather(*jobs)
        await serving.service.close()

    asyncio.run(asyncio.wait_for(life(), 60))
    assert len(threads) == 8 and len(set(threads)) <= resolver.LOOKING
    assert all(name.startswith("resolver") for name in threads)


# Connections


class Transport:
    """What a connection needs of one."""

    def __init__(self) -> None:
        self.aborted = False
        self.written = b""

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)}.get(name, default)

    def is_closing(self) -> bool:
        return self.aborted

    def abort(self) -> None:
        self.aborted = True

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def set_protocol(self, protocol: Any) -> None:
        pass


def connection(app: Any) -> tuple[ImpatientProtocol, Transport]:
    import uvicorn
    from uvicorn.server import ServerState

    config = uvicorn.Config(app, http=ImpatientProtocol, lifespan="off", log_config=None)
    config.load()
    protocol = ImpatientProtocol(config=config, server_state=ServerState(), app_state={})
    protocol.header_seconds = 0.05
    transport = Transport()
    protocol.connection_made(transport)
    return protocol, transport


async def answers(scope: Scope, receive: Receive, send: Send) -> None:
    await asyncio.sleep(0.1)  # longer than headers may take
    await Response(json.dumps("ok"))(scope, receive, send)


def test_headers_that_do_not_come_or_trickle_end_the_connection() -> None:
    async def body() -> None:
        _, silent = connection(answers)
        trickling, slow = connection(answers)
        for byte in b"GET / HTTP/1.1\r\nHost":
            trickling.data_received(bytes([byte]))
            await asyncio.sleep(0.01)
        assert silent.aborted and slow.aborted

    asyncio.run(body())


def test_a_request_that_is_whole_takes_its_time_and_the_next_one_is_timed_anew() -> None:
    async def body() -> None:
        protocol, transport = connection(answers)
        request = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        protocol.data_received(request)
        while not transport.written.endswith(b'"ok"'):
            await asyncio.sleep(0.01)
        assert not transport.aborted
        protocol.data_received(request[:20])
        await asyncio.sleep(0.1)
        assert transport.aborted

    asyncio.run(asyncio.wait_for(body(), 60))


def test_who_takes_nothing_is_cut_off_though_all_of_the_answer_is_written() -> None:
    """Closing would wait for ever: the transport holds what the client does not take."""

    async def body() -> None:
        protocol, transport = connection(answers)
        protocol.send_seconds = 0.05
        protocol.data_received(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        while not transport.written.endswith(b'"ok"'):
            await asyncio.sleep(0.01)
        protocol.pause_writing()
        protocol.resume_writing()
        await asyncio.sleep(0.08)
        assert not transport.aborted
        protocol.pause_writing()
        await asyncio.sleep(0.1)
        assert transport.aborted

    asyncio.run(asyncio.wait_for(body(), 60))


def test_who_takes_nothing_of_an_answer_is_let_go_of_without_a_word(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A traceback for each would be what such a client is after."""
    ended: list[str] = []

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(5):
            await send({"type": "http.response.body", "body": b"x" * 100, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        ended.append("to its end")

    async def body() -> None:
        limited = LimitsMiddleware(endless, SMALL)
        protocol, transport = connection(limited)
        protocol.send_seconds = 0.05

        def stuck(_data: bytes) -> None:
            protocol.pause_writing()

        def abort() -> None:
            transport.aborted = True
            protocol.connection_lost(None)

        transport.write, transport.abort = stuck, abort  # type: ignore[method-assign]
        protocol.data_received(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        while not ended:
            await asyncio.sleep(0.01)
        assert transport.aborted

    asyncio.run(asyncio.wait_for(body(), 60))
    assert [record.getMessage() for record in caplog.records] == []


@pytest.mark.parametrize(
    ("path", "number"),
    [
        ("/api/jobs", '"seed": %s'),
        ("/v1/images/generations", '"guidance": %s'),
        ("/api/jobs", '"adapters": [{"name": "a", "strength": %s}]'),
        ("/v1/images/generations", '"loras": [{"name": "a", "strength": %s}]'),
    ],
)
def test_a_number_that_no_float_holds_is_refused(tmp_path: Path, path: str, number: str) -> None:
    with Serving(tmp_path).client() as client:
        sent = f'{{"prompt": "a cat", {number % ("9" * 400)}}}'
        answer = client.post(path, content=sent, headers={"content-type": "application/json"})
        assert answer.status_code == 400


def test_a_problem_has_a_sentence() -> None:
    assert str(ProblemError(413, "Too much.", "body")) == "Too much."
