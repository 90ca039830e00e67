"""A mesh whose hosts have disks of their own, on this machine: what a push goes between.

Each host is reached by a fake ssh, which gives it a Hub cache and a state folder of its own; the
user, who is on none of them, has a third.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import psutil

from fluxmesh.cluster import hostfile
from fluxmesh.cluster.snapshot import ModelVariant
from fluxmesh.storage.homes import AgentHome, Home
from fluxmesh_coordinator.console.up_report import JsonWatcher
from fluxmesh_coordinator.deploy.bringup import Bringup, Wish
from tests.checkpoints import make_checkpoint
from tests.integration.conftest import FinishedProcess, environment
from tests.ports import free_ports

COMMIT = "c" * 40
SSH = """\
#!/bin/sh
while [ "$1" != "--" ]; do shift; done
host=$2
shift 2
FLUXMESH_STATE="{folder}/$host/state" HF_HOME="{folder}/$host/hub" exec sh -c "$*"
"""


@dataclass
class PushMesh:
    """Some hosts that are up, and their user."""

    folder: Path
    ports: Sequence[int]
    env: Mapping[str, str]

    def start(self, *arguments: object) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "fluxmesh_coordinator", *map(str, arguments)],
            env=self.env,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def __call__(self, *arguments: object) -> FinishedProcess:
        process = self.start(*arguments)
        try:
            out, err = process.communicate(timeout=200)
        finally:
            process.kill()
        return FinishedProcess(process.returncode, out.decode(), err.decode())

    @property
    def own_cache(self) -> Path:
        """The user's."""
        return Path(self.env["HF_HOME"]) / "hub"

    def cache(self, rank: int) -> Path:
        """The Hub cache of a host."""
        return self.folder / f"host{rank}" / "hub" / "hub"

    def models(self, rank: int) -> Path:
        """The folder of models of a host."""
        return self.folder / f"host{rank}" / "state" / "models"

    def repo(self, rank: int, repo: str) -> Path:
        """The folder of a repository in the Hub cache of a host."""
        return self.cache(rank) / f"models--{repo.replace('/', '--')}"

    def snapshot(self, rank: int, repo: str) -> Path:
        return self.repo(rank, repo) / "snapshots" / COMMIT

    def partial(self, rank: int, repo: str) -> int:
        """Bytes of files that have not arrived whole."""
        nbytes = 0
        for file in (self.repo(rank, repo) / "blobs").glob("*.pushed"):
            with contextlib.suppress(FileNotFoundError):  # it has just arrived
                nbytes += file.stat().st_size
        return nbytes

    def wait_for_bytes(self, rank: int, repo: str, nbytes: int) -> None:
        deadline = time.monotonic() + 120
        while self.partial(rank, repo) < nbytes:
            assert time.monotonic() < deadline, "nothing arrives"
            time.sleep(0.002)

    @contextmanager
    def slowed(self, rank: int) -> Iterator[None]:
        """Inside, what comes to a host comes slowly: its agent stands still most of the time.

        So that a push is under way until whoever looks at it, or breaks it, comes.
        """
        pid, is_over = self.agent_pid(rank), threading.Event()

        def slow() -> None:
            with contextlib.suppress(ProcessLookupError):
                while not is_over.is_set():
                    os.kill(pid, signal.SIGSTOP)
                    time.sleep(0.09)
                    os.kill(pid, signal.SIGCONT)
                    time.sleep(0.01)

        slowing = threading.Thread(target=slow)
        slowing.start()
        try:
            yield
        finally:
            is_over.set()
            slowing.join()

    def up(self) -> None:
        """All agents run, and hold nothing: loading and timing `tiny` takes longer than a push."""
        path = self.folder / "hosts.json"
        with mock.patch.dict(os.environ, self.env):
            wish = Wish(hostfile.load(path), str(path), path.read_text(), ModelVariant("tiny"))
            Bringup(wish, JsonWatcher(pull=False), Home.default()).run()

    def processes(self) -> set[int]:
        """Those of its user."""
        pids = set()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("FLUXMESH_HOME") == self.env["FLUXMESH_HOME"]:
                    pids.add(process.pid)
        return pids

    def agent(self, rank: int) -> AgentHome:
        return AgentHome(self.folder / f"host{rank}" / "state" / f"agent-{self.ports[rank]}")

    def agent_pid(self, rank: int) -> int:
        return int(json.loads(self.agent(rank).agent.read_text())["pid"])


@contextmanager
def push_mesh(folder: Path, hosts: int) -> Iterator[PushMesh]:
    """So many agents that hold nothing; nothing of them is left at the end."""
    ports = free_ports(hosts)
    ssh = folder / "ssh"
    ssh.write_text(SSH.format(folder=folder))
    ssh.chmod(0o755)
    for rank in range(hosts):
        (folder / f"host{rank}").mkdir()
    lines = [
        {
            "ssh": f"host{rank}",
            "ips": ["127.0.0.1"],
            "control": f"127.0.0.1:{port}",
            "python": sys.executable,
        }
        for rank, port in enumerate(ports)
    ]
    (folder / "hosts.json").write_text(json.dumps(lines))
    own = {"FLUXMESH_SSH": str(ssh), "FLUXMESH_STATE": str(folder / "state")}
    mesh = PushMesh(folder, ports, environment(folder) | own)
    try:
        mesh.up()
        yield mesh
    finally:
        mesh("down", "--force")


def cached(cache: Path, repo: str, pad: int = 0) -> Path:
    """A random FLUX as a snapshot in a Hub cache, its weights `pad` bytes larger."""
    made = make_checkpoint(cache.parent / "made", dtype="bfloat16", shards=2)
    (made.path / "tokenizer" / "special_tokens_map.json").write_text("{}")  # of diffusers' alone
    if pad:
        padded(next(made.path.glob("transformer/*.safetensors")), pad)
    folder = cache / f"models--{repo.replace('/', '--')}"
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    (folder / "refs").mkdir(exist_ok=True)
    snapshot = folder / "snapshots" / COMMIT
    for file in sorted(made.path.rglob("*")):
        if not file.is_file():
            continue
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        # The Hub names small files by git's hash, which is no SHA-256.
        blob = content if file.suffix == ".safetensors" else content[:40]
        name = snapshot / file.relative_to(made.path)
        name.parent.mkdir(parents=True, exist_ok=True)
        file.rename(folder / "blobs" / blob)
        name.symlink_to(os.path.relpath(folder / "blobs" / blob, name.parent))
    (folder / "refs" / "main").write_text(COMMIT)
    return snapshot


def padded(path: Path, nbytes: int) -> None:
    """Makes a file of weights larger by a tensor that nobody reads."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    end = len(rest)
    header["padding"] = {"dtype": "U8", "shape": [nbytes], "data_offsets": [end, end + nbytes]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + rest)
        piece = bytes(range(256)) * 4096
        for begin in range(0, nbytes, len(piece)):
            file.write(piece[: nbytes - begin])


def contents(folder: Path) -> dict[str, str]:
    """Hashes of the files below a folder, links followed, by their paths."""
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }
