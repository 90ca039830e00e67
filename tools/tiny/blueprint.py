"""What differs between the embedded checkpoints, for the training that they share.

A `Blueprint` says how large a checkpoint's models are, how its text becomes tokens and features,
and what its transformer takes; `tiny_flux1.py` and `tiny_klein.py` are the two. Data, losses,
stages and evaluation know no more of a checkpoint than what stands here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

MODELS = {"tiny": "tiny_flux1:TinyFlux1", "tiny-klein": "tiny_klein:TinyKlein"}

# Captions to token ids, int64 [captions, length], of each tokenizer by the name of its model.
Tokens = Callable[[list[str]], dict[str, np.ndarray]]


@dataclass(frozen=True)
class PictureSizes:
    """Of the pictures of an example, in pixels."""

    height: int
    width: int
    references: tuple[tuple[int, int], ...] = ()  # (height, width) of each picture to edit


@dataclass(frozen=True)
class TrainingShape:
    """Pictures of one size with texts of one length, and their part of a stage's steps."""

    sizes: PictureSizes
    share: float
    text_length: int | None  # tokens that captions are padded to; None for captions unpadded


class Blueprint(ABC):
    """One embedded checkpoint."""

    latent_channels: int
    text_tokens: int  # that the checkpoint's tokenizers pad and cut to
    longest_text: int  # tokens of the longest of all shapes
    whole_batch: int  # tokens of text and pictures up to which a batch is whole
    time_shift: float  # of the noise levels that training draws
    reference_noise: float = 0.0  # at most, on references in training
    shapes: tuple[TrainingShape, ...]  # of the stage `flow`: few, and many steps
    last_shapes: tuple[TrainingShape, ...]  # of the stage `last`: every size and length
    edits: bool  # whether it takes reference pictures
    # Steps and peak learning rate of stages, where they are not those of train.py.
    plans: Mapping[str, tuple[int, float]] = {}

    # The autoencoder

    @abstractmethod
    def build_autoencoder(self) -> torch.nn.Module:
        """With the weights that its training begins at."""

    @abstractmethod
    def statistics(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation that normalize tokens [N, 4C]: of all numbers, or of each channel."""

    @abstractmethod
    def keep_statistics(
        self, autoencoder: torch.nn.Module, mean: torch.Tensor, deviation: torch.Tensor
    ) -> None:
        """Puts them where the checkpoint's readers look."""

    @abstractmethod
    def kept_statistics(self, autoencoder: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """What `keep_statistics` put there."""

    # Text and transformer

    @abstractmethod
    def train_tokenizers(self, captions: list[str], checkpoint: Path) -> None: ...

    @abstractmethod
    def load_tokens(self, checkpoint: Path) -> Tokens: ...

    @abstractmethod
    def build_models(self, checkpoint: Path) -> torch.nn.ModuleDict:
        """Text encoders and transformer as training begins, by their folders' names."""

    @abstractmethod
    def compile(self, modules: torch.nn.ModuleDict) -> None:
        """Compiles what repeats."""

    def cut_text(
        self, tokens: Mapping[str, torch.Tensor], length: int
    ) -> Mapping[str, torch.Tensor]:
        """The first `length` tokens of captions that are padded to the longest."""
        return {name: ids[:, :length] for name, ids in tokens.items()}

    @abstractmethod
    def encode(
        self, modules: torch.nn.ModuleDict, tokens: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """Features of captions, from what `load_tokens` gives. Fit for capture in a graph."""

    @abstractmethod
    def picture_ids(
        self, height: int, width: int, references: tuple[tuple[int, int], ...]
    ) -> torch.Tensor:
        """Positions of a picture's tokens and then of its references', float32 [tokens, axes]."""

    @abstractmethod
    def velocity(
        self,
        modules: torch.nn.ModuleDict,
        noised: torch.Tensor,
        t: torch.Tensor,
        features: tuple[torch.Tensor, ...],
        ids: torch.Tensor,
    ) -> torch.Tensor:
        """What the transformer says at noise levels t [B] of tokens [B, tokens, 4C]."""

    @abstractmethod
    def time_steps(self, tokens: int, steps: int) -> list[float]:
        """Noise levels from 1 to 0 as the checkpoint's scheduler has them."""

    # The folder

    @abstractmethod
    def write_index(self, checkpoint: Path) -> None:
        """Writes the scheduler and model_index.json."""


def load_blueprint(name: str) -> Blueprint:
    """The blueprint called so; what the other one needs is not imported."""
    module, _, attribute = MODELS[name].partition(":")
    blueprint: Blueprint = getattr(import_module(module), attribute)()
    return blueprint
