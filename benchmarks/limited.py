"""Hosts of this machine that are joined by slow links: what a mesh of slow cables is like.

    with limited(hosts=2, rate=125e6, model="tiny"):
        ...  # `fluxmesh` finds this mesh up, in a home of its own

Each host is a network namespace at the end of a pair of virtual interfaces whose queues let `rate`
bytes a second through (`tc tbf`); a bridge joins them. This process is outside, as a laptop is.
A host computes on processors of its own (`shares`), also while the others rest: else a host alone
would be faster than beside others, which no plan could know. Needs Linux, root, iproute2 and
taskset. Used by `plans.py`, `push.py` and `emulated.py`, which takes the links alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.harness import ROOT, Skipped, say

LEAST, TICKS = 16 << 10, 200  # bytes that pass at once, and the rate's part that must
LEAST_QUEUE, QUEUED = 1 << 20, 0.05  # bytes that may wait for a link, and seconds of its rate
SSH = """\
#!/bin/sh
while [ "$1" != "--" ]; do shift; done
host=$2
shift 2
case ${{host##*.}} in
{cases}
esac
export OMP_NUM_THREADS=$threads OPENBLAS_NUM_THREADS=$threads
if [ -n "$FLUXMESH_DISKS" ]; then
    export HF_HOME="$FLUXMESH_DISKS/$host" FLUXMESH_STATE="$FLUXMESH_DISKS/$host/state"
fi
exec ip netns exec "{name}-${{host##*.}}" taskset -c "$cores" sh -c "$*"
"""


@contextlib.contextmanager
def limited(hosts: int, rate: float, model: str, disks: Path | None = None) -> Iterator[Path]:
    """A mesh of `hosts` agents that is up and holds `model`; gives its hostfile.

    A folder `disks` gives each host a Hub cache of its own: one by its address, below it. Raises
    `Skipped` where namespaces can't be made.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fluxmesh-links-")))
        own = shares(sorted(os.sched_getaffinity(0)), hosts)
        burst = max(LEAST, round(rate / TICKS))
        name, net = stack.enter_context(namespaces(own, rate, burst))
        ssh = folder / "ssh"
        cases = "\n".join(
            f"{i}) cores={','.join(map(str, cores))} threads={len(cores)} ;;"
            for i, cores in enumerate(own, start=2)
        )
        ssh.write_text(SSH.format(name=name, cases=cases))
        ssh.chmod(0o700)
        hostfile = folder / "hosts.json"
        entries = [
            {"ssh": f"{net}.{i}", "ips": [f"{net}.{i}"], "control": f"{net}.{i}:{47100 + i}"}
            for i in range(2, hosts + 2)
        ]
        hostfile.write_text(json.dumps(entries))
        home = folder / "home"
        home.mkdir(mode=0o700)
        mine = {"FLUXMESH_HOME": str(home), "FLUXMESH_SSH": str(ssh), "HOME": str(home)}
        mine["FLUXMESH_DISKS"] = "" if disks is None else str(disks)
        stack.enter_context(environment(mine))
        stack.callback(_fluxmesh, "down")
        _fluxmesh("up", str(hostfile), "--model", model)
        yield hostfile


def shares(cores: Sequence[int], hosts: int) -> list[tuple[int, ...]]:
    """Which processors each host computes on: as many as every other host, and nobody else's.

    Where there are fewer than hosts, some share one: they are agents of one device.
    """
    each = len(cores) // hosts
    if each:
        return [tuple(cores[i * each : (i + 1) * each]) for i in range(hosts)]
    return [(cores[i % len(cores)],) for i in range(hosts)]


@contextlib.contextmanager
def namespaces(
    shares: Sequence[tuple[int, ...]], rate: float, burst: int
) -> Iterator[tuple[str, str]]:
    """A bridge at NET.1, and namespaces NAME-2, NAME-3, ... at NET.2, NET.3, ... behind slow links.

    Gives (NAME, NET). One for each of `shares`, the processors that a host computes on; hosts with
    the same ones are agents of one device. `rate` is in bytes a second, `burst` bytes may pass at
    once. Raises `Skipped` where namespaces can't be made.
    """
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        raise Skipped("slow links are made of network namespaces, which needs Linux and root")
    if missing := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        raise Skipped(f"slow links are made by iproute2, of which {missing[0]} is missing")
    name, net = f"fm{secrets.token_hex(2)}", f"10.214.{secrets.randbelow(250)}"
    with contextlib.ExitStack() as stack:
        _join(stack, name, net, shares, rate, burst)
        yield name, net


def _join(
    stack: contextlib.ExitStack,
    name: str,
    net: str,
    shares: Sequence[tuple[int, ...]],
    rate: float,
    burst: int,
) -> None:
    bridge = f"{name}br"
    _run("ip", "link", "add", bridge, "type", "bridge")
    stack.callback(_run, "ip", "link", "del", bridge)
    _run("ip", "addr", "add", f"{net}.1/24", "dev", bridge)
    _run("ip", "link", "set", bridge, "up")
    devices = {cores: secrets.token_hex(16) for cores in shares}
    for i, cores in enumerate(shares, start=2):
        space, near, far = f"{name}-{i}", f"{name}v{i}", f"{name}p{i}"
        _run("ip", "netns", "add", space)
        stack.callback(_run, "ip", "netns", "del", space)  # and its link with it
        _run("ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", space)
        _run("ip", "link", "set", near, "master", bridge, "up")
        _run("ip", "-n", space, "addr", "add", f"{net}.{i}/24", "dev", far)
        _run("ip", "-n", space, "link", "set", far, "up")
        _run("ip", "-n", space, "link", "set", "lo", "up")
        # `ip netns exec` shows it as /etc/machine-id: hosts with a device each, but for those that
        # share a processor.
        own = Path("/etc/netns") / space
        own.mkdir(parents=True)
        stack.callback(shutil.rmtree, own)
        (own / "machine-id").write_text(devices[cores] + "\n")
        queue = burst + max(LEAST_QUEUE, round(rate * QUEUED))
        limit = ("rate", f"{round(8 * rate)}bit", "burst", str(burst), "limit", str(queue))
        _run("tc", "-n", space, "qdisc", "add", "dev", far, "root", "tbf", *limit)


@contextlib.contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """These variables for a while, for this process and those that it starts."""
    before = {key: os.environ.get(key) for key in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def _fluxmesh(*words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fluxmesh_coordinator", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    say(done.stdout)
    if done.returncode:
        raise Skipped(done.stderr.strip() or f"fluxmesh {words[0]} failed")


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Skipped(f"{' '.join(words[:4])}: {done.stderr.strip()}")
