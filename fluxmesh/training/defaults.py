"""What a training takes where its user says nothing, as far as model and length decide it. Pure.

The fixed defaults stand in `request.py`: those of Apple's `dreambooth.py`, from which the project's
options come (600 iterations, 4 of them an update, rank 8). Two of Apple's fit FLUX.1 and long runs
alone, and are worked out here:

- **the rate**: 1e-4 at FLUX.1's width, which Apple's example and ai-toolkit's
  `train_lora_flux_24gb.yaml` share. Adam moves every number by about the rate, whatever the
  gradient, so that what a linear of D inputs gives moves by D times it: the rate goes as 1/D (Yang
  et al. 2022, "Tensor Programs V", https://arxiv.org/abs/2203.03466, table 3). `tiny`, 192 wide,
  gets 1.6e-3.
- **the warm-up**: a tenth of the updates (the share of BERT's `run_classifier.py`), and Apple's 100
  at most. Of the 150 updates of a default run 100 would be two thirds, spent before the rate is
  full once.
"""

from __future__ import annotations

from dataclasses import replace

from fluxmesh.training.request import TrainRequest

RATE = 1e-4  # of a transformer as wide as FLUX.1's
WIDTH = 3072  # of FLUX.1
WARMUP_SHARE = 10  # one of so many updates
LONGEST_WARMUP = 100  # updates


def fill(request: TrainRequest, width: int) -> TrainRequest:
    """The request with rate and warm-up set, for a transformer of `width` channels."""
    rate, warmup = request.learning_rate, request.warmup_steps
    return replace(
        request,
        learning_rate=default_rate(width) if rate is None else rate,
        warmup_steps=default_warmup(request.updates) if warmup is None else warmup,
    )


def default_rate(width: int) -> float:
    """To two digits, as people write rates."""
    return float(f"{RATE * WIDTH / width:.1e}")


def default_warmup(updates: int) -> int:
    """Of a run of so many updates."""
    return min(-(-updates // WARMUP_SHARE), LONGEST_WARMUP)
