"""Whether the hosts of a job hold one and the same model under its name. Pure.

Below `session.py`. A checkpoint is known by its name, which may mean another revision on another
host, or files that somebody changes on one of them: their pictures would differ, and a ring of both
would paint neither.
"""

from __future__ import annotations

from collections.abc import Mapping

from fluxmesh.errors import WeightsError


class ModelCheck:
    """`Checkpoint.content` of each host that has worked on a job, as its engine told it."""

    def __init__(self, model: str) -> None:
        self.model = model
        self._contents: dict[int, tuple[str, str]] = {}  # rank -> host's name, content

    def hear(self, rank: int, name: str, content: str) -> WeightsError | None:
        """Keeps what a host told; an error that names the hosts if it differs from the others,
        or from what the same one told before: its engine may have begun anew.

        A host that is gone still counts: what it made is part of the job.
        """
        if self._contents.get(rank, (name, content)) != (name, content):
            return WeightsError(
                f"The files of {self.model} on host {rank} ({name}) were changed while this job "
                "used them; ask again."
            )
        self._contents[rank] = (name, content)
        problem = difference(self.model, self._contents)
        return WeightsError(problem) if problem else None


def difference(model: str, contents: Mapping[int, tuple[str, str]]) -> str:
    """A sentence where hosts (rank -> name, content) hold different files; "" where all agree."""
    if len({content for _, content in contents.values()}) < 2:
        return ""
    hosts = ", ".join(
        f"host {rank} ({name}) {content[:8]}" for rank, (name, content) in sorted(contents.items())
    )
    return f"Hosts hold different files under the name {model}: {hosts}. {remedy(model)}"


def other_reader(reader: str, rank: int, name: str) -> WeightsError:
    """That a host reads references with other files than the machine that asks has."""
    help = "copy the one that you mean to all of them"
    if "/" not in reader:  # an alias, and neither a path nor somebody's repository
        help = f"run `fluxmesh models pull {reader}` on all of them"
    return WeightsError(
        f"Host {rank} ({name}) and this machine hold different files under the name {reader}, "
        f"which read the references; {help}, and ask again."
    )


def other_base(model: str, rank: int, name: str) -> WeightsError:
    """That a host would train other files than the machine that asks has, of which the run's files
    will tell: the revision in checkpoints, in pictures on the way and in the cache of features."""
    return WeightsError(
        f"Host {rank} ({name}) and this machine hold different files under the name {model}, or "
        f"they were changed just now: then ask again. {remedy(model)}"
    )


def remedy(model: str) -> str:
    """What makes them the same again."""
    copy = "Copy the one that you mean to the others"
    if not model.startswith("/"):
        copy = f"Run `fluxmesh models pull {model}` on all of them"
    return f"{copy}; then `fluxmesh up` loads it anew."
