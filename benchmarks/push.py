"""How fast `fluxmesh models push` is, beside what a plain socket carries on the same link.

    python -m benchmarks.push                               # Linux, as root: links made of tc
    python -m benchmarks.push --rates 125e6 --gigabytes 1 --hosts 3
    python -m benchmarks.push --disks /some/folder          # else in memory, in /dev/shm

For each rate of the links, in bytes a second, and without a limit: the hosts are network namespaces
(`limited.py`), host 0 has a checkpoint in four large files, the others lack it. The plain socket is
what agents measure links with: one connection, one thread a side, zeros, no disk, no hash. Socket
and push take turns, `--rounds` times; of each the median counts. "of all" is from the first byte to
the last file's place on the last host; with more than two hosts each passes on what it gets.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import ROOT, Result, Skipped, say
from benchmarks.limited import limited

UNLIMITED = 12.5e9  # bytes/s: 100 Gb/s, above what one processor hands over
REPO, COMMIT = "benchmark/flux", "b" * 40
FILES = 4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rates", nargs="*", type=float, default=[125e6, 1.25e9, UNLIMITED])
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--disks", type=Path, help="where the hosts keep their models")
    parser.add_argument("--json", type=Path, help="write everything measured into this file")
    options = parser.parse_args()
    say(f"{harness.machine()}\n")
    results: list[Result] = []
    for rate in options.rates:
        with contextlib.suppress(KeyboardInterrupt):
            results += measure(rate, options)
    say("\n" + report(results))
    harness.write_json(options.json, results)


def measure(rate: float, options: argparse.Namespace) -> Iterator[Result]:
    """One result a round."""
    where = options.disks or (Path("/dev/shm") if Path("/dev/shm").is_dir() else None)
    with (
        tempfile.TemporaryDirectory(prefix="fluxmesh-push-", dir=where) as name,
        limited(options.hosts, rate, "tiny", Path(name)) as hostfile,
    ):
        disks = [Path(name) / host["ssh"] for host in json.loads(hostfile.read_text())]
        nbytes = make(disks[0] / "hub", round(options.gigabytes * 1e9))
        for _ in range(options.rounds):
            socket = plain_socket(min(nbytes, 1 << 30))
            for disk in disks[1:]:
                shutil.rmtree(disk / "hub", ignore_errors=True)
            arrived = push()
            seconds = max(each["seconds"] for each in arrived)
            result = {"rate": rate, "hosts": options.hosts, "nbytes": nbytes}
            yield {**result, "socket": socket, "push": nbytes / seconds, "seconds": seconds}


def make(cache: Path, nbytes: int) -> int:
    """A checkpoint of the embedded one's shape in a Hub cache, grown to `nbytes`; its size."""
    from fluxmesh.weights.hub import tiny_folder
    from tests.push_mesh import padded

    folder = cache / f"models--{REPO.replace('/', '--')}"
    plain = folder / "plain"
    shutil.copytree(tiny_folder(), plain)
    for weights in sorted(plain.rglob("*.safetensors"))[:FILES]:
        padded(weights, nbytes // FILES)
    (folder / "blobs").mkdir()
    (folder / "refs").mkdir()
    total = 0
    for file in sorted(path for path in plain.rglob("*") if path.is_file()):
        with open(file, "rb") as opened:
            blob = folder / "blobs" / hashlib.file_digest(opened, "sha256").hexdigest()
        link = folder / "snapshots" / COMMIT / file.relative_to(plain)
        link.parent.mkdir(parents=True, exist_ok=True)
        total += file.stat().st_size
        file.rename(blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (folder / "refs" / "main").write_text(COMMIT)
    return total


def plain_socket(nbytes: int) -> float:
    """Bytes a second from host 0 to host 1, as the agents measure it."""
    import secrets

    from fluxmesh.wire import messages
    from fluxmesh.wire.tasks import together
    from fluxmesh.wire.transport.base import Dialer
    from fluxmesh_coordinator.agents import mesh_file
    from fluxmesh_coordinator.agents.client import AgentClient
    from fluxmesh_coordinator.agents.status import run, user_keys

    mesh = mesh_file.load()
    assert mesh is not None
    ip = mesh.hosts[1].ips[0]

    async def probe(dialer: Dialer) -> float:
        clients = [AgentClient(dialer, member) for member in mesh.members[:2]]
        await together(client.__aenter__() for client in clients)
        try:
            token = secrets.token_bytes(32)
            listens = await clients[1].ask(messages.ListenForLink(ip, token), messages.Ports)
            ask = messages.ProbeLink(ip=ip, port=listens.ports[0], token=token, nbytes=nbytes)
            return (await clients[0].ask(ask, messages.LinkRate, 600)).rate
        finally:
            await together(client.close() for client in clients)

    return run(user_keys(), probe)


def push() -> list[Result]:
    """What `fluxmesh models push` says of each host that got it."""
    command = [sys.executable, "-m", "fluxmesh_coordinator", "models", "push", REPO, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Skipped(done.stderr.strip())
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return [line for line in lines if line["event"] == "arrived"]


def report(results: list[Result]) -> str:
    """A line for each rate."""
    rows: list[list[str]] = []
    for rate in dict.fromkeys(result["rate"] for result in results):
        rounds = [result for result in results if result["rate"] == rate]
        socket, pushed = (statistics.median(r[key] for r in rounds) for key in ("socket", "push"))
        link = "none" if rate >= UNLIMITED else f"{8 * rate / 1e9:g} Gb/s"
        rates = [f"{value / 1e9:.3f} GB/s" for value in (socket, pushed)]
        size = f"{rounds[0]['nbytes'] / 1e9:.1f} GB to {rounds[0]['hosts'] - 1}"
        seconds = f"{statistics.median(r['seconds'] for r in rounds):.2f} s"
        rows.append([link, size, *rates, seconds, f"{pushed / socket:.2f}"])
    header = ["limit", "push", "plain socket", "push, of all", "seconds", "push / socket"]
    return harness.table(header, rows)


if __name__ == "__main__":
    main()
