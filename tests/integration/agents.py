"""Real agents on loopback, and a coordinator for tests that says what it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from fluxmesh.cluster.hostfile import Host
from fluxmesh.cluster.rendezvous import joining
from fluxmesh.cluster.snapshot import HostInfo, ModelVariant
from fluxmesh.sampling.latents import initial_noise
from fluxmesh.storage.keys import Keys
from fluxmesh.version import __version__
from fluxmesh.wire import messages
from fluxmesh.wire.messages import Message
from fluxmesh.wire.transport.dialer import CurveDialer, DialledConnection
from fluxmesh_coordinator.agents.status import host_info
from fluxmesh_coordinator.runtime import agent_pool, job_runner
from tests.paths import python_path

PATIENCE = 60.0  # seconds that a test waits for anything
GONE = 30.0  # seconds within which what should end has ended, on a machine that does much else

M = TypeVar("M", bound=Message)
T = TypeVar("T")


@dataclass
class AgentProcess:
    """A process, and what it said when it listened."""

    process: subprocess.Popen[bytes]
    state: Path
    endpoint: str
    key: str
    boot: str
    user: Keys

    @property
    def log(self) -> str:
        return (self.state / "agent.log").read_text()

    def close_stdin(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()


@contextmanager
def agent(
    state: Path,
    *options: str,
    user: Keys | None = None,
    envs: Mapping[str, str] | None = None,
    ephemeral: bool = True,
) -> Iterator[AgentProcess]:
    """An agent at a free port of loopback, gone at the end."""
    user = user or Keys.new()
    environment = {
        **os.environ,
        "PYTHONPATH": python_path(),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "fluxmesh_agent", "run", "--state", str(state)]
    command += ["--keys-stdin", *options, *(["--ephemeral"] if ephemeral else [])]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        settings = {"authorized": {"tester": user.public}, "envs": dict(envs or {})}
        process.stdin.write(json.dumps(settings).encode() + b"\n")
        process.stdin.flush()
        said = json.loads(process.stdout.readline())
        yield AgentProcess(process, state, said["endpoint"], said["public_key"], said["boot"], user)
    finally:
        with contextlib.suppress(OSError):
            process.stdin.close()
        if not ephemeral:
            process.terminate()
        try:
            process.wait(GONE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


class Coordinator:
    """One conversation with one agent."""

    def __init__(self, connection: DialledConnection, client: str) -> None:
        self.connection, self.client = connection, client
        self.fence = self.ring_generation = 0
        self.heard: list[Message] = []  # all reports but heartbeats
        self.beats = 0  # heartbeats of the agent
        self.is_silent = False  # it gives no heartbeats of its own
        self.read = 0
        self._news = asyncio.Condition()
        self.seq = 0
        self._answers: dict[int, Message] = {}

    async def ask(self, message: Message) -> Message:
        """The answer, `Refused` too."""
        self.seq += 1
        return await self.repeat(message, self.seq)

    async def repeat(self, message: Message, seq: int) -> Message:
        """Sends under a number that may have been sent before."""
        self._answers.pop(seq, None)
        await self.connection.send(message, seq)
        async with self._news:
            await asyncio.wait_for(self._news.wait_for(lambda: seq in self._answers), PATIENCE)
        return self._answers[seq]

    async def done(self, message: Message) -> None:
        """Asks, and wants `Done`."""
        answer = await self.ask(message)
        assert isinstance(answer, messages.Done), answer

    async def until(self, kind: type[M], seconds: float = PATIENCE) -> M:
        """The next report of a kind that was not returned yet; a `Failed` in between fails."""

        def position() -> int | None:
            for i in range(self.read, len(self.heard)):
                if isinstance(self.heard[i], kind | messages.Failed):
                    return i
            return None

        async with self._news:
            await asyncio.wait_for(self._news.wait_for(lambda: position() is not None), seconds)
        at = position()
        assert at is not None
        self.read = at + 1
        report = self.heard[at]
        assert isinstance(report, kind), report
        return report

    async def until_beats(self, count: int) -> None:
        """Waits for so many more heartbeats of the agent."""
        end = self.beats + count
        async with self._news:
            await asyncio.wait_for(self._news.wait_for(lambda: self.beats >= end), PATIENCE)

    async def status(self) -> messages.Status:
        answer = await self.ask(messages.AskStatus())
        assert isinstance(answer, messages.Status)
        return answer

    async def lease(self, job: str = "job") -> None:
        """Waits for the lease; work goes on from the agent's ring generation."""
        await self.done(messages.AskLease(job, 1.0))
        granted = await self.until(messages.Granted)
        self.fence, self.ring_generation = granted.fence, granted.ring_generation

    def head(self, job: str = "job") -> dict[str, Any]:
        """What all work has."""
        return {"fence": self.fence, "job": job, "ring_generation": self.ring_generation}

    async def listen(self) -> None:
        while True:
            seq, message = await self.connection.receive()
            async with self._news:
                if seq:
                    self._answers[seq] = message
                elif isinstance(message, messages.Heartbeat):
                    self.beats += 1
                else:
                    self.heard.append(message)
                self._news.notify_all()


@asynccontextmanager
async def connected(host: AgentProcess, *, client: str = "") -> AsyncIterator[Coordinator]:
    """Connects and says hello."""
    dialer = CurveDialer(host.user)
    connection = await dialer.connect(host.endpoint, host.key)
    coordinator = Coordinator(connection, client or secrets.token_hex(8))

    async def beat() -> None:
        while not coordinator.is_silent:
            await connection.send(messages.Heartbeat())
            await asyncio.sleep(1.0)

    tasks = [asyncio.create_task(coordinator.listen()), asyncio.create_task(beat())]
    try:
        welcome = await coordinator.ask(messages.Hello(coordinator.client, __version__))
        assert isinstance(welcome, messages.Welcome), welcome
        yield coordinator
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await dialer.close()


def play(scene: Coroutine[Any, Any, T], seconds: float = 200.0) -> T:
    """Runs a scene to its end, or fails."""
    return asyncio.run(asyncio.wait_for(scene, seconds))


def as_if_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planner takes the agents, which share two cores, for slow machines of their own."""
    for module in (agent_pool, job_runner):

        def apart(rank: int, status: messages.Status) -> HostInfo:
            info = host_info(rank, status)
            return replace(info, device="", load_rate=1e12, flops_per_second=1e6, measured=())

        monkeypatch.setattr(module, "host_info", apart)


async def engine_of(coordinator: Coordinator) -> int:
    pid = (await coordinator.status()).engine_pid
    assert pid is not None
    return pid


async def failed(coordinator: Coordinator, seconds: float = GONE) -> messages.Failed:
    """The next report of a failure."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for report in coordinator.heard:
            if isinstance(report, messages.Failed):
                coordinator.heard.clear()
                coordinator.read = 0
                return report
        await asyncio.sleep(0.02)
    raise AssertionError(f"nothing failed: {coordinator.heard}")


async def encode(
    coordinator: Coordinator, weights: ModelVariant, prompt: str = "a cat"
) -> messages.TextEncoded:
    await coordinator.done(messages.Encode(**coordinator.head(), weights=weights, prompt=prompt))
    return await coordinator.until(messages.TextEncoded)


def painting(
    coordinator: Coordinator,
    weights: ModelVariant,
    text: messages.TextEncoded,
    *,
    placement: Any = "data",
    seed: int = 7,
    steps: int = 3,
    first: int = 0,
    latents: np.ndarray | None = None,
    image: int = 0,
    size: int = 32,
    low_memory: bool = False,
    job: str = "job",
    channels: int = 16,
) -> messages.Paint:
    """One image of `size` x `size` pixels."""
    noise = initial_noise(seed, size, size, channels, 8)
    return messages.Paint(
        **coordinator.head(job),
        weights=weights,
        placement=placement,
        image=image,
        height=size,
        width=size,
        steps=steps,
        first=first,
        guidance=4.0,
        low_memory=low_memory,
        preview=False,
        strength=1.0,
        latents=noise if latents is None else latents,
        noise=noise,
        features=text.features,
    )


async def join_ring(coordinators: list[Coordinator], ring_generation: int) -> None:
    """All of them form a ring on loopback, in their order."""
    ports: list[tuple[int, ...]] = []
    for coordinator in coordinators:
        answer = await coordinator.ask(messages.AskPorts(fence=coordinator.fence, ip="127.0.0.1"))
        assert isinstance(answer, messages.Ports), answer
        ports.append(answer.ports)
    for coordinator, join in zip(
        coordinators, joins_of(coordinators, ring_generation, ports), strict=True
    ):
        coordinator.ring_generation = ring_generation
        await coordinator.done(join)
    for coordinator in coordinators:
        await coordinator.until(messages.Joined)


def joins_of(
    coordinators: list[Coordinator], ring_generation: int, ports: list[tuple[int, ...]]
) -> list[messages.Join]:
    """What the ranks of one ring on loopback are told."""
    size, nonce = len(coordinators), secrets.token_bytes(32)
    hosts = [Host(rank, "127.0.0.1", ("127.0.0.1",)) for rank in range(size)]
    return [
        messages.Join(
            fence=coordinator.fence,
            ring_generation=ring_generation,
            rank=rank,
            size=size,
            backend="ring",
            envs=ring.envs,
            files=ring.files,
            nonce=nonce,
        )
        for rank, (coordinator, ring) in enumerate(
            zip(coordinators, joining("ring", hosts, ports), strict=True)
        )
    ]
