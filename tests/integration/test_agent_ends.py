"""SIGTERM ends an agent at every moment of its life: exit code 0, not a word, no engine left."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fluxmesh.cluster.snapshot import ModelVariant
from fluxmesh.deadlines import DEADLINES
from fluxmesh.storage.homes import AgentHome
from fluxmesh.storage.keys import Keys
from fluxmesh.storage.processes import read_record, started_at
from fluxmesh.wire import messages
from fluxmesh.wire.messages import Load
from tests.integration.agents import AgentProcess, connected, play
from tests.paths import ROOT

GONE = 60.0  # seconds within which it must have ended, on a machine that others use
SEED = 7

# The module as `fluxmesh up` runs it, which says when its first line has been run: before that a
# signal meets an interpreter that starts, and not an agent.
BEGIN = """\
import os, runpy, sys
from fluxmesh_agent.ending import Ending
Ending()
os.write(1, b"begun\\n")
runpy.run_module("fluxmesh_agent", run_name="__main__", alter_sys=True)
"""


class Life:
    """An agent's process, from its first line on."""

    def __init__(self, state: Path, *options: str) -> None:
        self.home = AgentHome(state)
        self.user = Keys.new()
        paths = (ROOT, ROOT / "agent", ROOT / "coordinator")
        self.process = subprocess.Popen(
            [sys.executable, "-c", BEGIN, "run", "--state", str(state), "--keys-stdin", *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(map(str, paths)),
                "OMP_NUM_THREADS": "1",
                "FLUXMESH_DELAYS": "load=0.5",
            },
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"begun\n"

    def tell(self) -> None:
        """Gives it its keys."""
        assert self.process.stdin is not None
        settings = {"authorized": {"tester": self.user.public}, "envs": {}}
        self.process.stdin.write(json.dumps(settings).encode() + b"\n")
        self.process.stdin.flush()

    def listens(self) -> AgentProcess:
        """Gives it its keys, and waits until it listens."""
        self.tell()
        assert self.process.stdout is not None
        said = json.loads(self.process.stdout.readline())
        place = (said["endpoint"], said["public_key"], said["boot"])
        return AgentProcess(self.process, self.home.folder, *place, self.user)

    def ends(self, *, signals: int = 1, within: float = GONE) -> None:
        """SIGTERM, and what must be so after that, so many seconds later at most."""
        engine = read_record(self.home.engine)
        for _ in range(signals):
            self.process.send_signal(signal.SIGTERM)
            time.sleep(0.001)
        code = self.process.wait(within)
        assert self.process.stderr is not None
        assert (code, self.process.stderr.read()) == (0, b"")
        for record in (engine, read_record(self.home.engine)):
            assert record is None or started_at(record["pid"]) != record["start"]
        log = self.home.log
        said = log.read_text() if log.exists() else ""
        assert "Traceback" not in said and "ERROR" not in said, said


@contextmanager
def life(state: Path, *options: str) -> Iterator[Life]:
    state.mkdir(mode=0o700, exist_ok=True)
    agent = Life(state, *options)
    try:
        yield agent
    finally:
        agent.process.kill()
        agent.process.wait()
        for pipe in (agent.process.stdin, agent.process.stdout, agent.process.stderr):
            assert pipe is not None
            pipe.close()


EPHEMERAL = pytest.mark.parametrize("options", [("--ephemeral",), ()], ids=["ephemeral", "staying"])


@EPHEMERAL
def test_an_agent_that_waits_for_its_keys_ends(tmp_path: Path, options: tuple[str, ...]) -> None:
    with life(tmp_path / "agent", *options) as agent:
        time.sleep(0.5)  # it sits in a read
        agent.ends()


@pytest.mark.parametrize("number", range(6))
def test_an_agent_ends_at_any_moment_of_its_first_seconds(tmp_path: Path, number: int) -> None:
    after = random.Random(SEED + number).uniform(0.0, 1.5)
    options = ("--ephemeral",) if number % 2 else ()
    with life(tmp_path / "agent", *options) as agent:
        agent.tell()
        time.sleep(after)
        agent.ends(signals=1 + number % 3)


@EPHEMERAL
def test_an_agent_ends_that_has_just_said_that_it_listens(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    with life(tmp_path / "agent", *options) as agent:
        agent.listens()
        agent.ends()


def test_an_agent_ends_whose_engine_loads_for_a_coordinator(tmp_path: Path) -> None:
    with life(tmp_path / "agent") as agent:
        host = agent.listens()

        async def scene() -> None:
            async with connected(host) as user:
                await user.lease()
                await user.done(Load(**user.head(), weights=ModelVariant("tiny", "float32")))
                await user.until(messages.LoadProgress)
                agent.ends()

        play(scene())


def test_an_agent_ends_that_waits_for_a_probe_of_a_link(tmp_path: Path) -> None:
    """Its port would stay open for longer."""
    with life(tmp_path / "agent") as agent:
        host = agent.listens()

        async def scene() -> None:
            async with connected(host) as user:
                answer = await user.ask(messages.ListenForLink("127.0.0.1", b"token"))
                assert isinstance(answer, messages.Ports)
                agent.ends(within=DEADLINES.link_open - 1)

        play(scene())


def test_an_agent_ends_by_its_stdin_and_by_a_signal_at_once(tmp_path: Path) -> None:
    with life(tmp_path / "agent", "--ephemeral") as agent:
        agent.listens()
        assert agent.process.stdin is not None
        agent.process.stdin.close()
        agent.ends(signals=3)
    assert not (tmp_path / "agent").exists()
