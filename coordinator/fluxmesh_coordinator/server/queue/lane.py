"""One lane: a thread in which jobs are painted, one after the other, on the mesh that is up.

It asks `commands/generate.py` for what the command line asks too, follows the events and commits
each picture as it comes. `service.py`, in the server's event loop, gives it jobs and hears of them.
Lanes share the mesh: each job is lent some of its hosts, and no host works for two.
"""

from __future__ import annotations

import base64
import io
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from fluxmesh.cluster.backends import BackendFault
from fluxmesh.errors import FluxmeshError, HostUnreachableError, WeightsError
from fluxmesh.events import (
    BackendChanged,
    Encoded,
    Event,
    HostLost,
    HostUnfit,
    Loading,
    Picture,
    Planned,
    Preview,
    Queued,
    Step,
)
from fluxmesh.request import GenerateRequest
from fluxmesh.wire.messages import Status
from fluxmesh_coordinator.agents import mesh_file
from fluxmesh_coordinator.agents.mesh_file import MeshRecord
from fluxmesh_coordinator.artifacts.pictures import encode_png
from fluxmesh_coordinator.commands.generate import Painter, ReadyPrompt
from fluxmesh_coordinator.runtime.lent_hosts import HostBook, LentHosts
from fluxmesh_coordinator.server.picture_folder import PictureFolder
from fluxmesh_coordinator.server.queue.host_choice import Ways, planned_ways
from fluxmesh_coordinator.server.queue.served_job import ServedJob

Tell = Callable[[str, dict[str, Any]], None]  # a kind of event and its fields; from any thread
Notes = Callable[[str], None]
PACE = 1.0  # seconds between two words about bytes that are read
PREVIEW_QUALITY = 80

_notes: ContextVar[Notes] = ContextVar("notes")


class NotesReporter:
    """A painter's reporter that passes sentences on to whichever job this thread works for."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    @property
    def shows_previews(self) -> bool:
        return False  # each job says so itself

    def note(self, text: str) -> None:
        tell = _notes.get(None)
        if tell is not None:
            tell(text)

    def hint(self, name: str, text: str) -> None:
        pass

    def downloading(self, model: str, done_bytes: int, total_bytes: int) -> None:
        pass

    def started(self, request: GenerateRequest, model: dict[str, Any]) -> None:
        pass

    def event(self, event: Event) -> None:
        pass

    def saved(self, path: Path, seeds: list[int]) -> None:
        pass

    def finished(self) -> None:
        pass


class CurrentPainter:
    """A painter for the mesh that is up now: when another one is, another painter.

    The one before is let go of when the last job on it is over.
    """

    def __init__(self) -> None:
        self.changed: Callable[[], None] = lambda: None  # called when hosts come free
        self._lock = threading.Lock()
        self._painter: Painter | None = None
        self._stamp: Hashable = None  # of the mesh's record when it was read last
        self._book = HostBook(())  # of the painter's mesh
        self._users: Counter[Painter] = Counter()  # jobs that run, and who asks something
        self._faults: tuple[BackendFault, ...] = ()  # of its backends, as its record had them last
        self._ended: list[Painter] = []  # that nobody uses any more

    def get(self) -> Painter:
        """Raises as `mesh_file.load`. Ends the work of the one before, if there is another mesh."""
        with self._locked():
            return self._get()

    def book(self) -> HostBook:
        """Who has the hosts of the mesh that is up. Raises as `get`."""
        with self._locked():
            self._get()
            return self._book

    @contextmanager
    def using(self) -> Iterator[tuple[Painter, HostBook]]:
        """The painter and its hosts, for as long as the block lasts. Raises as `get`, `Mesh`."""
        with self._locked():
            painter, book, faults = self._get(), self._book, self._faults
            self._users[painter] += 1
        try:
            # Begins once, however many lanes ask; jobs elsewhere end meanwhile. What `up` has
            # cleared since is tried again.
            painter.mesh.adopt(faults)
            yield painter, book
        finally:
            self._leave(painter)

    @contextmanager
    def holding(self) -> Iterator[Painter]:
        """The painter, connected to a mesh or not, for as long as the block lasts; as `get`."""
        with self._locked():
            painter = self._get()
            self._users[painter] += 1
        try:
            yield painter
        finally:
            self._leave(painter)

    @contextmanager
    def looking(self) -> Iterator[Painter | None]:
        """The one that was in use last, whatever has come up since, as long as the block lasts."""
        with self._locked():
            painter = self._painter
            if painter is not None:
                self._users[painter] += 1
        try:
            yield painter
        finally:
            if painter is not None:
                self._leave(painter)

    def drop(self) -> None:
        """Lets go of the mesh; the next one that is asked for begins anew."""
        with self._locked():
            self._drop()

    def fails(self, painter: Painter) -> None:
        """The mesh of a painter that is in use is gone: if no other one is up, one begins anew."""
        with self._locked():
            if painter is self._painter:
                self._drop()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One thread at a time. What it let go of ends when others need not wait: it may take long,
        where what was found out on the mesh is still to be written down."""
        ended: list[Painter] = []
        try:
            with self._lock:
                try:
                    yield
                finally:
                    ended, self._ended = self._ended, []
        finally:
            for painter in ended:
                painter.__exit__()

    def _drop(self) -> None:
        old, self._painter = self._painter, None
        self._let_go(old)

    def _get(self) -> Painter:
        stamp, old = mesh_file.stamp(), self._painter
        if old is not None and stamp == self._stamp:
            return old
        record = mesh_file.load()
        if old is None or _key(old.record) != _key(record):
            self._painter = Painter(NotesReporter(), keep_warm=True)
            record = self._painter.record  # looked up now, beside the comparison
            ranks = [0] if record is None else [member.rank for member in record.members]
            self._book = HostBook(ranks, lambda: self.changed())
            self._let_go(old)
        self._faults, self._stamp = () if record is None else record.faults, stamp
        assert self._painter is not None
        return self._painter

    def _leave(self, painter: Painter) -> None:
        with self._locked():
            self._users[painter] -= 1
            if painter is not self._painter:
                self._let_go(painter)

    def _let_go(self, painter: Painter | None) -> None:
        if painter is not None and not self._users[painter]:
            del self._users[painter]
            self._ended.append(painter)


def _key(record: MeshRecord | None) -> Any:
    return None if record is None else (record.text, record.members, record.weights)


class Lane:
    """The thread, and its painter."""

    def __init__(self, pictures: PictureFolder, painters: CurrentPainter | None = None) -> None:
        """`painters` are those of the lanes beside it, if there are some."""
        self.pictures = pictures
        self.painters = painters or CurrentPainter()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="lane")
        self._running: tuple[ServedJob, Painter, LentHosts] | None = None

    def beside(self) -> Lane:
        """Another lane on the same mesh."""
        return Lane(self.pictures, self.painters)

    def book(self) -> HostBook:
        """Who has the hosts of the mesh that is up. Blocks; raises as `mesh_file.load`."""
        return self.painters.book()

    def ways(self, busy: Mapping[int, float]) -> Ways:
        """By which hosts a job could be painted now; `busy` has the seconds until some are free.

        Blocks; raises as `Mesh`.
        """
        with self.painters.using() as (painter, _):
            return planned_ways(painter.mesh.view, busy)

    def open(self) -> None:
        """Connects to the mesh that is up, or begins one of this machine. Raises as `Mesh`."""
        _ = self.painters.get().mesh

    def close(self) -> None:
        """Ends what this lane has begun; blocks."""
        self.thread.shutdown(wait=True, cancel_futures=True)
        self.painters.drop()

    def cancel(self, job: ServedJob) -> None:
        """Has a job of this lane end at its next step. From any thread."""
        running = self._running
        if running is not None and running[0] is job:
            _, painter, lent = running
            painter.mesh.cancel(lent)

    def statuses(self) -> tuple[MeshRecord, dict[int, Status | str]] | None:
        """The mesh, and what each host says of itself; None: there is none yet. Blocks."""
        with self.painters.looking() as painter:
            if painter is None:
                return None
            return painter.mesh.latest, painter.mesh.status()

    def paint(self, job: ServedJob, tell: Tell) -> None:
        """Paints a job to its end, in this lane's thread. Raises how it failed."""
        if job.is_cancelled:
            return
        assert job.ready is not None
        marker = _notes.set(lambda text: tell("note", {"text": text}))
        try:
            with self.painters.using() as (painter, book):
                self._paint(painter, _lent_to(job, book), job, tell)
        finally:
            _notes.reset(marker)

    def _paint(self, painter: Painter, lent: LentHosts, job: ServedJob, tell: Tell) -> None:
        assert job.ready is not None
        self._running = (job, painter, lent)
        try:
            lent.is_cancelled |= job.is_cancelled  # while the mesh began: nobody could be told
            parts = job.parts()
            left = sum(part.request.n_images for _, part in parts)
            for first, resolved in parts:
                if resolved.model.is_changed:  # its settings are of the old ones
                    raise WeightsError(
                        f"The files of {job.model} were changed while this waited; send it again, "
                        "and they are read anew."
                    )
                with closing(painter.start(resolved, job.spread, lent)) as events:
                    more = left / resolved.request.n_images
                    translator = _Translator(job, job.ready, self.pictures, tell, first, more)
                    for event in events:
                        if job.is_cancelled:
                            return
                        translator.hear(event)
                left -= resolved.request.n_images
        except HostUnreachableError:
            if painter.record is None:
                self.painters.fails(painter)  # of this machine alone: the next job begins another
            raise
        finally:
            self._running = None
            lent.give_back()


def _lent_to(job: ServedJob, book: HostBook) -> LentHosts:
    """What was lent to the job; of a mesh that has come up since, what is free there."""
    if job.lent is None or job.lent.book is not book:
        return book.lend(book.ranks)
    return job.lent


class _Translator:
    """A job's events, as clients read them; its pictures are committed on the way.

    What is painted is told from image 0 on, and is the job's from image `first` on. All that the
    job has left from there on is `more` times as many images.
    """

    def __init__(
        self,
        job: ServedJob,
        ready: ReadyPrompt,
        pictures: PictureFolder,
        tell: Tell,
        first: int,
        more: float,
    ) -> None:
        self.job, self.ready, self.pictures, self.tell = job, ready, pictures, tell
        self.recipe = ready.recipe
        self.first, self.more = first, more
        self._loading = -PACE  # when bytes were told last

    def hear(self, event: Event) -> None:
        """Raises `OutputError` where a picture can't be written."""
        match event:
            case Queued():
                text = "Another program has the hosts; this waits for them."
                self.tell("queued", {"place": event.place, "seconds_left": event.seconds})
                self.tell("note", {"text": text})
            case Planned():
                self.tell("planned", _planned(event, event.seconds * self.more))
            case Loading():
                self._hear_loading(event)
            case HostLost() | HostUnfit():
                text = f"{event.name}: {event.reason}"
                self.tell("host", {"name": event.name, "text": text})
            case BackendChanged():
                self.tell("note", {"text": str(event)})
            case Encoded():
                self.recipe = self.ready.recipe_read(event)
                for what, cut, _ in event.cuts:
                    self.tell("note", {"text": f"{cut.counts(what)}."})
            case Step():
                image = self.first + event.image
                self.tell("step", {"image": image, "step": event.step, "steps": event.steps})
            case Preview():
                self.tell("preview", preview(self.first + event.image, event.step, event.pixels))
            case Picture():
                self._commit(event)

    def _hear_loading(self, event: Loading) -> None:
        now, is_whole = time.monotonic(), event.done_bytes >= event.total_bytes
        if not is_whole and now - self._loading < PACE:
            return
        self._loading = now
        gigabytes = f"{event.done_bytes / 1e9:.1f} of {event.total_bytes / 1e9:.1f} GB"
        self.tell(
            "model",
            {
                "name": self.job.model,
                "text": f"Reading the {event.component} of {self.job.model}: {gigabytes}.",
                "done_bytes": event.done_bytes,
                "total_bytes": event.total_bytes,
            },
        )

    def _commit(self, picture: Picture) -> None:
        made = replace(self.recipe.of_image(picture.seed), placement=picture.placement)
        data = encode_png(picture.pixels, made.to_json())
        image = self.first + picture.image
        name = self.pictures.commit(self.job.id, self.job.accepted, image, data)
        self.tell("picture", self.job.picture_told(image, name))


def preview(image: int, step: int, pixels: np.ndarray) -> dict[str, Any]:
    """The fields of a `preview` event; `pixels` is uint8 (height, width, 3)."""
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(out, "JPEG", quality=PREVIEW_QUALITY)
    data = base64.b64encode(out.getvalue()).decode()
    height, width = pixels.shape[:2]
    return {"image": image, "step": step, "data": data, "width": width, "height": height}


def _planned(event: Planned, seconds: float) -> dict[str, Any]:
    fields = {"placement": event.placement, "hosts": list(event.hosts), "seconds": seconds}
    return fields | ({"notice": event.notice} if event.notice else {})


def reason_of(error: BaseException) -> FluxmeshError:
    """How a job failed, in a sentence; what is none of ours is told without its words."""
    if isinstance(error, FluxmeshError):
        return error
    return FluxmeshError("Something went wrong inside the server; its log says what.")
