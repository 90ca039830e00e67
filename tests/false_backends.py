"""Backends that need no RDMA and no GPU, and fail when they are told to.

An engine whose `sitecustomize` calls `install` takes `jaccl`, `jaccl-ring` and `nccl` for what MLX
has: they meet where the real ones do, by the same variables and files, and then are a ring of
sockets on loopback. What fails, and at which moment, stands for what people have reported of JACCL:
an error or a segmentation fault while a group forms, one that never forms, and the same two in the
middle of a collective.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx

from tests.ports import free_ports

BEGIN = 0  # a fault at this collective comes while the group forms
PATIENCE = 60.0  # seconds until ranks that do not meet give up


@dataclass
class FalseBackends:
    """`faults`: backend -> (how the last rank fails, at its collective of which number)."""

    faults: Mapping[str, tuple[str, int]]
    _made: int = field(default=0, init=False)

    def envs(self, paths: str) -> dict[str, str]:
        """What makes an engine have them; `paths` is its PYTHONPATH."""
        here = Path(__file__).parent / "rdma"
        return {
            "PYTHONPATH": f"{here}{os.pathsep}{paths}",
            "FALSE_BACKENDS": json.dumps(self.faults),
        }

    def install(self) -> None:
        real = mx.distributed.init

        def init(strict: bool = False, backend: str = "any") -> Any:
            if backend == "ring":
                return real(strict=strict, backend=backend)
            name = "jaccl-ring" if os.environ.get("MLX_JACCL_RING") else backend
            rank, size, meeting = _place(backend)
            how, call = self.faults.get(name, ("", -1))
            if rank == size - 1 and how:
                if call == BEGIN:
                    fail(how, name)
                for kind in ("all_sum", "all_gather"):
                    self._count(kind, functools.partial(fail, how, name), call)
            path = Path("false.json").absolute()
            path.write_text(json.dumps([[address] for address in _meet(rank, size, meeting)]))
            os.environ["MLX_HOSTFILE"] = str(path)
            return real(strict=True, backend="ring")

        mx.distributed.init = init

    def _count(self, name: str, fails: Callable[[], NoReturn], call: int) -> None:
        real = getattr(mx.distributed, name)

        def counted(*arguments: Any, **keys: Any) -> Any:
            self._made += 1
            if self._made == call:
                fails()
            return real(*arguments, **keys)

        setattr(mx.distributed, name, counted)


def fail(how: str, name: str) -> NoReturn:
    """In one of the ways that were reported."""
    if how == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "error":
        raise RuntimeError(f"[{name}] Changing queue pair to RTR failed with errno 60")
    while True:
        time.sleep(60.0)


def _place(backend: str) -> tuple[int, int, str]:
    """(rank, size, where rank 0 waits for the others), as the coordinator has set them."""
    rank = int(os.environ["MLX_RANK"])
    if backend == "nccl":
        meeting = f"{os.environ['NCCL_HOST_IP']}:{os.environ['NCCL_PORT']}"
        return rank, int(os.environ["MLX_WORLD_SIZE"]), meeting
    devices = json.loads(Path(os.environ["MLX_IBV_DEVICES"]).read_text())
    return rank, len(devices), os.environ["MLX_JACCL_COORDINATOR"]


def _meet(rank: int, size: int, meeting: str) -> list[str]:
    """Where all ranks listen for the ring that they really are. Rank 0 tells the others."""
    own = f"127.0.0.1:{free_ports(1)[0]}"
    host, _, port = meeting.rpartition(":")
    if rank:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                with socket.create_connection((host, int(port)), PATIENCE) as there:
                    there.sendall(json.dumps([rank, own]).encode() + b"\n")
                    return list(json.loads(there.makefile().readline()))
            except (OSError, ValueError):
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)
    addresses = {0: own}
    with socket.create_server((host, int(port)), backlog=size) as server:
        server.settimeout(PATIENCE)
        others = [server.accept()[0] for _ in range(size - 1)]
    for other in others:
        number, address = json.loads(other.makefile().readline())
        addresses[number] = address
    for other in others:
        other.sendall(json.dumps([addresses[k] for k in range(size)]).encode() + b"\n")
        other.close()
    return [addresses[k] for k in range(size)]
