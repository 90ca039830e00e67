"""What a running job tells: one frozen dataclass an event, in the order in which they happen.

The coordinator's session yields them; the command line turns them into a progress bar, a table or
JSON lines, and writes the pictures. `host` is the rank of who did it, None where a training runs in
this process. Nothing here imports mlx.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fluxmesh.request import PromptCut


@dataclass(frozen=True)
class Loading:
    """A component's weights are being read, or a host is sent an adapter."""

    component: str  # "text encoders", "transformer", "autoencoder"; "download", "adapter" before
    done_bytes: int
    total_bytes: int
    host: int | None = None


@dataclass(frozen=True)
class Queued:
    """Another job has a host that this one needs."""

    place: int  # 1 is next
    seconds: float  # until it is free, as far as is known; 0 where nothing is
    host: int | None = None


@dataclass(frozen=True, kw_only=True)
class Planned:
    """How the job, or what is left of it, will be done."""

    placement: str  # "data", "sequence", "tensor", or "mixed"
    hosts: tuple[int, ...]  # ranks
    seconds: float  # predicted, from now to the last picture
    reason: str  # why so
    notice: str = ""  # what takes longer this once, in a sentence


@dataclass(frozen=True)
class HostLost:
    """A host died or hung; the job goes on without what it had not finished."""

    host: int
    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class BackendChanged:
    """A ring's backend failed, and these hosts' rings form over another until the next `up`."""

    hosts: tuple[int, ...]  # of the ring that failed
    names: tuple[str, ...]  # of these hosts
    before: str  # the backend that failed
    after: str
    reason: str

    def __str__(self) -> str:
        hosts = " and ".join(map(str, self.hosts[-2:]))
        others = "".join(f"{rank}, " for rank in self.hosts[:-2])
        return (
            f"{self.before} failed on hosts {others}{hosts}, which go on over {self.after} until "
            f"the next `fluxmesh up`: {self.reason}"
        )


@dataclass(frozen=True)
class HostUnfit:
    """A host lives, but its files or its memory are not what the job needs: others do it."""

    host: int
    name: str
    reason: str


@dataclass(frozen=True)
class Encoded:
    """The prompt has become text features (at once when it was seen before)."""

    prompt: str
    seconds: float
    cached: bool
    tokens: int = 0  # of a prompt that has more than the model reads
    kept: int = 0  # tokens that are read of it
    dropped: str = ""  # its end, which is not; "" where all is read
    negative_tokens: int = 0  # the same of the negative prompt
    negative_kept: int = 0
    negative_dropped: str = ""
    content: str = ""  # `Checkpoint.content` of the model that the hosts have read
    revision: str = ""  # `Checkpoint.revision` of it, where the prompt was read

    @property
    def cuts(self) -> tuple[tuple[str, PromptCut, str], ...]:
        """Of each text that is not read whole: what it is, how it is cut, and its end."""
        negative = self.negative_tokens, self.negative_kept, self.negative_dropped
        texts = {
            "the prompt": (self.tokens, self.kept, self.dropped),
            "the negative prompt": negative,
        }
        return tuple(
            (what, PromptCut(tokens, kept, 0), end)
            for what, (tokens, kept, end) in texts.items()
            if end
        )


@dataclass(frozen=True, kw_only=True)
class Step:
    """One denoising step of one image is done, and evaluated."""

    image: int  # counted from 0
    step: int  # steps done, from 1
    steps: int  # steps that this image takes
    seconds: float
    preview: np.ndarray | None = field(default=None, repr=False, compare=False)
    # uint8 (height, width, 3), when the request asked to see each step
    host: int | None = None
    reused: bool = False  # approximated from an earlier step, because the request allowed it


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What one image will look like, as far as a step tells; comes behind its `Step`."""

    image: int  # counted from 0
    step: int  # steps done, from 1
    steps: int  # steps that this image takes
    pixels: np.ndarray = field(repr=False, compare=False)  # uint8 (height, width, 3), small
    host: int | None = None


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One finished image."""

    image: int  # counted from 0
    seed: int  # the seed that gives this image alone
    pixels: np.ndarray = field(repr=False, compare=False)  # uint8 (height, width, 3)
    seconds: float = 0.0  # denoising and decoding
    host: int | None = None  # who decoded it
    placement: str = "data"  # how its steps were made; "mixed" where not all were made alike
    steps: int = 0  # how many these were
    reused: int = 0  # how many of them were approximated from earlier ones


@dataclass(frozen=True)
class Peak:
    """Peak memory of a phase, reported as the phase ends."""

    phase: str  # "text", "denoise" or "decode"
    bytes: int


Event = (
    Loading
    | Queued
    | Planned
    | HostLost
    | HostUnfit
    | BackendChanged
    | Encoded
    | Step
    | Preview
    | Picture
    | Peak
)
