"""Thousands of requests that nobody should send, to a real server: it must live, and stay small.

    python -m tools.hostile_requests [--requests 10000] [--seed 1]

Starts `fluxmesh serve` in front of a mesh of one with the embedded checkpoint. Half of the requests
are attacks on the wire and in bodies (`tests/hostile_wire.py`, `hostile_bodies.py`), each of which
must be refused with 4xx or cut off; the other half is what `tests/hostile.py` draws, some of which
is right by chance and painted: there only errors of the server count. Beside them slow clients
send or take a byte a second, each of which must be cut off. Prints a table; exits 1 where a promise
is broken. The same seed sends the same requests.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import socket
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import psutil
from hypothesis import HealthCheck, given, seed, settings

from tests.hostile import HostileRequest, requests
from tests.hostile_bodies import KINDS
from tests.hostile_wire import head, send
from tests.server_process import ServerProcess, server
from tools.serve_load import Promise, report

SLOW = 6  # clients of each slow kind
CLIENTS = 4  # that attack at once
WARM = 0.1  # of the attacks, after which memory should stay what it is
# Bytes: two threads unpack the largest pictures that may be sent, and keep some for the next.
GROWTH = 96 << 20
FILES = 2  # descriptors more than before
CUT_OFF = 240.0  # seconds within which a slow client must be: a body has 180
# What a server may say that has done nothing wrong: too large for its memory, full, or ending.
FINE = (503, 507)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = {"FLUXMESH_HOME": f"{folder}/home", "HF_HUB_OFFLINE": "1", "HF_HOME": folder}
        environment = {**os.environ, **home}
        with server("--model", "tiny", environment=environment, folder=Path(folder)) as running:
            sys.exit(Siege(running, options.seed).lay(options.requests))


class Siege:
    """All attacks on one server, and what came of them."""

    def __init__(self, running: ServerProcess, number: int) -> None:
        self.running, self.number = running, number
        self.process = psutil.Process(running.process.pid)
        address = urllib.parse.urlsplit(running.url)
        assert address.hostname is not None and address.port is not None
        self.address = (address.hostname, address.port)
        self.answers: dict[str, collections.Counter[str]] = collections.defaultdict(
            collections.Counter
        )  # by kind of attack: how often it was answered how
        self.wrong: list[str] = []  # what should not have been answered so
        self.lock = threading.Lock()

    def lay(self, count: int) -> int:
        """The exit code."""
        begun = time.monotonic()
        self._attack_by_wire(0, int(count / 2 * WARM))
        self._attack_by_hypothesis(int(count / 2 * WARM), self.number)
        before = self._paint_and_read()
        slow = [
            threading.Thread(target=self._dawdle, args=(name, words))
            for name, words in SLOW_WAYS.items()
            for _ in range(SLOW)
        ]
        for thread in slow:
            thread.start()
        self._attack_by_wire(int(count / 2 * WARM), count // 2)
        self._attack_by_hypothesis(count - count // 2, self.number + 1)
        for thread in slow:
            thread.join()
        after = self._paint_and_read()
        print(f"{count} requests in {time.monotonic() - begun:.0f} s, seed {self.number}")
        for kind, counts in sorted(self.answers.items()):
            shown = ", ".join(f"{what} {number}" for what, number in sorted(counts.items()))
            print(f"  {kind:14} {shown}")
        for text in self.wrong[:20]:
            print(f"  WRONG {text}")
        for text in tracebacks(self.running.log)[:3]:
            print(f"  IN ITS LOG {text}")
        return report(self._promises(before, after))

    def _promises(self, before: tuple[int, int, int], after: tuple[int, int, int]) -> list[Promise]:
        broken = tracebacks(self.running.log)
        log = self.running.log_file.stat().st_size
        return [
            Promise("attacks that were not refused, errors of the server", str(len(self.wrong)),
                "0", not self.wrong),
            Promise("a good picture in the middle, and after all", f"{before[0]}, {after[0]}",
                "200, 200", before[0] == after[0] == 200),
            Promise("memory after a tenth and at the end, MB",
                f"{before[1] / 1e6:.0f}, {after[1] / 1e6:.0f}",
                f"at most {(before[1] + GROWTH) / 1e6:.0f}", after[1] <= before[1] + GROWTH),
            Promise("descriptors", f"{before[2]}, {after[2]}", f"at most {before[2] + FILES}",
                after[2] <= before[2] + FILES),
            Promise("tracebacks in its log", str(len(broken)), "0", not broken),
            Promise("its log, MB", f"{log / 1e6:.1f}", "told", True),
        ]  # fmt: skip

    def _note(self, kind: str, what: str, wrong: str = "") -> None:
        with self.lock:
            self.answers[kind][what] += 1
            if wrong:
                self.wrong.append(f"{kind}: {what}: {wrong}")

    def _attack_by_wire(self, first: int, last: int) -> None:
        """Attacks of the numbers from `first` to `last`, several at once."""

        def one_attack(number: int) -> None:
            dice = random.Random(f"{self.number} {number}")
            attack = KINDS[number % len(KINDS)](dice)
            try:
                statuses = send(self.address, attack)
            except TimeoutError:
                self._note(attack.kind, "no answer", f"{attack.pieces[0][:200]!r}")
                return
            bad = [
                status
                for status in statuses
                if status >= 500 or (status < 400 and not attack.is_harmless)
            ]
            wrong = f"number {number}, {attack.pieces[0][:300]!r}" if bad else ""
            self._note(attack.kind, str(bad[0] if bad else max(statuses, default="cut off")), wrong)

        with ThreadPoolExecutor(CLIENTS) as clients:
            for done in clients.map(one_attack, range(first, last)):
                assert done is None

    def _attack_by_hypothesis(self, count: int, number: int) -> None:
        with httpx2.Client(base_url=self.running.url, timeout=60, trust_env=False) as client:

            @seed(number)
            @settings(
                max_examples=max(1, count), deadline=None, database=None,
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @given(request=requests())
            def send_all(request: HostileRequest) -> None:
                status = by_http(client, request)
                is_wrong = status >= 500 and status not in FINE
                wrong = f"{request.method} {request.path[:80]} {request.body[:300]!r}"
                self._note("drawn", str(status or "cut off"), wrong if is_wrong else "")

            send_all()

    def _paint_and_read(self) -> tuple[int, int, int]:
        """The status of a good request, and what the server holds: bytes and descriptors."""
        fields = {"prompt": "a dog", "size": "64x64", "steps": 2}
        with httpx2.Client(base_url=self.running.url, timeout=300, trust_env=False) as client:
            painted = client.post("/v1/images/generations", json=fields).status_code
        readings = []
        for _ in range(5):
            time.sleep(0.3)
            readings.append((self.process.memory_info().rss, self.process.num_fds()))
        memory, files = map(min, zip(*readings, strict=True))
        return painted, memory, files

    def _dawdle(self, name: str, words: bytes) -> None:
        """Sends `words`, and then a byte a second, and reads as slowly, until it is cut off."""
        limit = time.monotonic() + CUT_OFF
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            connection.settimeout(CUT_OFF)
            connection.connect(self.address)
            try:
                connection.sendall(words)
                while time.monotonic() < limit:
                    connection.sendall(b"a")
                    time.sleep(1)
                    connection.settimeout(0.01)
                    try:
                        if not connection.recv(1):
                            break
                    except TimeoutError:
                        pass
                    connection.settimeout(CUT_OFF)
                else:
                    self._note(f"slow {name}", "held", "it was not cut off")
                    return
            except OSError:
                pass
        self._note(f"slow {name}", "cut off")


def _asks(count: int) -> Iterator[bytes]:
    for _ in range(count):
        yield head("/style.css", method="GET")


# What a slow client begins with.
SLOW_WAYS = {
    "head": b"POST /api/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Long: ",
    "body": head("/api/jobs", "Content-Type: application/json", "Content-Length: 5000"),
    "session": head("/api/session", "Content-Type: application/json", "Content-Length: 900"),
    "chunks": head("/v1/images/edits", "Transfer-Encoding: chunked", "Content-Type: a/b"),
    "reader": b"".join(_asks(400)),
}


def tracebacks(log: str) -> list[str]:
    """Each with the line before it, which says where it happened."""
    lines = log.splitlines()
    begins = [k for k, line in enumerate(lines) if line.startswith("Traceback")]
    return ["\n".join(lines[max(0, k - 1) : k + 60]) for k in begins]


def by_http(client: httpx2.Client, request: HostileRequest) -> int:
    """The status; 0: the connection was cut off, or the client's own library refused to send."""
    path, _, query = request.path.partition("?")
    quoted = urllib.parse.quote(path, safe="/%", errors="replace")
    if query:
        quoted += "?" + urllib.parse.quote(query, safe="=&%", errors="replace")
    try:
        answer = client.request(
            request.method, quoted, content=request.body, headers=request.headers
        )
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, UnicodeError):
        return 0
    return answer.status_code


if __name__ == "__main__":
    main()
