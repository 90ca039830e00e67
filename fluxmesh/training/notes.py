"""What is told before a training begins: what of captions is cut, which settings do nothing."""

from __future__ import annotations

from collections.abc import Iterator

from fluxmesh.models.base import Architecture
from fluxmesh.models.registry import PUBLISHED
from fluxmesh.training.compute.lr_schedule import warmup_updates
from fluxmesh.training.data.remarks import several
from fluxmesh.training.events import Note
from fluxmesh.training.plan import TrainingPlan
from fluxmesh.training.request import TrainRequest
from fluxmesh.weights.checkpoint import Checkpoint
from fluxmesh.weights.embedded.checkpoints import FOLDERS


def notes_of(plan: TrainingPlan, base: Checkpoint) -> Iterator[Note]:
    """A model that had better not be trained; settings without effect; then which captions are
    cut, and from which words on.

    Raises `ModelNotFoundError`, `WeightsError` where the tokenizer can't be read.
    """
    request = plan.request
    undistilled = base.architecture.undistilled
    if undistilled is not None and base.name not in FOLDERS:  # the embedded one has no other
        yield Note(
            f"{request.model} was distilled to {base.architecture.distilled_steps} steps, which a "
            f"training wears off: {named(undistilled)} learns better, and its adapters run on "
            f"{request.model} too."
        )
    if request.guidance != TrainRequest.guidance and not base.architecture.takes_guidance:
        yield Note(f"`guidance` is {request.guidance:g}, and {request.model} takes none.")
    if request.warmup_steps and request.warmup_steps >= request.updates:
        yield Note(
            f"`warmup_steps` is {request.warmup_steps} of {request.updates} updates; the rate "
            f"rises for {warmup_updates(request)} of them."
        )
    reader = base.family.folder.reader(base.architecture, base.tokenizers)
    cut = [
        f"{example.where} (from “{_start(example.caption[left_out.start :])}” on)"
        for example in plan.examples
        if (left_out := reader.cut(example.caption))
    ]
    if cut:
        yield Note(
            f"The model reads {reader.max_length} tokens of a caption, and not the end of "
            f"{several(cut, 'longer one')}."
        )
    prompt = request.progress_prompt
    if prompt and (left_out := reader.cut(prompt)):
        yield Note(left_out.sentence(prompt, "the progress prompt"))


def named(model: Architecture) -> str:
    """A model as people call it, by its sizes."""
    alike = (
        name
        for name, known in PUBLISHED.items()
        if (known.architecture.transformer, known.architecture.distilled_steps)
        == (model.transformer, model.distilled_steps)
    )
    return next(alike, "its base model")


def _start(text: str) -> str:
    """A few words of what is left out."""
    return " ".join(text[:80].split()[:3])
