"""What differs on a Mac, emulated in one Python process on Linux.

    EMULATE=gpu,no-proc,pages,files,sockets python -m pytest tests/unit      # or EMULATE=mac: all

`tests/conftest.py` installs it in the tests' own process and puts this folder on PYTHONPATH, where
`sitecustomize.py` installs it in every Python that they start: agents, engines, command lines. It
stands alone, for such a Python knows nothing of `tests`; and it imports mlx and psutil never, but
changes them when somebody else has imported them.

| word | what is emulated |
|---|---|
| gpu | MLX's default device is the GPU of an M5 on Metal; arithmetic stays on the CPU, uncompiled |
| no-proc | there is no /proc; who has a Mac's kernel to ask for processes still finds it |
| pages | MLX's allocator rounds what is above a page up to pages of 16 KiB (`pages.cpp`) |
| files | 256 open files, what Terminal and launchd give |
| sockets | socket pairs have buffers of 8 KiB |
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import importlib.util
import os
import resource
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

VARIABLE = "EMULATE"
WORDS = ("gpu", "no-proc", "pages", "files", "sockets")
HERE = Path(__file__).parent
OPEN_FILES = 256
SOCKET_BUFFER = 8192  # net.local.stream.sendspace and recvspace
ARCHITECTURE = "applegpu_g17s"  # an M5's, which has tf32
# Where `started_at` is, which on a Mac asks the kernel by a call that Linux lacks.
PROCESSES = "fluxmesh.storage.processes"


def words() -> set[str]:
    """What the environment asks for. Raises `ValueError` for a word that means nothing."""
    asked = set(os.environ.get(VARIABLE, "").replace(",", " ").split())
    if asked and sys.platform != "linux":
        raise ValueError(f"{VARIABLE} is for Linux: unset it.")
    if unknown := asked - {"mac", *WORDS}:
        raise ValueError(f"{VARIABLE}: {sorted(unknown)} is none of mac, {', '.join(WORDS)}.")
    return set(WORDS) if "mac" in asked else asked


@functools.cache  # once a process
def install() -> None:
    """Does what the environment asks for, to this process."""
    asked = words()
    after: dict[str, list[Callable[[ModuleType], None]]] = {}
    if "gpu" in asked:
        os.environ.setdefault("MLX_DISABLE_COMPILE", "1")  # the CPU would call a C++ compiler
        after["mlx.core"] = [compute_on_metal]
        after["fluxmesh_agent.status"] = [share_memory]
    if "pages" in asked:
        load_allocator()
    if "no-proc" in asked:
        after["psutil"] = [show_proc_to]
        after[PROCESSES] = [let_ask]
        hide_proc()
    if "files" in asked:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, hard))
    if "sockets" in asked:
        shrink_socket_pairs()
    if after:
        sys.meta_path.insert(0, Finder(after))


class Finder(MetaPathFinder):
    """Calls functions with a module when it has been imported."""

    def __init__(self, after: dict[str, list[Callable[[ModuleType], None]]]) -> None:
        self.after = after

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        functions = self.after.pop(name, [])
        spec = importlib.util.find_spec(name) if functions else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            with proc_in_sight():
                execute(module)
            for function in functions:
                function(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


# gpu


def compute_on_metal(mx: Any) -> None:
    """MLX says that it computes on Metal."""
    gpu = mx.Device(mx.gpu)
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    device_info = {
        "architecture": ARCHITECTURE,
        "device_name": "Apple M5 Max",
        "memory_size": pages,
        "max_recommended_working_set_size": pages * 3 // 4,
        "max_buffer_length": pages // 2,
        "resource_limit": 499000,
    }
    mx.default_device = lambda: gpu
    mx.device_info = lambda device=None: dict(device_info)
    mx.metal.is_available = lambda: True


def share_memory(status: Any) -> None:
    """An agent counts the machine's memory as its GPU's; it would take one on Linux for a card."""
    status.is_mac = lambda: True


# no-proc

_this_thread = threading.local()  # .sees_proc: whether /proc is there for it now


def hide_proc() -> None:
    """Whatever this process looks for under /proc isn't there."""
    sys.addaudithook(_audit)
    for name in ("stat", "lstat", "access", "readlink"):  # these have no event
        setattr(os, name, _without_proc(getattr(os, name)))


@contextlib.contextmanager
def proc_in_sight() -> Iterator[None]:
    """For what reads the system while it is imported, as psutil does."""
    before = getattr(_this_thread, "sees_proc", False)
    _this_thread.sees_proc = True
    try:
        yield
    finally:
        _this_thread.sees_proc = before


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("open", "os.listdir", "os.scandir") and _is_hidden(arguments[0]):
        raise _absence(arguments[0])


def _is_hidden(path: object) -> bool:
    if getattr(_this_thread, "sees_proc", False) or not isinstance(path, (str, bytes, os.PathLike)):
        return False
    text = os.fsdecode(path)
    return text == "/proc" or text.startswith("/proc/")


def _absence(path: Any) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fsdecode(path))


def _without_proc(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(path: Any, *arguments: Any, **keys: Any) -> Any:
        if not _is_hidden(path):
            return function(path, *arguments, **keys)
        if function.__name__ == "access":
            return False
        raise _absence(path)

    return call


def let_ask(processes: Any) -> None:
    """Which process is which is known without /proc, as on a Mac."""
    started_at = processes.started_at

    @functools.wraps(started_at)
    def ask(pid: int) -> Any:
        with proc_in_sight():
            return started_at(pid)

    processes.started_at = ask


def show_proc_to(psutil: Any) -> None:
    """psutil finds /proc by another name, as on a Mac it needs none."""
    link = Path(tempfile.gettempdir(), f"as-on-a-mac-{os.getuid()}-proc")
    with contextlib.suppress(FileExistsError):
        link.symlink_to("/proc")
    psutil.PROCFS_PATH = str(link)


# pages


def load_allocator() -> None:
    """Puts `pages.cpp` before MLX's allocator, in a process that has not loaded MLX."""
    assert "mlx.core" not in sys.modules, "mlx is loaded already"
    ctypes.CDLL(str(built_allocator()), ctypes.RTLD_GLOBAL)


def built_allocator() -> Path:
    """The library of `pages.cpp` for the MLX of this Python; built where it isn't yet."""
    (mlx,) = importlib.util.find_spec("mlx").submodule_search_locations  # type: ignore[union-attr]
    source = HERE / "pages.cpp"
    headers = Path(mlx, "include")
    known = source.read_bytes() + Path(headers, "mlx", "allocator.h").read_bytes()
    name = f"as-on-a-mac-{os.getuid()}-{hashlib.sha256(known).hexdigest()[:16]}.so"
    library = Path(tempfile.gettempdir(), name)
    if not library.exists():
        part = library.with_suffix(f".{os.getpid()}")
        command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{headers}", "-o", str(part)]
        subprocess.run([*command, str(source), "-ldl"], check=True)
        part.rename(library)
    return library


# sockets


def shrink_socket_pairs() -> None:
    """New socket pairs have a Mac's buffers; whoever wants larger ones may say so."""
    make = socket.socketpair

    def small(*arguments: Any, **keys: Any) -> tuple[socket.socket, socket.socket]:
        pair = make(*arguments, **keys)
        for end in pair:
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                end.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER // 2)  # Linux doubles it
        return pair

    socket.socketpair = small
