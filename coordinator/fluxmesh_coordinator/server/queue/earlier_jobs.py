"""Jobs of the server before this one: what is told of them, and what is kept when one goes on.

Between the journal and the folder of pictures, which outlive a server, and `service.py`. A job that
is done is the same job for who sends its id again. One that was cut off goes on: its seed is the
one that was drawn, and only the pictures that are missing are painted. A picture counts where its
recipe is the very one that would be written into it now: another model, or another fluxmesh, begins
anew and never mixes. Everything here blocks.
"""

from __future__ import annotations

from dataclasses import replace

from fluxmesh_coordinator.commands.generate import ReadyPrompt
from fluxmesh_coordinator.server.picture_folder import PictureFolder
from fluxmesh_coordinator.server.queue.journal import JobRecord, Journal
from fluxmesh_coordinator.server.queue.served_job import ServedJob

LOST = "The server ended before this job was done"


class EarlierJobs:
    """What the journal has of the server before."""

    def __init__(self, journal: Journal, pictures: PictureFolder) -> None:
        self.done: dict[str, ServedJob] = {}
        self.lost: dict[str, ServedJob] = {}
        for record in journal.done:  # a picture that was removed since is missed when it is read
            name = {k: pictures.name_of(record.id, record.accepted, k) for k in _images(record)}
            self.done[record.id] = _done(record, name)
        for record in journal.lost:
            kept = pictures.of_job(record.id, record.accepted, record.n_images)
            if len(kept) == record.n_images:  # it was killed between its last picture and its end
                journal.accepted(record)
                journal.ended(record.id, is_done=True)
                self.done[record.id] = _done(record, kept)
            else:
                self.lost[record.id] = _lost(record, kept)


def kept_pictures(
    pictures: PictureFolder, earlier: ServedJob, ready: ReadyPrompt
) -> dict[int, str]:
    """The names of a job's pictures that are there and are what `ready` would paint, by image.

    None of them where one is not.
    """
    names = pictures.of_job(earlier.id, earlier.accepted, earlier.n_images)
    for image, name in names.items():
        made, now = pictures.recipe(name), ready.recipe.of_image(earlier.seed + image)
        if made is None or made != replace(now, placement=made.placement):
            return {}
    return names


def _images(record: JobRecord) -> range:
    return range(record.n_images)


def _job(record: JobRecord, names: dict[int, str]) -> ServedJob:
    job = ServedJob(
        id=record.id, client="", fingerprint=record.fingerprint, model=record.model,
        n_images=record.n_images, height=record.height, width=record.width, steps=record.steps,
        seed=record.seed, ready=None, accepted=record.accepted,
    )  # fmt: skip
    job.keep(names)
    return job


def _done(record: JobRecord, names: dict[int, str]) -> ServedJob:
    job = _job(record, names)
    job.stage = "done"
    job.events.append("done", {"pictures": job.names})
    return job


def _lost(record: JobRecord, names: dict[int, str]) -> ServedJob:
    """What can be told of a job that was not finished."""
    job = _job(record, names)
    job.stage = "failed"
    kept = f"; its finished pictures are {', '.join(job.names)}" if names else ""
    said = f"{LOST}{kept}. Send it again by the same id, and it goes on."
    job.events.append("error", {"message": said, "setting": None, "code": "lost"})
    return job
