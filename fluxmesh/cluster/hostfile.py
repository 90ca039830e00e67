"""Which machines a mesh is made of: `mlx.launch`'s JSON hostfile, with a few optional keys.

First on a request's way through a mesh; `launch` and `placement` read what comes out. `parse` is
pure (text to `Hostfile`), `load` only adds the file. Both forms that `mlx.distributed_config`
writes are read unchanged: a list of hosts, or `{"backend", "envs", "hosts"}`. All mistakes of a
file are told at once, each with the host's index, the key and what was expected; what is merely
left out (an environment variable that is not allowed) is a warning, returned as data.

`hostfiles/README.md` describes the format for users; `rendezvous.py` turns a hostfile into what
each of MLX's backends reads.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from fluxmesh.cluster import hostfile_fields as fields
from fluxmesh.cluster.hostfile_fields import Endpoint
from fluxmesh.errors import UsageError

BACKENDS = ("ring", "jaccl", "jaccl-ring", "nccl", "mpi")
TOP_KEYS = ("backend", "envs", "fallback", "hosts")
HOST_KEYS = ("ssh", "ips", "rdma", "control", "python", "models", "memory")
MAX_HOSTS = 256
MAX_FILE_BYTES = 1 << 20
JACCL_HOSTS = 8  # the largest mesh in which every host has a cable to every other
CONTROL_PORT = 47100  # of the first agent of a machine; the next ones count up from it
CONTROL_PORTS = 128  # from there on, that are tried: others may have agents on a machine too
LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")  # names of this machine

# Neither a library to load nor a token can come in through a hostfile; ranks, addresses and
# precision are fluxmesh's own to set.
ENVS = frozenset(
    (
        *("MLX_BFS_MAX_WIDTH", "MLX_DISABLE_COMPILE", "MLX_RING_VERBOSE", "OMP_NUM_THREADS"),
        *("MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER", "MLX_USE_CUDA_GRAPHS"),
        *("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "FLUX_DEV", "FLUX_SCHNELL", "AE"),
        *("NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE", "NCCL_P2P_DISABLE"),
        *("NCCL_NVLS_ENABLE", "NCCL_MIN_NCHANNELS", "AGX_RELAX_CDM_CTXSTORE_TIMEOUT"),
    )
)
SSH = 'a name, an address or "user@name", with ":port" where it is not 22'
FAST_SYNCH = "MLX_METAL_FAST_SYNCH"

T = TypeVar("T")


class HostfileError(UsageError):
    """A hostfile that can't be used; `mistakes` holds all that was found, a sentence each."""

    def __init__(self, name: str, mistakes: Iterable[str]) -> None:
        self.name, self.mistakes = name, tuple(mistakes)
        super().__init__(f"{name}: {' '.join(self.mistakes)}")


@dataclass(frozen=True)
class Host:
    """One line of a hostfile: a machine, or one of several agents on it."""

    rank: int  # its index in the list
    ssh: str  # what ssh is called with; 127.0.0.1 and localhost are this machine
    ips: tuple[str, ...] = ()  # at which the other ranks reach it
    rdma: tuple[tuple[str, ...] | None, ...] = ()  # devices towards each rank, None to itself
    control: Endpoint | None = None
    python: str | None = None  # absolute path of the interpreter that has fluxmesh
    models: str | None = None  # folder of checkpoints
    memory: int | None = None  # bytes that fluxmesh may use at most

    @property
    def name(self) -> str:
        """The machine's name or address, without the user and the port that ssh may need."""
        address = self.ssh.removeprefix("ssh://").rpartition("@")[2]
        if address.startswith("["):
            return address[1:].partition("]")[0]
        return address.partition(":")[0] if address.count(":") == 1 else address

    @property
    def is_local(self) -> bool:
        """Whether it is this machine and this user, which needs no ssh."""
        return self.ssh in LOOPBACK

    @property
    def machine(self) -> str:
        """The same for all agents on one machine."""
        return "localhost" if self.name in LOOPBACK else self.name


@dataclass(frozen=True)
class Hostfile:
    """The machines of a mesh, in rank order."""

    hosts: tuple[Host, ...]
    backend: str = "ring"
    envs: tuple[tuple[str, str], ...] = ()  # of the engines
    warnings: tuple[str, ...] = ()  # what was left out, and why; a sentence each
    falls_back: bool = True  # to slower backends, where this one does not work

    def local_index(self, rank: int) -> int:
        """How many hosts before `rank` are on its machine: 0 for the first agent there."""
        machine = self.hosts[rank].machine
        return sum(host.machine == machine for host in self.hosts[:rank])

    def control(self, rank: int) -> Endpoint:
        """Where the agent of `rank` listens: what its `control` says, or the machine's own name.

        Not `ips`: those of a thunderbolt ring reach the neighbours alone. Without `control`, the
        port is the first of `control_ports`; the host may have to take another.
        """
        host = self.hosts[rank]
        if host.control is not None:
            return host.control
        address = "127.0.0.1" if host.name in LOOPBACK else host.name
        return Endpoint(address, self.control_ports(rank)[0])

    def control_ports(self, rank: int) -> tuple[int, ...]:
        """Ports at which the agent of `rank` may listen: one that is named, or any of a list.

        The lists of two agents of one machine have no port in common, so that each may take the
        first that is free there without a word to the other.
        """
        host = self.hosts[rank]
        if host.control is not None:
            return (host.control.port,)
        here = [other for other in self.hosts if other.machine == host.machine]
        named = {other.control.port for other in here if other.control is not None}
        unnamed = [other.rank for other in here if other.control is None]
        ports = range(CONTROL_PORT, CONTROL_PORT + CONTROL_PORTS + len(here))
        return tuple(p for p in ports if p not in named)[unnamed.index(rank) :: len(unnamed)]

    def at_ports(self, ports: Mapping[int, int]) -> Hostfile:
        """The same with the ports that hosts have taken, by rank, where it names none."""
        hosts = [
            replace(host, control=Endpoint(self.control(host.rank).address, ports[host.rank]))
            if host.control is None and host.rank in ports
            else host
            for host in self.hosts
        ]
        return replace(self, hosts=tuple(hosts))


def load(path: Path) -> Hostfile:
    """Reads a hostfile. Raises `HostfileError`, which is a `UsageError`."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise HostfileError(str(path), [f"It can't be read ({reason}); name a file."]) from error
    if len(data) > MAX_FILE_BYTES:
        raise HostfileError(str(path), [f"It is larger than {MAX_FILE_BYTES} bytes."])
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise HostfileError(str(path), ["It is text in UTF-16; save it as UTF-8."])
    return parse(data.decode("utf-8", errors="replace"), str(path))


def parse(text: str, name: str = "hostfile") -> Hostfile:
    """A hostfile's text to what it means; `name` is what errors call it.

    Raises `HostfileError` with every mistake in it.
    """
    try:
        data = json.loads(text.removeprefix("\ufeff"))  # Windows' editors begin files with it
    except (ValueError, RecursionError) as error:
        raise HostfileError(name, [f"It is not JSON ({error})."]) from error
    if isinstance(data, list):
        data = {"hosts": data}
    if not isinstance(data, dict):
        raise HostfileError(name, ['Expected a list of hosts, or {"backend", "envs", "hosts"}.'])
    reader = _Reader()
    reader.check_keys("", data, TOP_KEYS)
    backend = data.get("backend", "")
    if backend == "":  # what distributed_config writes for ethernet
        backend = BACKENDS[0]
    elif backend not in BACKENDS:
        reader.expected("", "backend", f"one of {', '.join(BACKENDS)}", backend)
        backend = BACKENDS[0]
    envs, warnings = allowed_envs(reader.envs(data.get("envs", [])))
    falls_back = data.get("fallback", True)
    if not isinstance(falls_back, bool):
        reader.expected("", "fallback", "true or false", falls_back)
    entries = data.get("hosts")
    if not isinstance(entries, list) or not 1 <= len(entries) <= MAX_HOSTS:
        reader.expected("", "hosts", f"a list of 1 to {MAX_HOSTS} hosts", entries)
        entries = []
    hosts = [reader.host(rank, entry) for rank, entry in enumerate(entries)]
    if not reader.mistakes:
        reader.check_backend(backend, hosts)
        reader.check_controls(Hostfile(tuple(hosts), backend))
    if reader.mistakes:
        raise HostfileError(name, reader.mistakes)
    return Hostfile(tuple(hosts), backend, envs, warnings, falls_back)


def allowed_envs(
    pairs: Iterable[tuple[str, str]],
) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
    """(the pairs that engines may get, a warning for each of the others)."""
    kept: dict[str, str] = {}
    warnings: list[str] = []
    for key, value in pairs:
        if key == FAST_SYNCH:
            warnings.append(
                f"envs: {key} is left out, since it can hang the GPU until the Mac restarts; "
                f"`env` {key}={value} insists on it."
            )
        elif key not in ENVS:
            warnings.append(
                f"envs: {key} is left out, since engines take no such variable from a hostfile; "
                "hostfiles/README.md names those that they take."
            )
        else:
            kept[key] = value
    return tuple(kept.items()), tuple(warnings)


def may_be_set(key: str) -> bool:
    """Whether whoever starts a mesh may set this variable for engines by hand.

    What a hostfile may, fluxmesh's own, and what a hostfile may not since it can hang a GPU.
    """
    return key in ENVS or key == FAST_SYNCH or key.startswith("FLUXMESH_")


class _Reader:
    """Reads untrusted values, and collects what is wrong with them."""

    def __init__(self) -> None:
        self.mistakes: list[str] = []

    def expected(self, where: str, key: str, what: str, given: Any) -> None:
        shown = "nothing" if given is None else json.dumps(given)
        if len(shown) > 60:
            shown = f"{shown[:57]}..."
        self.mistakes.append(f"{where}{key}: expected {what}, found {shown}.")

    def check_keys(self, where: str, data: dict[str, Any], known: tuple[str, ...]) -> None:
        for key in data:
            if key not in known:
                self.mistakes.append(f"{where}{key[:40]!r} is no key; expected {', '.join(known)}.")

    def envs(self, items: Any) -> list[tuple[str, str]]:
        if not isinstance(items, list):
            self.expected("", "envs", 'a list of "KEY=VALUE"', items)
            return []
        pairs = []
        for item in items:
            key, equals, value = item.partition("=") if isinstance(item, str) else ("", "", "")
            if equals and re.fullmatch(r"[A-Za-z_]\w*", key, re.ASCII) and value.isprintable():
                pairs.append((key, value))
            else:
                self.expected("", "envs", '"KEY=VALUE"', item)
        return pairs

    def host(self, rank: int, entry: Any) -> Host:
        where = f"host {rank}, "
        if not isinstance(entry, dict):
            self.expected(where, "the entry", 'an object such as {"ssh": "mac1"}', entry)
            return Host(rank, "")
        self.check_keys(where, entry, HOST_KEYS)

        def read(key: str, convert: Callable[[Any], T | None], what: str) -> T | None:
            """None where the key is missing; None and a mistake where its value is wrong."""
            value = entry.get(key)
            result = None if value is None else convert(value)
            if value is not None and result is None:
                self.expected(where, key, what, value)
            return result

        ssh = read("ssh", fields.ssh, SSH)
        if entry.get("ssh") is None:
            self.expected(where, "ssh", SSH, None)
        return Host(
            rank,
            ssh or "",
            read("ips", fields.ips, "a list of IP addresses") or (),
            read("rdma", fields.rdma, 'a list of "device", ["device", ...] or null') or (),
            read("control", fields.endpoint, '"ADDRESS:PORT" with an IP address of that host'),
            read("python", fields.absolute, "the absolute path of a Python"),
            read("models", fields.folder, "an absolute path, or one that begins with ~/"),
            read("memory", fields.memory, 'bytes, or a size such as "48GB" or "48GiB"'),
        )

    def check_backend(self, backend: str, hosts: list[Host]) -> None:
        """What a backend needs in order to form a group; one host needs none."""
        if len(hosts) < 2:
            return
        if backend == "ring":
            for host in hosts:
                where, ips = f"host {host.rank}, ", list(host.ips)
                if not ips or any(":" in ip for ip in ips):
                    self.expected(where, "ips", "the IPv4 addresses that its ring uses", ips)
                elif len(ips) != len(hosts[0].ips):
                    self.expected(where, "ips", f"{len(hosts[0].ips)} as on host 0", ips)
        elif backend != "mpi" and not hosts[0].ips:
            self.expected("host 0, ", "ips", f"an address for {backend} to meet at", [])
        if not backend.startswith("jaccl"):
            return
        size = len(hosts)
        if backend == "jaccl" and size > JACCL_HOSTS:
            self.expected("", "hosts", f"at most {JACCL_HOSTS} in a jaccl mesh", size)
        for i, host in enumerate(hosts):
            where = f"host {i}, "
            if len(host.rdma) != size:
                self.expected(where, "rdma", f"{size} entries, one a host", list(host.rdma))
                continue
            neighbours = {(i - 1) % size, (i + 1) % size}
            for j, devices in enumerate(host.rdma):
                if j == i and devices is not None:
                    self.expected(where, f"rdma[{j}]", "null for the host itself", devices)
                elif j != i and devices is None and (backend == "jaccl" or j in neighbours):
                    self.expected(where, f"rdma[{j}]", f"the device towards host {j}", None)

    def check_controls(self, hostfile: Hostfile) -> None:
        taken: dict[tuple[str, int], int] = {}
        for host in hostfile.hosts:
            if host.control is None:
                continue  # it takes one that is free
            endpoint = host.control
            first = taken.setdefault(endpoint, host.rank)
            if first != host.rank:
                self.expected(
                    f"host {host.rank}, ",
                    "control",
                    f"another port than host {first}'s",
                    f"{endpoint.address}:{endpoint.port}",
                )
