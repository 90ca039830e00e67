"""The clients of `serve_load.py`: each sends its jobs one after another, in the ways people do.

By OpenAI's face with and without a stream, by fluxmesh's own with every request sent twice, and
now and then it goes away before its picture is there. All of it is written down in a `LoadLog`.
"""

from __future__ import annotations

import base64
import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2

SIDE, STEPS = 16, 1  # the least that a model takes
SEEDS = 8  # different pictures that are asked for; a job of two has the next one, too
LEAVES = 0.05  # of the jobs, whose client goes away
LONG = 200  # steps of a picture that nobody waits for
TAKES = 600.0  # seconds that any answer may take
PROMPT = "a red apple and two dogs"
EVENT = re.compile(r"event: (\w+)\ndata: (.+)")


@dataclass
class LoadLog:
    """What all clients saw; shared by their threads."""

    seconds: list[float] = field(default_factory=list)  # a job that came to its end
    order: list[str] = field(default_factory=list)  # whose job ended, in the order of the ends
    places: list[list[int]] = field(default_factory=list)  # a job's places in line, as it was told
    pictures: int = 0
    wrong: int = 0  # pictures with other bytes than the mesh's own
    left: int = 0  # clients that went away
    stayed: int = 0  # those that wanted to, and had their picture before
    refused: int = 0  # requests that were told to come again
    problems: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def between(self) -> int:
        """The most pictures that somebody got between two of one and the same other client."""
        most = 0
        since: dict[str, Counter[str]] = {}
        for client in self.order:
            waited = since.pop(client, Counter())
            most = max(most, *waited.values(), 0)
            for others in since.values():
                others[client] += 1
            since[client] = Counter()
        return most


class LoadClient(threading.Thread):
    """One client, and its jobs."""

    def __init__(
        self, name: str, url: str, jobs: range, dice: random.Random,
        expected: Mapping[int, bytes], log: LoadLog,
    ) -> None:  # fmt: skip
        super().__init__(name=name)
        self.jobs, self.dice, self.expected, self.log = jobs, dice, expected, log
        self.http = httpx2.Client(base_url=url, timeout=TAKES, trust_env=False)

    def run(self) -> None:
        with self.http:
            for number in self.jobs:
                try:
                    self._one_job(number)
                except (httpx2.HTTPError, AssertionError, LookupError, ValueError) as error:
                    with self.log.lock:
                        said = f"{self.name}, job {number}: {type(error).__name__}: {error}"
                        self.log.problems.append(said)

    def _one_job(self, number: int) -> None:
        seed, count = self.dice.randrange(SEEDS), self.dice.choice((1, 1, 2))
        fields = {"prompt": PROMPT, "seed": seed, "steps": STEPS, "placement": "data"}
        way = self.dice.choice((self._generate, self._stream, self._follow))
        id = f"{self.name}-job-{number}"
        if self.dice.random() < LEAVES:
            self._leave(fields, self.dice.uniform(0.01, 0.5))
            return
        begun = time.monotonic()
        made = way(fields, count, id)
        took = time.monotonic() - begun
        wrong = sum(data != self.expected[seed + k] for k, data in enumerate(made))
        assert len(made) == count, f"{len(made)} pictures of {count}"
        with self.log.lock:
            self.log.seconds.append(took)
            self.log.order.append(self.name)
            self.log.pictures += count
            self.log.wrong += wrong
        places = [int(data["place"]) for kind, data in self._events(id) if kind == "queued"]
        with self.log.lock:
            self.log.places.append(places)

    def _generate(self, fields: dict[str, Any], count: int, id: str) -> list[bytes]:
        """By OpenAI's face."""
        asked = {**fields, "n": count, "size": f"{SIDE}x{SIDE}", "user": self.name}
        answer = self._post("/v1/images/generations", asked, {"idempotency-key": id})
        return [base64.b64decode(entry["b64_json"]) for entry in answer.json()["data"]]

    def _stream(self, fields: dict[str, Any], count: int, id: str) -> list[bytes]:
        """The same as a stream, whose pictures come in the order in which they are ready."""
        asked = {**fields, "n": count, "size": f"{SIDE}x{SIDE}", "user": self.name}
        head = {"idempotency-key": id}
        text = self._post("/v1/images/generations", {**asked, "stream": True}, head).text
        kinds = re.findall(r"event: (\S+)", text)
        assert kinds == ["image_generation.completed"] * count, text[-300:]
        sent = {data["b64_json"] for data in map(json.loads, re.findall(r"data: (.+)", text))}
        made = self._pictures(id)
        assert sent == {base64.b64encode(data).decode() for data in made}
        return made

    def _follow(self, fields: dict[str, Any], count: int, id: str) -> list[bytes]:
        """By fluxmesh's own face: sent twice, which is one job, and followed to its end."""
        asked = {**fields, "n_images": count, "width": SIDE, "height": SIDE, "id": id}
        for _ in range(2):
            answer = self._post("/api/jobs", asked, {"x-fluxmesh-client": self.name})
            assert answer.json()["id"] == id
        return self._pictures(id)

    def _leave(self, fields: dict[str, Any], seconds: float) -> None:
        """Asks for a long picture, and goes away."""
        asked = {**fields, "size": f"{SIDE}x{SIDE}", "user": self.name, "steps": LONG}
        try:
            self.http.post("/v1/images/generations", json=asked, timeout=seconds)
        except httpx2.TimeoutException:
            with self.log.lock:
                self.log.left += 1
        else:
            with self.log.lock:
                self.log.stayed += 1

    def _post(self, path: str, fields: dict[str, Any], head: dict[str, str]) -> httpx2.Response:
        """Sent again where the line is full, when the server says so."""
        while (answer := self.http.post(path, json=fields, headers=head)).status_code == 429:
            with self.log.lock:
                self.log.refused += 1
            time.sleep(int(answer.headers["retry-after"]))
        assert answer.status_code in (200, 202), f"{answer.status_code}: {answer.text[:200]}"
        return answer

    def _events(self, id: str) -> list[tuple[str, dict[str, Any]]]:
        """All that a job told, to its end."""
        text = self.http.get(f"/api/jobs/{id}/events").text
        return [(kind, json.loads(data)) for kind, data in EVENT.findall(text)]

    def _pictures(self, id: str) -> list[bytes]:
        """A job's pictures, by the names that its last event tells."""
        kind, data = self._events(id)[-1]
        assert kind == "done", data
        return [self.http.get(f"/api/pictures/{name}").content for name in data["pictures"]]
