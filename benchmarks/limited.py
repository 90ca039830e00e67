"""Hosts of this machine that are joined by slow links: what a mesh of slow cables is like.

    with limited(hosts=2, rate=125e6, model="tiny"):
        ...  # `fluxmesh` finds this mesh up, in a home of its own

Each host is a network namespace at the end of a pair of virtual interfaces whose queues let `rate`
bytes a second through (`tc tbf`); a bridge joins them. This process is outside, as a laptop is.
Needs Linux, root and iproute2. Used by `plans.py`.
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
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness import ROOT, Skipped, say

LEAST, TICKS = 16 << 10, 200  # bytes that pass at once, and the rate's part that must
SSH = """\
#!/bin/sh
while [ "$1" != "--" ]; do shift; done
host=$2
shift 2
exec ip netns exec "{name}-${{host##*.}}" sh -c "$*"
"""


@contextlib.contextmanager
def limited(hosts: int, rate: float, model: str) -> Iterator[Path]:
    """A mesh of `hosts` agents that is up and holds `model`; gives its hostfile.

    Raises `Skipped` where namespaces can't be made.
    """
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        raise Skipped("slow links are made of network namespaces, which needs Linux and root")
    name, net = f"fm{secrets.token_hex(2)}", f"10.214.{secrets.randbelow(250)}"
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fluxmesh-links-")))
        _join(stack, name, net, hosts, rate)
        ssh = folder / "ssh"
        ssh.write_text(SSH.format(name=name))
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
        mine |= {"OMP_NUM_THREADS": "1"}
        stack.enter_context(_environment(mine))
        stack.callback(_fluxmesh, "down")
        _fluxmesh("up", str(hostfile), "--model", model)
        yield hostfile


def _join(stack: contextlib.ExitStack, name: str, net: str, hosts: int, rate: float) -> None:
    """A bridge at `net`.1, and a namespace behind a slow link at `net`.2 and each after it."""
    bridge = f"{name}br"
    _run("ip", "link", "add", bridge, "type", "bridge")
    stack.callback(_run, "ip", "link", "del", bridge)
    _run("ip", "addr", "add", f"{net}.1/24", "dev", bridge)
    _run("ip", "link", "set", bridge, "up")
    for i in range(2, hosts + 2):
        space, near, far = f"{name}-{i}", f"{name}v{i}", f"{name}p{i}"
        _run("ip", "netns", "add", space)
        stack.callback(_run, "ip", "netns", "del", space)  # and its link with it
        _run("ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", space)
        _run("ip", "link", "set", near, "master", bridge, "up")
        _run("ip", "-n", space, "addr", "add", f"{net}.{i}/24", "dev", far)
        _run("ip", "-n", space, "link", "set", far, "up")
        _run("ip", "-n", space, "link", "set", "lo", "up")
        # `ip netns exec` shows it as /etc/machine-id: these are hosts with a device each.
        own = Path("/etc/netns") / space
        own.mkdir(parents=True)
        stack.callback(shutil.rmtree, own)
        (own / "machine-id").write_text(secrets.token_hex(16) + "\n")
        burst = max(LEAST, round(rate / TICKS))
        limit = ("rate", f"{round(8 * rate)}bit", "burst", str(burst), "latency", "50ms")
        _run("tc", "-n", space, "qdisc", "add", "dev", far, "root", "tbf", *limit)


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
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
