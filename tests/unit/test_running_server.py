"""`fluxmesh status` shows the line of the server that runs, and asks it as its user may."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from socketserver import BaseRequestHandler, TCPServer

import pytest

from fluxmesh.storage.homes import Home
from fluxmesh_coordinator.cli.status import server_rows
from fluxmesh_coordinator.server import key_file, running_server

QUEUE = [
    {"place": 0, "progress": 0.25, "seconds_left": 3.0, "n_images": 1, "model": "tiny"},
    {"place": 1, "progress": 0.0, "seconds_left": 0.0, "n_images": 4, "model": "klein"},
]


def test_status_tells_the_line_and_nothing_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLUXMESH_HOME", str(tmp_path))
    key, _ = key_file.read_or_make(tmp_path / "serve.key")
    asked = []

    class ServerTwin(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers["authorization"]))
            body = json.dumps({"queue": QUEUE}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *words: object) -> None:
            pass

    assert server_rows() == []
    with HTTPServer(("127.0.0.1", 0), ServerTwin) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://0.0.0.0:{server.server_port}"
        with running_server.recorded(Home(tmp_path), url, tmp_path / "serve.key"):
            assert server_rows() == [
                f"Server {url}: 2 jobs.",
                "  tiny, 1 image: 25% done, 3 s left",
                "  klein, 4 images: place 1",
            ]
        assert asked == [("/api/status", f"Bearer {key}")]
        assert server_rows() == []  # it has ended
        server.shutdown()
    with running_server.recorded(Home(tmp_path), "http://127.0.0.1:1", None):
        assert server_rows() == []  # it was killed, and its record stayed


@pytest.mark.parametrize("answer", [b"-ERR unknown command\r\n", b"HTTP/1.1 200 OK\r\n\r\n[1]"])
def test_another_program_on_the_port_of_a_server_that_was_killed_is_no_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    monkeypatch.setenv("FLUXMESH_HOME", str(tmp_path))

    class OtherProgram(BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(4096)
            self.request.sendall(answer)

    with TCPServer(("127.0.0.1", 0), OtherProgram) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        with running_server.recorded(Home(tmp_path), url, None):
            assert server_rows() == []
        server.shutdown()
