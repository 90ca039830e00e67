"""What Metal says when macOS ends work of the GPU, in words that help: texts in, texts out.

Beside the worker, whose exceptions an engine shows to this before it reports them, as a training
without a mesh does. MLX hands on the text of the command buffer's error, for example

    [METAL] Command buffer execution failed: Impacting Interactivity
    (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity).

Names and numbers are those of IOGPU's `kIOGPUCommandBufferCallbackError...`; memory that runs out
is not among them (`worker.is_out_of_memory`).
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

RELAX = "AGX_RELAX_CDM_CTXSTORE_TIMEOUT"  # "1": the driver gives a kernel longer before it ends it
# Of what computes on a Mac, unless the environment says otherwise. Where a display is on, macOS may
# end work of the GPU that the display has to wait for: trainings, and pictures of 2048 x 2048
# pixels (https://github.com/ml-explore/mlx/issues/3267). The price is a display that may stutter
# meanwhile; the way to be sure is a display that sleeps.
ON_DARWIN = {RELAX: "1"}


@dataclass(frozen=True)
class GpuEnd:
    """Why macOS ended work of the GPU."""

    words: tuple[str, ...]  # of Metal, in lower case: any of them
    reason: str  # a clause about "it", the work
    is_late: bool = False  # in a ring, another host may be the reason
    can_relax: bool = False  # whether `RELAX` may help


ENDS = (
    GpuEnd(
        ("gpu timeout", "callbackerrortimeout"),
        "it took longer than the 5 s or so that its watchdog allows",
        is_late=True,
        can_relax=True,
    ),
    GpuEnd(
        ("impacting interactivity", "callbackerrorimpactinginteractivity"),
        "the display had to wait for it",
        can_relax=True,
    ),
    GpuEnd(("gpu hang", "callbackerrorhang"), "it did not move", can_relax=True),
    GpuEnd(
        ("innocent victim", "victim of gpu error", "callbackerrorinnocentvictim"),
        "the GPU was restarted, for something that another program did",
    ),
    GpuEnd(
        ("prior/excessive gpu errors", "callbackerrorsubmissionsignored"),
        "there were too many errors before it",
    ),
)


def gpu_end(error: BaseException) -> GpuEnd | None:
    """Which of them an exception of MLX tells of; None for any other."""
    text = str(error).lower()
    return next((end for end in ENDS if any(word in text for word in end.words)), None)


def relax() -> None:
    """On a Mac, has the driver give this process's own work longer; before anything loads MLX."""
    if sys.platform == "darwin":
        for name, value in ON_DARWIN.items():
            os.environ.setdefault(name, value)


def explain(end: GpuEnd, doing: str, *, in_ring: bool, relaxed: bool) -> str:
    """One sentence: what happened while `doing`, and what helps.

    `in_ring`: with other hosts; `relaxed`: `RELAX` is set already.
    """
    what = f"macOS ended the GPU's work while {doing}, because {end.reason}"
    if in_ring and end.is_late:
        return f"{what}: another host of the ring came late, or other apps kept the GPU busy."
    relax = f", set {RELAX}=1 for the engines" if end.can_relax and not relaxed else ""
    return (
        f"{what}; close other apps that use the GPU, let the display sleep{relax}, "
        "or choose a smaller image."
    )
