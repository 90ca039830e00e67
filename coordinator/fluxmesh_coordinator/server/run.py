"""`fluxmesh serve`'s process: opens the mesh, listens, and ends in order.

The first Ctrl-C, or SIGTERM, lets what runs finish; a second one cancels it. `cli/serve.py` asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from fluxmesh.errors import FluxmeshError, UsageError
from fluxmesh.storage import interrupts
from fluxmesh.storage.homes import Home
from fluxmesh.weights import hub
from fluxmesh_coordinator.server import key_file, running_server
from fluxmesh_coordinator.server.app import application
from fluxmesh_coordinator.server.catalogue import Catalogue
from fluxmesh_coordinator.server.guard.access import Access, is_loopback
from fluxmesh_coordinator.server.guard.connections import ImpatientProtocol
from fluxmesh_coordinator.server.picture_folder import PictureFolder
from fluxmesh_coordinator.server.queue import journal as journals
from fluxmesh_coordinator.server.queue.journal import Journal
from fluxmesh_coordinator.server.queue.service import PaintingService

CONNECTIONS = 512  # at once
KEEP_ALIVE = 30.0  # seconds between two requests of a connection
LAST_WORDS = 5.0  # seconds in which answers may still leave
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What the command line says."""

    host: str = "127.0.0.1"
    port: int = 8420
    model: str | None = None
    key_file: Path | None = None
    pictures: Path | None = None
    adapters: Path | None = None
    names: tuple[str, ...] = field(default=())  # by which a proxy calls it
    proxies: tuple[str, ...] = field(default=())  # addresses or networks of those in front

    def __post_init__(self) -> None:
        """Raises `UsageError` for a proxy that is no address."""
        for proxy in self.proxies:
            try:
                ipaddress.ip_network(proxy)
            except ValueError:
                raise UsageError.about(
                    "proxy", f"is {proxy!r}", "give its address, such as 127.0.0.1"
                ) from None

    @property
    def needs_key(self) -> bool:
        """Whether somebody outside of this machine may ask."""
        is_fronted = bool(self.names or self.proxies)
        return not is_loopback(self.host) or self.key_file is not None or is_fronted

    @property
    def url(self) -> str:
        """Where clients on this machine find it."""
        return (
            f"http://[{self.host}]:{self.port}"
            if ":" in self.host
            else (f"http://{self.host}:{self.port}")
        )

    def arguments(self) -> list[str]:
        """The same on a command line, in paths that hold wherever it begins."""
        words = ["--host", self.host, "--port", str(self.port)]
        if self.model is not None:
            is_path = os.path.exists(os.path.expanduser(self.model))
            words += ["--model", hub.full_name(self.model) if is_path else self.model]
        for option in ("key_file", "pictures", "adapters"):
            path: Path | None = getattr(self, option)
            if path is not None:
                words += [f"--{option.replace('_', '-')}", str(path.absolute())]
        words += [word for name in self.names for word in ("--name", name)]
        return words + [word for proxy in self.proxies for word in ("--proxy", proxy)]


def key_of(options: ServeOptions) -> tuple[Path | None, str]:
    """The file with the key that clients need, and what its user is told of it; None: no key."""
    if not options.needs_key:
        return None, ""
    path = options.key_file or Home.default().folder / "serve.key"
    key, is_new = key_file.read_or_make(path)
    shown = f" It was made now, and is shown this once: {key}" if is_new else ""
    return path, f"Clients need the key in {path}.{shown}"


def serve(options: ServeOptions, say: Say) -> None:
    """Serves until it is told to end. Raises `FluxmeshError` where it can't begin."""
    home = Home.default()
    path, text = key_of(options)
    if text:
        say(text)
    key = None if path is None else key_file.read_or_make(path)[0]
    catalogue = Catalogue(options.model, options.adapters or home.folder / "adapters")
    pictures = PictureFolder(options.pictures or home.folder / "pictures")
    with listening(options.host, options.port) as listener:
        port = listener.getsockname()[1]
        journal = Journal(pictures.folder / journals.NAME)
        service = PaintingService(catalogue, pictures, journal)
        if lost := len(set(service.lost) & set(journal.new_lost)):
            what = "job was" if lost == 1 else "jobs were"
            say(f"{lost} {what} not finished by the server before.")
        access = Access.of(key, options.names)
        asyncio.run(_serve(service, access, listener, path, replace(options, port=port), say))


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """The socket. Raises `FluxmeshError` where the address is not ours, or taken."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        # asyncio looks at the protocol before it turns Nagle's algorithm off. With it the body of
        # an answer waits until the client has acknowledged the head: 40 ms on Linux.
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise FluxmeshError(
            f"Can't listen on {host} port {port}: {error.strerror or error}; choose another with "
            "`host` and `port`."
        ) from error
    with listener:
        yield listener


def uvicorn_config(app: ASGIApp, proxies: Sequence[str]) -> uvicorn.Config:
    """How uvicorn serves; whose `X-Forwarded-For` and `-Proto` are believed, and nobody else's."""
    return uvicorn.Config(
        app,
        http=ImpatientProtocol,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=bool(proxies),
        forwarded_allow_ips=list(proxies),
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=int(KEEP_ALIVE),
        timeout_graceful_shutdown=int(LAST_WORDS),
    )


class EndingServer(uvicorn.Server):
    """uvicorn's server, whose signals are ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(
    service: PaintingService,
    access: Access,
    listener: socket.socket,
    key_path: Path | None,
    options: ServeOptions,
    say: Say,
) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    server = EndingServer(uvicorn_config(application(service, access), options.proxies))
    await service.open()
    ending = asyncio.create_task(_end_on_signal(service, server, say))
    try:
        with running_server.recorded(Home.default(), options.url, key_path):
            say(f"Serving on {options.url}; Ctrl-C ends it.")
            await server.serve(sockets=[listener])
    finally:
        ending.cancel()
        await asyncio.gather(ending, return_exceptions=True)
        await service.close()


def signals_that_count() -> list[signal.Signals]:
    """Those that end the server: one that is ignored when it starts stays so, as `nohup` asks."""
    return [each for each in interrupts.SIGNALS if signal.getsignal(each) is not signal.SIG_IGN]


async def _end_on_signal(service: PaintingService, server: EndingServer, say: Say) -> None:
    """Lets what runs finish after the first signal, and cancels it after the second."""
    signals: asyncio.Queue[int] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in signals_that_count():
        loop.add_signal_handler(number, signals.put_nowait, number)
    await signals.get()
    drained = asyncio.create_task(service.drain())
    if service.running():
        say("Finishing what runs; Ctrl-C again cancels it.")
    again = asyncio.create_task(signals.get())
    try:
        await asyncio.wait({drained, again}, return_when=asyncio.FIRST_COMPLETED)
        if not drained.done():
            say("Cancelling.")
            service.cancel_all()
        await drained
    finally:  # whatever goes wrong on the way, it ends
        again.cancel()
        server.should_exit = True
