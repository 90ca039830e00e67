"""Checkpoints that come to this host, and go from it to others, as coordinators ask for.

The event loop's side of `parcels/`: what a message asks for is done in threads, and ends when the
conversation does that asked for it. None of it needs a lease: what is there already is not touched.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from fluxmesh.deadlines import DEADLINES, Deadlines
from fluxmesh.errors import FluxmeshError, UsageError, WeightsError
from fluxmesh.machine.identity import machine_id
from fluxmesh.weights import hub
from fluxmesh.weights.embedded.checkpoints import embedded_names
from fluxmesh.weights.models_folder import folder_name
from fluxmesh.wire import messages
from fluxmesh.wire.messages.parcel import TOKEN_BYTES
from fluxmesh_agent.model_paths import Roots
from fluxmesh_agent.parcels.landing import landing
from fluxmesh_agent.parcels.packing import Packed, packed
from fluxmesh_agent.parcels.receiving import ParcelReceiver
from fluxmesh_agent.parcels.relaying import RelaySource
from fluxmesh_agent.parcels.sending import DiskSource, FileSource, ParcelSender
from fluxmesh_agent.threads import in_thread

AT_ONCE = 8  # checkpoints that come or go; a chain of hosts needs two

Pushing = messages.AskModel | messages.ReceiveModel | messages.SendModel


class Pushes:
    """All that goes on at this host."""

    def __init__(self, roots: Roots, ip: str, deadlines: Deadlines) -> None:
        """`ip` is the address at which the agent listens: the last one that others try."""
        self._roots, self._ip, self._deadlines = roots, ip, deadlines
        self._coming: dict[bytes, ParcelReceiver] = {}
        self._going: dict[bytes, ParcelSender] = {}

    @property
    def is_busy(self) -> bool:
        return bool(self._coming or self._going)

    async def do(
        self, message: Pushing, tell: Callable[[messages.Report], None]
    ) -> messages.Message:
        """Answers it, in the end; `tell` hears how far it is. Raises `FluxmeshError`."""
        if isinstance(message, messages.AskModel):
            return await in_thread(lambda: self._here(message.model))
        token = message.token
        if len(token) != TOKEN_BYTES or token in self._coming or token in self._going:
            raise UsageError(f"A push needs a token of {TOKEN_BYTES} bytes that is new.")
        if len(self._coming) + len(self._going) >= AT_ONCE:
            raise FluxmeshError(f"{AT_ONCE} models are under way at this host; try again later.")
        if isinstance(message, messages.ReceiveModel):
            await self._receive(message, tell)
        else:
            await self._send(message)
        return messages.Done()

    def stop(self, token: bytes) -> None:
        """Twice, or for what is over, is harmless."""
        for each in (self._coming.get(token), self._going.get(token)):
            if each is not None:
                each.stop()

    def _here(self, model: str) -> messages.ModelHere:
        place = hashlib.sha256(f"{machine_id()} {self._folder(model)}".encode()).hexdigest()[:16]
        try:
            return messages.ModelHere(self._packed(model).parcel, place)
        except FluxmeshError as error:
            return messages.ModelHere(None, place, str(error))

    def _folder(self, model: str) -> str:
        """The folders in which it would land."""
        roots = (hub.hub_cache(), self._models / folder_name(model))
        return " ".join(os.path.realpath(root) for root in roots)

    @property
    def _models(self) -> Path:
        if self._roots.models is None:
            raise UsageError("This host has no folder of models.")
        return self._roots.models

    def _packed(self, model: str) -> Packed:
        if hub.alias_of(model) in embedded_names():
            raise UsageError(f"{model} comes with fluxmesh; every host has it.")
        return packed(model, self._roots.model(model))

    async def _receive(
        self, message: messages.ReceiveModel, tell: Callable[[messages.Report], None]
    ) -> None:
        parcel, token = message.parcel, message.token
        place = landing(parcel, hub.hub_cache(), self._models)
        if not parcel.commit and parcel.name != folder_name(message.model):
            raise UsageError(f"{message.model!r} is not what a host calls {parcel.name!r}.")
        receiver = ParcelReceiver(place, token, (*message.ips, self._ip), self._deadlines)
        loop = asyncio.get_running_loop()

        def listening(addresses: Sequence[str]) -> None:
            awaited = messages.ModelAwaited(token, tuple(addresses), receiver.done_bytes)
            loop.call_soon_threadsafe(tell, awaited)

        self._coming[token] = receiver
        try:
            work = asyncio.ensure_future(in_thread(lambda: receiver.run(listening)))
            while not work.done():
                await asyncio.wait([work], timeout=DEADLINES.push_word)
                done = (receiver.done_bytes, parcel.nbytes, receiver.address)
                tell(messages.ModelProgress(token, *done))
            work.result()
            await in_thread(lambda: self._check(message))
        finally:
            receiver.stop()
            del self._coming[token]

    def _check(self, message: messages.ReceiveModel) -> None:
        """Raises `FluxmeshError` where what has arrived is not what was announced."""
        model = message.model
        arrived = hub.resolve_any(self._roots.model(model), download=False)
        if arrived.content != message.parcel.content:
            raise WeightsError(
                f"{model} has arrived and is another one than was sent: this host looks for it in "
                "another place first; see `fluxmesh models list` there."
            )

    async def _send(self, message: messages.SendModel) -> None:
        parcel, token = message.parcel, message.token
        receiver = next((r for r in self._coming.values() if r.landing.parcel == parcel), None)
        source: FileSource
        if receiver is not None:
            source = RelaySource(receiver)
        else:
            here = await in_thread(lambda: self._packed(message.model))
            source = DiskSource(parcel, here.paths)
        sender = ParcelSender(parcel, source, token, message.addresses, self._deadlines)
        self._going[token] = sender
        try:
            await in_thread(sender.run)
        finally:
            sender.stop()
            del self._going[token]
